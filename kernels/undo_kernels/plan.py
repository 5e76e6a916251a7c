"""Plans: how an op runs on given shapes, with its predicted bytes, FLOPs, time and workspace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from undo_kernels.problem import DENSE, Problem
from undo_kernels.projection import GivenLogits, Projection
from undo_kernels.reference.losses import CHUNKED, COPIES, rows_within

LANES = 16  # tokens of the widest vector; chunks are padded to a multiple
_FIELDS, _BLOCK = 12, 128  # of csrc/losses.h: doubles of state a token, rows of a partial sum
_BLOCK_V = 8192  # vocabulary rows of a tile: fewer make the products slower
_ROWS = 256  # tokens of a chunk by default where the vocabulary is large
_LOGITS = 64 << 20  # bytes of logits of a chunk by default where the vocabulary is small
# A matrix product over r tokens reaches r / (r + 45) of its best rate: measured 250, 300 and 345 GFLOP/s at 112, 256 and 512
# tokens, 1024 vocabulary rows and width 320, on two cores with AVX-512.
_HALF_ROWS = 45
_FLOPS_PER_THREAD = {"AVX512": 1.8e11}  # float32, measured; other processors are not predicted
# Plain PyTorch is faster below so many (token, vocabulary row) pairs, and below so many vocabulary rows, than each backend. For
# C++ measured on one core with AVX-512: 128 tokens by 1000 rows are even, 8192 by 17 are faster in PyTorch, 8192 by 100 are not.
_DIRECT = {"cpu": (1 << 17, 64), "triton": (1 << 19, 512)}


@dataclass(frozen=True)
class Plan:
    """How an op would run. ``print`` shows it as a table.

    Attributes:
        op: name of the op.
        name: of the plan; ``direct`` is plain PyTorch, ``chunk`` keeps a chunk's logits between two passes, ``recompute`` and ``one pass`` none.
        rows_per_chunk: tokens whose logits are held at once.
        workspace_bytes: everything beyond inputs, outputs and a few floats a token.
        traffic_bytes: read and written, forward and backward.
        flops: of the matrix products, forward and backward.
        seconds: predicted time; None where no rates are known for the device.
    """

    op: str
    name: str
    rows_per_chunk: int
    workspace_bytes: int
    traffic_bytes: int
    flops: float
    seconds: float | None

    def __str__(self) -> str:
        time = "unknown for this device" if self.seconds is None else f"{self.seconds * 1e3:.2f} ms"
        lines = [
            ("op", self.op),
            ("plan", self.name),
            ("rows per chunk", f"{self.rows_per_chunk:,}"),
            ("workspace", f"{self.workspace_bytes / 2**20:,.1f} MiB"),
            ("memory traffic", f"{self.traffic_bytes / 2**20:,.1f} MiB"),
            ("matrix products", f"{self.flops / 1e9:,.2f} GFLOP"),
            ("time", time),
        ]
        return "\n".join(f"{name:<16} {value}" for name, value in lines)


@dataclass(frozen=True)
class CpuPlan:
    """How the C++ backend runs a problem.

    Attributes:
        name: chunk, recompute or one pass.
        rows_per_chunk: tokens of a chunk, a multiple of ``LANES`` unless it holds every token.
        block_v: vocabulary rows of a tile.
        stored: whether a chunk's logits stay between the passes.
        outer: which loop is outside in the last pass, rows or vocabulary.
        first_pass: whether the log-sum-exps must be found.
        second_pass: whether the logits are needed again after them.
        accumulator: whether a 16-bit weight's gradient is summed in a float32 buffer.
        upcast_width: columns of the buffer that 16-bit weights are widened into.
        narrow: whether the gradient's products are bfloat16's own, of a gradient rounded to it.
        workspace_bytes: everything beyond inputs, outputs and a few floats a token.
        products: matrix products over ``[tokens, V, d]``, counted at the mean width.
    """

    name: str
    rows_per_chunk: int
    block_v: int
    stored: bool
    outer: str
    first_pass: bool
    second_pass: bool
    accumulator: bool
    upcast_width: int
    narrow: bool
    workspace_bytes: int
    products: float

    def kept_bytes(self, problem: Problem) -> int:
        """The part of the workspace that holds the tiles of logits, which the thread keeps."""
        sides = 2 if problem.target in DENSE else 1
        extent = problem.student.vocabulary if self.stored else min(self.block_v, problem.student.vocabulary)
        return 4 * sides * extent * leading(padded(min(self.rows_per_chunk, problem.rows)))

    def cost(self) -> float:
        """Time in units of one matrix product over every token at its best rate."""
        return self.products * (1 + _HALF_ROWS / max(self.rows_per_chunk, 1))


def padded(rows: int) -> int:
    """``rows`` up to whole vectors, at least one."""
    return max(LANES, -(-rows // LANES) * LANES)


def prefers_direct(rows: int, vocabulary: int, backend: str) -> bool:
    """Returns whether plain PyTorch is as fast as ``backend``, because the logits are few."""
    if backend not in _DIRECT:
        return False
    fewest_pairs, fewest_rows = _DIRECT[backend]
    return vocabulary < fewest_rows or rows * vocabulary < fewest_pairs


def leading(stride: int) -> int:
    """Floats from one vocabulary row of a tile to the next: an odd number of cache lines, or the rows would share a few sets."""
    return LANES * (stride // LANES | 1)


def tiled(side: Projection) -> bool:
    """Whether AMX tiles can take this head's product."""
    dtypes = {side.hidden.dtype, side.weight.dtype}
    return not isinstance(side, GivenLogits) and dtypes == {torch.bfloat16} and side.hidden.shape[1] % 32 == 0


