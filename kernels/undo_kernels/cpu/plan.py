"""How the C++ backend runs a problem: the plan, its buffers and its predicted time, from shapes and dtypes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from undo_kernels.cpu.extension import kernels
from undo_kernels.cpu.instruction_set import VARIABLE, bfloat16_product, instruction_sets, vector_units
from undo_kernels.plan import Plan
from undo_kernels.problem import DENSE, Problem
from undo_kernels.projection import GivenLogits, Projection

_BLOCK_V = 8192  # vocabulary entries of a tile: fewer make the products slower
_CHUNK = 256  # tokens of a chunk by default where the vocabulary is large
_LOGITS = 64 << 20  # bytes of logits of a chunk by default where the vocabulary is small
# A matrix product over r tokens reaches r / (r + 45) of its best rate: measured 250, 300 and 345 GFLOP/s at 112, 256 and 512
# tokens, 1024 vocabulary entries and width 320, on two cores with AVX-512.
_HALF_TOKENS = 45
_FLOPS_PER_THREAD = {"AVX512": 1.8e11}  # float32, measured; other processors are not predicted


@dataclass(frozen=True)
class CpuPlan:
    """How the C++ backend runs a problem.

    Attributes:
        name: chunk, recompute or one pass.
        tokens_per_chunk: tokens of a chunk, a multiple of the widest vector's lanes unless the chunk holds every token.
        block_v: vocabulary entries of a tile.
        stored: whether a chunk's logits are kept between the passes.
        outer: the outer loop of the last pass: tokens or vocabulary.
        first_pass: whether the log-sum-exps must be computed.
        second_pass: whether the logits are needed again after them.
        accumulator: whether a 16-bit weight's gradient is summed in a float32 buffer.
        upcast_width: columns of the float32 buffer that 16-bit weights are converted into.
        narrow: whether the gradient is rounded to bfloat16 and multiplied in bfloat16.
        buffers: bytes of each buffer, by name; everything beyond inputs, outputs and a few floats per token.
        products: matrix products over ``[tokens, V, d]``, counted at the mean width.
    """

    name: str
    tokens_per_chunk: int
    block_v: int
    stored: bool
    outer: str
    first_pass: bool
    second_pass: bool
    accumulator: bool
    upcast_width: int
    narrow: bool
    buffers: dict[str, int]
    products: float

    @property
    def workspace_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(self.buffers.values())

    def kept_bytes(self, problem: Problem) -> int:
        """Returns the bytes of the tiles of logits, which the thread keeps for its next call."""
        sides = 2 if problem.target in DENSE else 1
        extent = problem.student.widest if self.stored else min(self.block_v, problem.student.widest)
        return 4 * sides * extent * leading(padded(min(self.tokens_per_chunk, problem.tokens)))

    def cost(self) -> float:
        """Returns the time in units of one matrix product over all tokens at its best rate."""
        return self.products * (1 + _HALF_TOKENS / max(self.tokens_per_chunk, 1))


def padded(tokens: int) -> int:
    """Returns ``tokens`` rounded up to whole vectors, at least one."""
    return max(kernels.WIDEST, -(-tokens // kernels.WIDEST) * kernels.WIDEST)


def leading(stride: int) -> int:
    """Returns the distance of a tile's rows in floats: an odd number of cache lines, so that rows do not share a few cache sets."""
    return kernels.WIDEST * (stride // kernels.WIDEST | 1)


def tiled(side: Projection) -> bool:
    """Returns whether a bfloat16 product of ``csrc/`` can compute this head's logits."""
    dtypes = {side.hidden.dtype, side.weight.dtype}
    whole = side.hidden.shape[1] % kernels.PRODUCT_DEPTH == 0
    return not isinstance(side, GivenLogits) and dtypes == {torch.bfloat16} and whole


def products_of(side: Projection, narrow: bool) -> str:
    """Describes how the products of a head are computed, and why; ``narrow`` as in :class:`CpuPlan`."""
    name, dtype = bfloat16_product(), str(side.weight.dtype).removeprefix("torch.")
    if side.weight.dtype == torch.float32:
        return "in float32"
    if name and tiled(side):
        return f"{dtype} by {name} with float32 logits" + ("; the gradient is rounded to bfloat16" if narrow else "")
    if side.weight.dtype == torch.float16 or side.hidden.dtype != side.weight.dtype:
        why = f"hidden states are {str(side.hidden.dtype).removeprefix('torch.')} and only bfloat16 has products of its own"
    elif not name:
        own = [product for product in instruction_sets() if product not in vector_units()]
        why = f"{VARIABLE} says so" if own else "this processor has no bfloat16 product that keeps float32 logits"
    else:
        why = f"{name} takes widths that are multiples of {kernels.PRODUCT_DEPTH}"
    return f"{dtype} converted to float32: {why}"


def cpu_plan(problem: Problem, count: int, native: bool) -> CpuPlan:
    """Returns the fastest plan that fits the workspace for ``count`` counted tokens; ``native``: there is a bfloat16 product.

    Raises:
        ValueError: no plan fits ``workspace_bytes``, or ``plan`` names none.
    """
    if problem.plan not in ("auto", "chunk", "recompute"):
        raise ValueError(f"plan: got {problem.plan!r}, wanted auto, direct, chunk or recompute")
    budget = problem.workspace_bytes
    plans = []
    for stored in {"auto": (True, False), "chunk": (True,), "recompute": (False,)}[problem.plan]:
        for block_v in (_BLOCK_V, 1024, kernels.BLOCK):
            plan = _widest(problem, count, native, stored, block_v, budget)
            if plan is not None and (budget is None or plan.workspace_bytes <= budget):
                plans.append(plan)
                break
    if plans:
        return min(plans, key=CpuPlan.cost)
    if problem.shard is not None and problem.plan == "chunk":
        raise ValueError(
            "plan: got 'chunk', wanted 'auto' or 'recompute': the logits of all tokens do not fit the workspace, and a head that is "
            "sharded by vocabulary entries has one chunk"
        )
    least = _cpu_plan(problem, count, native, problem.plan == "chunk", kernels.BLOCK, kernels.WIDEST)
    raise ValueError(f"workspace_bytes: got {budget}, wanted at least {least.workspace_bytes} for these shapes")


def _widest(problem: Problem, count: int, native: bool, stored: bool, block_v: int, budget: int | None) -> CpuPlan | None:
    """Returns the plan with as many tokens per chunk as fit the workspace, at most the default's number."""
    vocabulary = max(problem.student.widest, 1)  # so that all processes that share a head choose alike
    most = max(_CHUNK, _LOGITS // (8 * vocabulary)) if budget is None else count
    tokens = min(padded(most if stored else 2 * _CHUNK), padded(count))
    if stored and problem.shard is not None and tokens < count:  # processes exchange once, between the passes of all tokens
        return None
    while tokens >= kernels.WIDEST:
        plan = _cpu_plan(problem, count, native, stored, block_v, tokens)
        if budget is None or plan.workspace_bytes <= budget:
            # Chunks of one size: the last one is not a remainder of a few tokens.
            even = padded(-(-count // max(1, -(-count // tokens))))
            return _cpu_plan(problem, count, native, stored, block_v, min(tokens, even))
        if stored and problem.shard is not None:
            return None
        over = plan.workspace_bytes - budget
        tokens -= max(kernels.WIDEST, over // (16 * vocabulary) // kernels.WIDEST * kernels.WIDEST)
    return None


def _cpu_plan(problem: Problem, count: int, native: bool, keep: bool, block_v: int, tokens: int) -> CpuPlan:
    p = problem
    dense = p.target in DENSE
    sides: list[Projection] = [p.student] + ([p.teacher] if dense else [])
    vocabulary = max(p.student.widest, 1)
    block_v = min(block_v, vocabulary)
    # The difference of two log-sum-exps that were rounded to float32 is not exact: a dense target computes it again.
    known = p.lse_s is not None and p.target in ("own", "uniform")
    second_pass = any(p.needs) or dense or p.target == "uniform"
    stored = keep and not known and second_pass
    outer = "vocabulary" if second_pass and not stored else "tokens"
    chunks = max(1, -(-count // tokens))
    linear = [side for side in sides if not isinstance(side, GivenLogits)]
    narrow = (
        stored and native and any(p.needs) and tiled(p.student) and p.shard is None
    )  # else parts are summed before rounding
    widened = [side for side in linear if side.weight.dtype != torch.float32 and not (native and tiled(side))]
    if native and tiled(p.student) and p.needs[0] and not narrow:
        widened.append(p.student)
    upcast_width = max((side.weight.shape[1] for side in widened), default=0)
    narrow_gradient = p.needs[1] and p.student.weight.dtype == torch.bfloat16
    accumulator = narrow_gradient and outer == "tokens" and chunks > 8
    held = tokens * (chunks if outer == "vocabulary" else 1)
    width = p.student.weight.shape[1] if linear else 0
    copied = [side for side in linear if side.hidden.dtype != torch.float32 or p.counted is not None or tokens % kernels.WIDEST]
    packed = [side for side in linear if native and tiled(side)]
    biases = [side.weight.shape[0] for side in sides if side.bias is not None and side.bias.dtype != torch.float32]
    floats = {
        "logits": len(sides) * (vocabulary if stored else block_v) * leading(tokens),
        "gathered logits": len(sides) * block_v * tokens if len(linear) < len(sides) else 0,
        "partial sums": 2 * -(-block_v // kernels.BLOCK) * kernels.FIELDS * tokens,
        "widened weight tile": block_v * upcast_width,
        "widened biases": sum(biases),
        "hidden states": held * sum(side.hidden.shape[1] for side in copied),
        "packed hidden states": sum(held * side.hidden.shape[1] // 2 for side in packed),
        "hidden gradient": held * width if p.needs[0] else 0,
        "hidden gradient of one process": p.tokens * width if p.needs[0] and p.shard is not None and linear else 0,
        "weight gradient tile": block_v * width if narrow_gradient else 0,
        "weight gradient sum": vocabulary * width if accumulator else 0,
        "rounded gradient": (block_v * tokens + held * 2 * width) // 2 if narrow else 0,
    }
    buffers = {name: 4 * count for name, count in floats.items() if count}
    passes = (not known) + (second_pass and not stored) + (p.target == "jsd" and not stored and any(p.needs))
    return CpuPlan(
        name="chunk" if stored else "recompute" if second_pass and not known else "one pass",
        tokens_per_chunk=tokens,
        block_v=block_v,
        stored=stored,
        outer=outer,
        first_pass=not known,
        second_pass=second_pass,
        accumulator=accumulator,
        upcast_width=upcast_width,
        narrow=narrow,
        buffers=buffers,
        products=passes * len(linear) + (p.needs[0] + p.needs[1]) * bool(linear),
    )


def describe(op: str, problem: Problem) -> Plan:
    """Returns the plan of a problem, whose tensors may be on the meta device, as ``explain`` shows it."""
    sides = [problem.student] + ([problem.teacher] if problem.teacher is not None else [])
    tokens, vocabulary = problem.tokens, problem.student.vocabulary
    plan = cpu_plan(problem, tokens, bool(bfloat16_product()))
    chunks = max(1, math.ceil(tokens / plan.tokens_per_chunk))
    passes = plan.first_pass + plan.second_pass
    # Logits that are not stored between the passes stay in a cache.
    logits = 12 * len(sides) * tokens * vocabulary + 8 * tokens * vocabulary * any(problem.needs) if plan.stored else 0
    heads = sum(side.weight.numel() * side.weight.element_size() for side in sides)
    weights = heads * (1 if plan.outer == "vocabulary" else chunks) * (passes if not plan.stored else 1)
    product = 2.0 * tokens * vocabulary * sum(side.weight.shape[1] for side in sides) / len(sides)
    rate = _FLOPS_PER_THREAD.get(torch.backends.cpu.get_cpu_capability())
    return Plan(
        op=op,
        name=plan.name,
        tokens_per_chunk=min(plan.tokens_per_chunk, tokens),
        buffers=plan.buffers,
        traffic_bytes=int(logits + weights),
        flops=plan.products * product,
        seconds=None if rate is None else plan.cost() * product / (rate * torch.get_num_threads()),
        products=products_of(problem.student, plan.narrow),
    )
