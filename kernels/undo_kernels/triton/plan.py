"""The plans ``chunk`` and ``recompute`` on a GPU: bytes, FLOPs, predicted time and workspace, from shapes and dtypes alone.

Bytes of device memory for each (token, vocabulary entry) pair, dense target and 16-bit inputs, full gradient::

    chunk       products write 8, statistics read 8, the gradient reads 8 and writes 2, its two products read 2 each     30
    recompute   the gradient writes 2, its two products read 2 each                                                       6

and products over [tokens, V, d]: chunk 4, recompute 6, or 5 where the teacher's log-sum-exps are known. ``costs.py`` predicts the
time of each step from products, bytes and instructions; ``auto`` takes the plan with the smaller sum. This module can be imported
without triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from undo_kernels.plan import Plan
from undo_kernels.problem import Problem, gradient_dtype
from undo_kernels.projection import GivenLogits
from undo_kernels.triton import costs, tile_table
from undo_kernels.triton.products import separate_bytes
from undo_kernels.triton.shapes import Shapes

_CHUNK_ELEMENTS = 1 << 28  # (token, vocabulary entry) pairs of a chunk by default: 2.7 GB at 10 bytes
_CHUNK_TOKENS = (1024, 2048)  # range for a large vocabulary: fewer would read the heads too often
_SUMMED_CHUNKS = 8  # most chunks over which a 16-bit weight gradient is summed in its own dtype
_BLOCK_ELEMENTS = 1 << 26  # pairs of a vocabulary block of the recompute plan: 134 MB of 16-bit gradient


@dataclass(frozen=True)
class GpuPlan:
    """How the Triton backend runs a problem.

    Attributes:
        name: chunk or recompute.
        rows_per_chunk: tokens whose logits are held at once; all of them in recompute.
        block_v: vocabulary entries whose gradient is held at once; all of them in chunk.
        accumulator: whether a 16-bit weight's gradient is summed in a float32 buffer.
        buffers: bytes of each buffer, by name; everything beyond inputs, outputs and a few floats per token.
        flops: FLOPs of the matrix products.
        traffic_bytes: bytes of device memory read and written.
        steps: predicted seconds of each step on an H200.
    """

    name: str
    rows_per_chunk: int
    block_v: int
    accumulator: bool
    buffers: dict[str, int]
    flops: float
    traffic_bytes: float
    steps: dict[str, float]

    @property
    def seconds(self) -> float:
        """Predicted time on an H200."""
        return sum(self.steps.values())

    @property
    def workspace_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(self.buffers.values())


def gpu_plan(problem: Problem, target: str | None = None) -> GpuPlan:
    """Returns the fastest plan that fits the workspace.

    Raises:
        ValueError: no plan fits ``workspace_bytes``, or ``plan`` names none.
    """
    s = Shapes(problem, target or tile_table.target_of(problem.student.hidden.device))
    if s.given and not s.sparse:  # the logits exist: no plan to choose
        return chunk_plan(s, max(s.tokens, 1))
    if problem.plan not in ("auto", "chunk", "recompute"):
        raise ValueError(f"plan: got {problem.plan!r}, wanted auto, direct, chunk or recompute")
    if problem.plan == "recompute" and s.sparse:
        raise ValueError(f"plan: got 'recompute', wanted auto, direct or chunk for the target {problem.target!r} on a GPU")
    budget, candidates, least = problem.workspace_bytes, [], []
    if problem.plan in ("auto", "chunk"):
        candidates += _chunk_plans(s, budget)
        least.append(chunk_plan(s, 1 if problem.shard is None else max(s.tokens, 1)))
    if problem.plan in ("auto", "recompute") and not s.sparse:
        candidates += _recompute_plans(s, budget)
        least.append(recompute_plan(s, 1))
    fitting = [plan for plan in candidates if budget is None or plan.workspace_bytes <= budget]
    if fitting:
        return min(fitting, key=lambda plan: plan.seconds)
    wanted = min(plan.workspace_bytes for plan in least)
    raise ValueError(f"workspace_bytes: got {budget}, wanted at least {wanted} for these shapes")


def _chunk_plans(s: Shapes, budget: int | None) -> list[GpuPlan]:
    tokens = max(s.tokens, 1)
    if s.problem.shard is not None:  # processes exchange once, between the passes of all tokens
        usual = max(_CHUNK_ELEMENTS // max(s.leading, 1), _CHUNK_TOKENS[0])
        whole = s.sparse or s.problem.plan == "chunk" or budget is not None or tokens <= usual
        return [chunk_plan(s, tokens)] if whole else []
    if budget is None:
        least = max(_CHUNK_TOKENS[0], min(_CHUNK_TOKENS[1], -(-tokens // _SUMMED_CHUNKS)))
        chunk = max(_CHUNK_ELEMENTS // s.leading, costs.fullest_chunk(least, _CHUNK_TOKENS[1], s.width))
        return [chunk_plan(s, min(chunk, tokens))]
    plans = []
    # A float32 accumulator appears below an eighth of the tokens, so both ranges are searched separately.
    for low, high in ((-(-tokens // _SUMMED_CHUNKS), tokens), (1, -(-tokens // _SUMMED_CHUNKS) - 1)):
        if low > high or chunk_plan(s, low).workspace_bytes > budget:
            continue
        while low < high:
            middle = (low + high + 1) // 2
            if chunk_plan(s, middle, even=False).workspace_bytes <= budget:
                low = middle
            else:
                high = middle - 1
        plans.append(chunk_plan(s, low))
    return plans


def _recompute_plans(s: Shapes, budget: int | None) -> list[GpuPlan]:
    block = s.loss_tile.block_v
    whole = max(-(-s.vocabulary // block), 1)
    high = min(whole, max(-(-1024 // block), _BLOCK_ELEMENTS // max(s.tokens, 1) // block))
    if budget is None:
        return [recompute_plan(s, high)]
    low = 1
    while low < high:
        middle = (low + high + 1) // 2
        if recompute_plan(s, middle).workspace_bytes <= budget:
            low = middle
        else:
            high = middle - 1
    return [recompute_plan(s, low)]


def chunk_plan(s: Shapes, chunk: int, even: bool = True) -> GpuPlan:
    """Returns the chunk plan with at most ``chunk`` tokens at a time, evened out."""
    p, n, vocabulary = s.problem, max(s.tokens, 1), s.vocabulary
    chunks = -(-n // chunk)
    if even:
        chunk = min(chunk, -(-n // chunks // 16) * 16)  # each chunk starts at an address that allows 16-byte loads
    needs_hidden, needs_weight, _ = p.needs
    gradient_bytes = s.product.itemsize
    stored = [side for side in s.sides if not isinstance(side, GivenLogits)]
    held = len(stored) + (s.given and s.sparse)
    parts, _ = tile_table.row_parts(chunk, vocabulary, tile_table.row_block(s.target, vocabulary).block_v)
    buffers = {"logits": 4 * chunk * s.leading * held, "partial sums": 4 * (tile_table.FIELDS + 2) * chunk * parts}
    accumulator = False
    if not s.given:
        buffers["rounded gradient"] = chunk * s.leading * gradient_bytes * (s.gradient and gradient_bytes != 4)
        buffers["hidden states"] = s.hidden_bytes(chunk)
        buffers["widened weight tile"] = s.upcast_bytes(4096)
        buffers["bias gradient"] = s.bias_bytes()
        weight_dtype, hidden_dtype = gradient_dtype(p.student.weight.dtype), gradient_dtype(p.student.hidden.dtype)
        if needs_weight:
            accumulator = weight_dtype == torch.bfloat16 and chunks > _SUMMED_CHUNKS
            buffers["weight gradient sum"] = 4 * vocabulary * s.width * accumulator
            out = torch.float32 if accumulator else weight_dtype
            buffers["weight gradient tile"] = separate_bytes(out, s.product, vocabulary, s.width)
        if needs_hidden:
            cast = p.student.weight.dtype != s.product
            wide = 4 * (cast or hidden_dtype != torch.float32)  # a library may round the parts of a split sum to 16 bits
            buffers["hidden gradient"] = chunk * s.width * (wide + hidden_dtype.itemsize * s.compacted)
    pairs = float(n) * vocabulary
    logit = [side.hidden.dtype.itemsize if isinstance(side, GivenLogits) else 4 for side in s.sides]
    traffic = pairs * 4 * len(stored)
    sums = sum(logit) if s.teacher_sums_of_chunks else logit[0]
    traffic += pairs * (sums * s.student_sums + sum(logit) * (s.loss_pass + s.mixture_pass))
    out_bytes = gradient_dtype(p.student.hidden.dtype).itemsize if s.given else gradient_bytes
    traffic += pairs * out_bytes * (s.gradient + (0 if s.given else sum(p.needs)))
    flops = 0.0
    if not s.given:
        heads = sum(side.weight.shape[1] * side.weight.dtype.itemsize for side in stored) * vocabulary
        own = s.width * vocabulary * p.student.weight.dtype.itemsize
        summed = s.width * vocabulary * (4 if accumulator else gradient_dtype(p.student.weight.dtype).itemsize)
        traffic += float(chunks) * (heads + own * needs_hidden + 2 * summed * needs_weight)
        flops = 2 * pairs * (sum(side.weight.shape[1] for side in stored) + s.width * (needs_hidden + needs_weight))
    steps = _chunk_steps(s, pairs, n / chunks, chunks, logit, out_bytes * s.gradient)
    return GpuPlan("chunk", chunk, vocabulary, accumulator, _sizes(buffers), flops, traffic, steps)


def recompute_plan(s: Shapes, blocks: int) -> GpuPlan:
    """Returns the recompute plan with the gradient of ``blocks`` tiles of the vocabulary held at a time."""
    p, n, vocabulary = s.problem, max(s.tokens, 1), s.vocabulary
    block_v = blocks * s.loss_tile.block_v
    needs_hidden, needs_weight, _ = p.needs
    weight_dtype, hidden_dtype = gradient_dtype(p.student.weight.dtype), gradient_dtype(p.student.hidden.dtype)
    itemsize = s.product.itemsize
    parts, _ = tile_table.tile_parts(n, vocabulary, s.stats_tile)
    strided = [t for side in s.sides for t in (side.weight, side.hidden) if t.stride(1) != 1]
    buffers = {
        "partial sums": 4 * tile_table.FIELDS * n * parts + 8 * blocks * n,
        "gradient by the logits": n * block_v * itemsize * s.gradient,
        "hidden states": s.hidden_bytes(n),
        "bias gradient": s.bias_bytes(),
        "contiguous copies": sum(tensor.numel() * tensor.dtype.itemsize for tensor in strided),
    }
    if needs_hidden:
        buffers["hidden gradient"] = 4 * n * s.width * (hidden_dtype != torch.float32 or s.compacted)
        buffers["widened weight tile"] = s.upcast_bytes(4096)
    if needs_weight:
        buffers["weight gradient tile"] = separate_bytes(weight_dtype, s.product, block_v, s.width)
    pairs = float(n) * vocabulary
    widths = [side.weight.shape[1] for side in s.sides]
    loss_passes = s.loss_pass + s.mixture_pass
    own = widths[0] * (s.student_sums + loss_passes) + (widths[-1] * (s.teacher_sums + loss_passes) if len(widths) > 1 else 0)
    library = widths[0] * (needs_hidden + needs_weight)
    traffic = pairs * itemsize * (s.gradient + sum(p.needs))
    heads = vocabulary * sum(side.weight.shape[1] * side.weight.dtype.itemsize for side in s.sides)
    traffic += float(heads) * (s.student_sums + loss_passes)
    traffic += 8.0 * n * s.width * needs_hidden * -(-vocabulary // block_v)  # the sum is read and written
    traffic += float(vocabulary) * s.width * weight_dtype.itemsize * needs_weight
    flops = 2 * pairs * (own + library)
    steps = _recompute_steps(s, widths, -(-vocabulary // block_v))
    return GpuPlan("recompute", n, block_v, False, _sizes(buffers), flops, traffic, steps)


def _chunk_steps(
    s: Shapes, pairs: float, chunk: float, chunks: int, logits: list[int], gradient_bytes: int
) -> dict[str, float]:
    p, vocabulary, jsd = s.problem, s.vocabulary, " jsd" * (s.problem.target == "jsd")
    steps: dict[str, float] = {}
    logit_bytes = sum(logits)
    if s.student_sums:
        kernel, read = ("stats_rows", logit_bytes) if s.teacher_sums_of_chunks else ("stats_rows known", logits[0])
        steps["statistics"] = costs.rows_seconds(kernel, s.wide, pairs, pairs * read)
    if s.loss_pass:
        kernel = "loss_rows mixture" if jsd and not s.gradient else "loss_rows" + jsd
        steps["loss"] = costs.rows_seconds(kernel, s.wide, pairs, pairs * (logit_bytes + gradient_bytes))
    if s.mixture_pass:
        steps["mixture"] = costs.rows_seconds("loss_rows mixture", s.wide, pairs, pairs * logit_bytes)
    if s.given:
        return steps
    for name, side in zip(("student", "teacher"), s.sides, strict=False):
        traffic = vocabulary * (4.0 * chunk + side.weight.dtype.itemsize * side.weight.shape[1])
        one = costs.product_seconds(chunk, vocabulary, side.weight.shape[1], s.wide, traffic)
        steps[f"{name}'s logits"] = chunks * one
    operand, weight = chunk * vocabulary * gradient_bytes, float(vocabulary) * s.width * p.student.weight.dtype.itemsize
    if p.needs[0]:
        one = costs.product_seconds(chunk, s.width, vocabulary, s.wide, operand + weight)
        steps["hidden gradient"] = chunks * one
    if p.needs[1]:
        one = costs.product_seconds(vocabulary, s.width, chunk, s.wide, operand + 2 * weight)
        steps["weight gradient"] = chunks * one
    return steps


def _recompute_steps(s: Shapes, widths: list[int], blocks: int) -> dict[str, float]:
    p, n, vocabulary, itemsize = s.problem, max(s.tokens, 1), s.vocabulary, s.product.itemsize
    jsd, part = " jsd" * (p.target == "jsd"), s.vocabulary / blocks
    steps: dict[str, float] = {}
    if s.student_sums:
        tile, one_side = s.stats_tile, len(widths) == 1 or not s.teacher_sums
        kernel, read = ("stats_tiles known", widths[:1]) if one_side else ("stats_tiles", widths)
        size = (tile.block_t, tile.block_v)
        steps["statistics"] = costs.tiles_seconds(kernel, s.wide, n, vocabulary, read, size, 0.0, s.stats_together)
    shape = (s.loss_tile.block_t, s.loss_tile.block_v)
    passes = {"mixture" if s.mixture_pass else "loss": 0.0} if s.loss_pass and (s.mixture_pass or not s.gradient) else {}
    for name, written in (passes | ({"loss": float(itemsize)} if s.gradient else {})).items():
        kernel = "loss_tiles mixture" if jsd and not written else "loss_tiles" + jsd
        steps[name] = blocks * costs.tiles_seconds(kernel, s.wide, n, part, widths, shape, written * n * part, s.together)
    operand, weight = itemsize * n * part, float(part) * s.width * p.student.weight.dtype.itemsize
    if p.needs[0]:
        one = costs.product_seconds(n, s.width, part, s.wide, operand + weight + 8.0 * n * s.width)
        steps["hidden gradient"] = blocks * one
    if p.needs[1]:
        steps["weight gradient"] = blocks * costs.product_seconds(part, s.width, n, s.wide, operand + weight)
    return steps


def _sizes(buffers: dict[str, int]) -> dict[str, int]:
    """Drops the buffers that a plan does not need."""
    return {name: int(size) for name, size in buffers.items() if size}


def describe(op: str, problem: Problem) -> Plan:
    """Returns the plan of a problem, whose tensors may be on the meta device, as ``explain`` shows it; times are an H200's."""
    plan = gpu_plan(problem, "sm_90")
    return Plan(
        op=op,
        name=plan.name,
        tokens_per_chunk=min(plan.rows_per_chunk, problem.tokens),
        buffers=plan.buffers,
        traffic_bytes=int(plan.traffic_bytes),
        flops=plan.flops,
        seconds=plan.seconds,
    )