def cpu_plan(problem: Problem, count: int, amx: bool) -> CpuPlan:
    """The fastest plan of the C++ backend that fits the workspace, for ``count`` counted rows; ``amx``: there are tiles.

    Raises:
        ValueError: no plan fits ``workspace_bytes``, or ``plan`` names none.
    """
    if problem.plan not in ("auto", "chunk", "recompute"):
        raise ValueError(f"plan: got {problem.plan!r}, wanted auto, direct, chunk or recompute")
    budget = problem.workspace_bytes
    plans = []
    for stored in {"auto": (True, False), "chunk": (True,), "recompute": (False,)}[problem.plan]:
        for block_v in (1024, _BLOCK) if problem.filter_below else (_BLOCK_V, 1024, _BLOCK):  # the filter works on tiles
            plan = _widest(problem, count, amx, stored, block_v, budget)
            if plan is not None and (budget is None or plan.workspace_bytes <= budget):
                plans.append(plan)
                break
    if plans:
        return min(plans, key=CpuPlan.cost)
    least = _cpu_plan(problem, count, amx, problem.plan == "chunk", _BLOCK, LANES)
    raise ValueError(f"workspace_bytes: got {budget}, wanted at least {least.workspace_bytes} for these shapes")


def _widest(problem: Problem, count: int, amx: bool, stored: bool, block_v: int, budget: int | None) -> CpuPlan | None:
    """The plan with as many tokens a chunk as the workspace holds, at most the default's."""
    vocabulary = problem.student.vocabulary
    most = max(_ROWS, _LOGITS // (8 * vocabulary)) if budget is None else count
    rows = min(padded(most if stored else 2 * _ROWS), padded(count))
    while rows >= LANES:
        plan = _cpu_plan(problem, count, amx, stored, block_v, rows)
        if budget is None or plan.workspace_bytes <= budget:
            # Chunks of one size: the last one is not a remainder of a few tokens.
            even = padded(-(-count // max(1, -(-count // rows))))
            return _cpu_plan(problem, count, amx, stored, block_v, min(rows, even))
        over = plan.workspace_bytes - budget
        rows -= max(LANES, over // (16 * vocabulary) // LANES * LANES)
    return None


def _cpu_plan(problem: Problem, count: int, amx: bool, keep: bool, block_v: int, rows: int) -> CpuPlan:
    p = problem
    dense = p.target in DENSE
    sides: list[Projection] = [p.student] + ([p.teacher] if dense else [])
    vocabulary = p.student.vocabulary
    block_v = min(block_v, vocabulary)
    # Of two known log-sum-exps in float32 the difference is not known: a dense target finds it again, from the same products.
    known = p.lse_s is not None and p.target in ("own", "uniform")
    second_pass = any(p.needs) or dense or p.target == "uniform"
    stored = keep and not known and second_pass
    outer = "vocabulary" if second_pass and not stored else "rows"
    chunks = max(1, -(-count // rows))
    linear = [side for side in sides if not isinstance(side, GivenLogits)]
    narrow = stored and amx and any(p.needs) and tiled(p.student)
    widened = [side for side in linear if side.weight.dtype != torch.float32 and not (amx and tiled(side))]
    if amx and tiled(p.student) and p.needs[0] and not narrow:
        widened.append(p.student)
    upcast_width = max((side.weight.shape[1] for side in widened), default=0)
    narrow_gradient = p.needs[1] and p.student.weight.dtype == torch.bfloat16
    accumulator = narrow_gradient and outer == "rows" and chunks > 8
    held = rows * (chunks if outer == "vocabulary" else 1)
    width = p.student.weight.shape[1] if linear else 0
    copied = [side for side in linear if side.hidden.dtype != torch.float32 or p.counted is not None or rows % LANES]
    floats = len(sides) * (vocabulary if stored else block_v) * leading(rows)
    floats += block_v * upcast_width
    floats += 2 * -(-block_v // _BLOCK) * _FIELDS * rows
    floats += held * (sum(side.hidden.shape[1] for side in copied) + (width if p.needs[0] else 0))
    floats += block_v * width if narrow_gradient else 0
    floats += vocabulary * width if accumulator else 0
    floats += (block_v * rows + held * 2 * width) // 2 if narrow else 0
    floats += sum(held * side.hidden.shape[1] // 2 for side in linear if amx and tiled(side))
    floats += sum(side.weight.shape[0] for side in sides if side.bias is not None and side.bias.dtype != torch.float32)
    if len(linear) < len(sides):
        floats += len(sides) * block_v * rows  # gathered logits
    passes = (not known) + (second_pass and not stored) + (p.target == "jsd" and not stored and any(p.needs))
    products = passes * len(linear) + (p.needs[0] + p.needs[1]) * bool(linear)
    name = "chunk" if stored else "recompute" if second_pass and not known else "one pass"
    return CpuPlan(
        name, rows, block_v, stored, outer, not known, second_pass, accumulator, upcast_width,
        narrow, 4 * floats, products,
    )  # fmt: skip


def describe(op: str, problem: Problem, backend: str) -> Plan:
    """The plan of ``problem``, whose tensors may be on the meta device, on ``backend``."""
    sides = [problem.student] + ([problem.teacher] if problem.teacher is not None else [])
    rows, vocabulary = problem.rows, problem.student.vocabulary
    itemsize = 8 if problem.student.hidden.dtype == torch.float64 else 4
    widths = [side.weight.shape[1] for side in sides]
    width = sum(widths) / len(widths)
    heads = sum(side.weight.numel() * side.weight.element_size() for side in sides)
    product = 2.0 * rows * vocabulary * width
    if backend == "triton":
        from undo_kernels.triton import costs

        return costs.describe(op, problem)
    if backend == "cpu":
        from undo_kernels.cpu.instruction_set import has_amx

        plan = cpu_plan(problem, rows, has_amx())
        chunks = max(1, math.ceil(rows / plan.rows_per_chunk))
        passes = plan.first_pass + plan.second_pass
        # Logits that do not stay between the passes live and die in a cache.
        logits = 12 * len(sides) * rows * vocabulary + 8 * rows * vocabulary * any(problem.needs) if plan.stored else 0
        weights = heads * (1 if plan.outer == "vocabulary" else chunks) * (passes if not plan.stored else 1)
        rate = _FLOPS_PER_THREAD.get(torch.backends.cpu.get_cpu_capability())
        seconds = None if rate is None else plan.cost() * product / (rate * torch.get_num_threads())
        return Plan(
            op, plan.name, min(plan.rows_per_chunk, rows), plan.workspace_bytes, int(logits + weights),
            plan.products * product, seconds,
        )  # fmt: skip
    copies = COPIES[problem.target]
    chunk = rows_within(problem.workspace_bytes, rows, vocabulary, problem.student.hidden.dtype, copies)
    chunks = math.ceil(rows / chunk) if rows else 1
    products = len(sides) * (2 if chunks > 1 and any(problem.needs) else 1) + sum(problem.needs[:2])
    return Plan(
        op, "direct" if chunks == 1 else CHUNKED, chunk, chunk * vocabulary * itemsize * copies,
        int(3 * copies * rows * vocabulary * itemsize + 2 * chunks * heads), products * product, None,
    )  # fmt: skip
