"""State shared by the passes of one call: the tokens processed, their inputs and outputs, and the gradients.

float16 products take their gradient times a power of two, found on the device from the factors of the tokens and divided out of
the float32 results: at a KL of 1e-6 the gradient's entries are below float16's subnormals. Those of reverse KL have no bound;
they keep room for 128 times the factor and saturate there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undo_kernels.problem import DENSE, Problem, Result, gradient_dtype
from undo_kernels.projection import GivenLogits, Projection
from undo_kernels.triton import arguments, combine, tile_table
from undo_kernels.triton.arguments import Combined, Known, LossForm, Split, StatsForm, Sums, Weights
from undo_kernels.triton.math import CUDA, EXACT, LN2, LOG2E, PORTABLE, SIMULATED
from undo_kernels.triton.pair_math import FORWARD, JSD, OWN, REVERSE
from undo_kernels.triton.plan import GpuPlan, gpu_plan
from undo_kernels.triton.products import Workspace, multiply, product_dtype
from undo_kernels.triton.shapes import Shapes
from undo_kernels.triton.sharded import exchanged

FUSED = {"enable_fp_fusion": True}  # explicit, because Triton's default changes between versions
OUTPUTS = ("divergence", "nll", "lse_s", "lse_t", "entropy", "agreement")
BASES = ("base_s", "base_t", "log_sum_s", "log_sum_t", "gap", "offset")  # inputs of the loss kernels, one value per token
_EXTREME = 0.05  # weight of a side in jsd below which its short form would lose the loss's relative error
_TARGETS = {"uniform": FORWARD.value, "forward": FORWARD.value, "reverse": REVERSE.value, "jsd": JSD.value}


def math_of(target: str, exact: bool) -> int:
    """Returns how a target computes exponentials and reciprocals."""
    if exact:
        return EXACT.value
    if target == tile_table.INTERPRETER:
        return SIMULATED.value
    return CUDA.value if target.startswith("sm_") else PORTABLE.value


class Head:
    """Student or teacher: its tensors and options in the form that the kernels take; see ``pair_math.py``."""

    def __init__(self, side: Projection, math: int, maxima: bool) -> None:
        self.side = side
        self.given = isinstance(side, GivenLogits)
        self.hidden, self.weight = side.hidden, side.weight
        self.product = product_dtype(side.hidden, side.weight)
        self.capped = side.softcap is not None
        self.gain = side.scale / side.temperature
        self.cap = side.softcap / side.temperature if self.capped else 0.0
        inner, outer = side.scale / side.softcap if self.capped else 1.0, self.cap or self.gain
        self.outer = float(outer if math == EXACT.value else outer * LOG2E.value)
        bounded = math != EXACT.value and self.capped and not maxima
        self.has_bias = side.bias is not None
        self.bias = side.bias.contiguous() if self.has_bias else side.hidden
        flags = (self.has_bias, self.capped, bounded, math)
        self.shape = (float(inner), self.outer, *map(tl.constexpr, flags))

    def logits(self, z: torch.Tensor) -> arguments.Logits:
        """Returns stored logits as the kernels take them."""
        return arguments.Logits(z, self.bias, z.stride(0), *self.shape)

    def matrices(self, hidden: torch.Tensor, weight: torch.Tensor, block_d: int, together: bool) -> arguments.Head:
        """Returns the operands of the products as the kernels take them."""
        width = hidden.shape[1]
        operands = (hidden, weight, self.bias, width, hidden.stride(0), weight.stride(0))
        return arguments.Head(*operands, *self.shape, tl.constexpr(width % block_d == 0), tl.constexpr(together))


class Run:
    """One call: the inputs, outputs and options shared by its passes; ``target`` is the device's unless it is given."""

    def __init__(self, problem: Problem, scratch: Workspace, target: str | None = None) -> None:
        p = self.problem = problem
        self.scratch, self.device = scratch, p.student.hidden.device
        self.target = target or tile_table.target_of(self.device)
        self.shapes = s = Shapes(p, self.target)
        self.plan: GpuPlan = gpu_plan(p, self.target)
        self.n, self.vocabulary = s.tokens, p.student.vocabulary
        self.math = math_of(self.target, s.exact)
        self.fast = self.math != EXACT.value
        self.student = Head(p.student, self.math, p.statistics)
        self.teacher = Head(p.teacher, self.math, p.statistics) if s.dense else None
        self.same = self.teacher is not None and self.student.shape[:2] == self.teacher.shape[:2]
        self.code = _TARGETS.get(p.target, OWN.value)
        self.uniform, self.pair = p.target == "uniform", p.target in (*DENSE, "uniform")
        self.nll, self.labelled = p.label_factor is not None, p.label_factor is not None and p.labels is not None
        self._select()
        self._tokens()
        self._gradients()

    def _select(self) -> None:
        """Chooses the tokens to process: all, all but the masked ones, or the counted ones gathered in their order.

        The kernels take them as 0 (does not count), 1 (counts) or 2 (counts, but the teacher's given logits are not read).
        """
        p, count = self.problem, self.problem.tokens
        self.index = self.place = self.live = None
        if not self.shapes.compacted:
            self.live = p.counted
        else:
            position = p.counted.long().cumsum(0) - 1
            target = torch.where(p.counted & (position < self.n), position, self.n)
            tokens = torch.arange(count, device=self.device)
            index = torch.zeros(self.n + 1, dtype=torch.int64, device=self.device).scatter_(0, target, tokens)[: self.n]
            self.live = torch.arange(self.n, device=self.device) < p.counted.sum()
            self.index = torch.where(self.live, index, 0)
            self.place = torch.where(self.live, index, count)  # unused places point to an extra token, which is dropped
        self.masked = self.live is not None
        self.counted = self.live.to(torch.uint8) if self.masked else torch.ones(1, dtype=torch.uint8, device=self.device)
        if self.masked and p.unseen is not None:
            self.counted += self.live & p.unseen

    def _take(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        return tensor.contiguous() if self.index is None else tensor.index_select(0, self.index)

    def _tokens(self) -> None:
        """Collects the inputs of the tokens and allocates their outputs."""
        p, n = self.problem, self.n
        self.zero = torch.zeros(1, device=self.device)
        self.per_token = {name: self.zero.new_zeros(n) for name in (*OUTPUTS, *BASES)}
        self.whole_labels = self.labels = self._take(p.labels) if self.labelled else None
        self.label_z = torch.full((n,), torch.nan, device=self.device) if self.labelled else self.zero
        self.known_s, self.known_t = self._take(p.lse_s), self._take(p.lse_t)
        self.indices, self.logprobs = self._take(p.indices), self._take(p.logprobs)
        self.whole_indices = self.indices
        if p.shard is not None:  # the kernels count from this process's first entry
            self.labels, self.indices = (
                None if t is None else p.shard.local(t, self.vocabulary) for t in (self.labels, self.indices)
            )
        self.scale = None
        self.factor = self.own = self.at_label = self.zero
        if not self.shapes.gradient:
            return
        factor = self._take(p.factor).float() * self.student.gain
        own = self._take(p.label_factor).float() * self.student.gain if self.nll else torch.zeros_like(factor)
        if not self.student.given and self.student.product == torch.float16:
            bound = (factor.abs() + own.abs()) if not self.masked else torch.where(self.live, factor.abs() + own.abs(), 0.0)
            bound = bound.amax() if n else self.zero[0]
            room = 2.0**9 if p.target == "reverse" else 2.0**15
            self.scale = torch.exp2(torch.floor(torch.log2(room / bound.clamp(1e-30, 1e30))) + 0 * bound)
            factor, own = factor * self.scale, own * self.scale
        self.factor, self.own = factor, own

    def _gradients(self) -> None:
        p, n = self.problem, self.n
        new = self.zero.new_empty
        needs_hidden, needs_weight, needs_bias = p.needs
        hidden, weight = p.student.hidden, p.student.weight
        self.d_hidden = self.d_weight = self.d_bias = new(0)
        if self.student.given:
            self.given = hidden if hidden.stride(1) == 1 else self.scratch.count(hidden.contiguous())
            if needs_hidden:
                self.d_hidden = self.given if p.inplace else new(hidden.shape, dtype=gradient_dtype(hidden.dtype))
        elif needs_hidden:
            dtype = gradient_dtype(hidden.dtype) if p.shard is None else torch.float32
            extra = self.index is not None
            self.d_hidden = (self.zero.new_zeros if extra else new)((p.tokens + extra, hidden.shape[1]), dtype=dtype)
        if needs_weight:
            self.d_weight = p.earlier
            if not self.adds:
                self.d_weight = new(weight.shape, dtype=gradient_dtype(weight.dtype))
                self.d_weight[self.vocabulary if n else 0 :].zero_()
        if needs_bias:
            self.d_bias = self.scratch.take(p.student.bias.shape[0]).zero_()

    def result(self) -> Result:
        """Returns the result, after the passes of the plan."""
        p, out = self.problem, self.per_token
        if self.scale is not None:
            for gradient in (self.d_hidden, self.d_weight, self.d_bias):
                gradient.div_(self.scale)
        if p.shard is not None and p.needs[0]:
            self._sum_hidden_gradient()
        if self.index is not None:
            spread = self.zero.new_zeros(len(OUTPUTS), p.tokens + 1)
            spread.index_copy_(1, self.place, torch.stack([out[name] for name in OUTPUTS]))
            out = {name: values[: p.tokens].clone() for name, values in zip(OUTPUTS, spread, strict=True)}
            self.d_hidden = self.d_hidden[: p.tokens]
        if self.student.given and p.inplace and p.needs[0] and self.given is not p.student.hidden:
            self.d_hidden = p.student.hidden.copy_(self.given)
        none = self.zero.new_empty(0)
        total = _weighted(p.factor, out["divergence"], p.counted)
        if self.nll:
            total = total + _weighted(p.label_factor, out["nll"], p.counted)
        return Result(
            total=total.float(),
            divergence=out["divergence"],
            nll=out["nll"] if self.nll else none,
            lse_s=out["lse_s"],
            lse_t=out["lse_t"] if self.shapes.dense else none,
            teacher_entropy=out["entropy"] if p.statistics else none,
            top1_agreement=out["agreement"] if p.statistics else none,
            d_hidden=self.d_hidden,
            d_weight=self.d_weight,
            d_bias=self.d_bias.to(gradient_dtype(p.student.bias.dtype)) if p.needs[2] else self.d_bias,
        )

    def hidden(self, head: Head, part: slice, clear: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns hidden states of some tokens in the product's dtype, and the copy if tokens had to be moved, cleared or cast.

        Tokens that do not count are cleared because their gradient is 0, and 0 * NaN would reach d_weight.
        """
        clear = clear and self.masked
        if self.index is not None:
            taken = head.hidden.index_select(0, self.index[part]).to(head.product)
            if clear:
                taken.masked_fill_(~self.live[part, None], 0.0)
        elif clear:
            taken = torch.where(self.live[part, None], head.hidden[part], 0.0).to(head.product)
        elif head.hidden.dtype != head.product:
            taken = head.hidden[part].to(head.product)
        else:
            return head.hidden[part], None
        return taken, self.scratch.count(taken)

    def _sum_hidden_gradient(self) -> None:
        """Sums the gradient of the hidden states over the processes that share the head, before it is rounded."""
        part = self.d_hidden if self.index is None else self.d_hidden.index_select(0, self.place)
        if self.n:
            self.problem.shard.sum_(part)
        if self.index is not None:
            self.d_hidden.index_copy_(0, self.place, part)
        self.d_hidden = self.d_hidden.to(gradient_dtype(self.problem.student.hidden.dtype))

    def over_processes(self, losses: torch.Tensor) -> torch.Tensor:
        """Sums losses ``[1 or 2, tokens]`` over the processes that share the head, where each has those of its own entries."""
        p = self.problem
        wanted = p.shard is not None and not (p.repeated and len(losses) == 1)
        return p.shard.sum_(losses) if wanted else losses

    def combine(
        self,
        partial: torch.Tensor,
        part: slice,
        parts: int,
        lse_s: torch.Tensor,
        teacher: bool,
        tiles: bool,
        picked: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Computes log-sum-exps, their difference, reverse KL's offset and the nll; ``teacher``: there are sums of it.

        Returns ``picked``, the logits at the known entries, with those that other processes hold.
        """
        s, p, out, zero = self.shapes, self.problem, self.per_token, self.zero
        exchange = p.shard is not None and s.student_sums
        if exchange:
            witness = p.shard.witness(p.student.hidden)
            witness = (witness if self.index is None else witness[:, self.index])[:, part]
            partial, merged = exchanged(
                p.shard, partial[:, : lse_s.shape[0]], witness, teacher=teacher, cross=self.crossed,
                statistics=p.statistics and s.dense, less_one=tiles and not self.fast, differences=not (tiles or self.fast),
                unit=LN2.value if self.fast else 1.0,
                label=torch.where(self.labels[part] >= 0, self.label_z[part], torch.nan) if self.labelled else None,
                picked=None if picked is None else torch.where(self.indices[part] >= 0, picked, 0.0),
            )  # fmt: skip
            parts, picked = 1, merged.get("picked", picked)
            if self.labelled:
                inside = self.whole_labels[part] < p.student.entries
                self.label_z[part] = torch.where(inside, merged["label"], torch.nan).float()
        split = Split(partial, p.student.entries, 0, parts, partial.shape[1] * partial.shape[2])
        known = Known(
            self.counted[part] if self.masked else self.counted, self.whole_labels[part] if self.labelled else zero,
            part_or(self.label_z, part, zero), part_or(self.known_s, part, zero), part_or(self.known_t, part, zero),
        )  # fmt: skip
        outputs = Combined(lse_s, out["lse_t"][part], out["nll"][part], out["entropy"][part], out["agreement"][part])
        form = StatsForm(
            STUDENT=s.student_sums, TEACHER=teacher, CROSS=self.crossed, STATISTICS=p.statistics and s.dense,
            DIFFERENCES=teacher and (exchange or not (tiles or self.fast)), FAST=self.fast, LESS_ONE=tiles and not self.fast,
            PAIR=self.pair, UNIFORM=self.uniform,
            NLL=self.nll and not s.sparse, LABELS=self.labelled, MASKED=self.masked,
        )  # fmt: skip
        combine.combine_rows[(lse_s.shape[0],)](
            split, known, self.sums(part), outputs, StatsForm(*map(tl.constexpr, form)),
            BLOCK_P=triton.next_power_of_2(parts), num_warps=1, **FUSED,
        )  # fmt: skip
        return picked

    def sums(self, part: slice) -> Sums:
        """Returns the statistics of some tokens, as the kernels take them."""
        return Sums(*(self.per_token[name][part] for name in BASES))

    def weights(self, part: slice, own: torch.Tensor, at_label: torch.Tensor) -> Weights:
        """Returns the factors of some tokens' gradients, as the kernels take them."""
        p, labels = self.problem, self.labels[part] if self.labelled else self.zero
        factor = part_or(self.factor, part, self.zero)
        return Weights(factor, own, at_label, labels, p.beta, 1.0 - p.beta)

    def loss_form(self, gradient: bool, mixed: bool) -> LossForm:
        """Returns what a launch of a loss kernel computes; ``mixed``: it adds a multiple of the student's probabilities."""
        flags = (
            self.uniform,
            self.same,
            self.code == JSD.value and min(self.problem.beta, 1.0 - self.problem.beta) < _EXTREME,
            gradient,
            mixed and gradient,
            self.labelled and gradient,
            self.masked,
        )
        return LossForm(tl.constexpr(self.code), *map(tl.constexpr, flags))

    @property
    def adds(self) -> bool:
        """Whether the weight's gradient is added to an earlier one."""
        return self.problem.earlier is not None

    @property
    def crossed(self) -> bool:
        return self.problem.target == "reverse" and self.shapes.gradient

    def label_gradient(self, part: slice) -> torch.Tensor:
        """Returns the nll's gradient at each token's label, before the softcap's derivative: p - 1, without cancellation."""
        if not (self.labelled and self.shapes.gradient):
            return self.zero
        return (self.own[part].double() * torch.expm1(-self.per_token["nll"][part].double())).float()

    def put_divergence(self, part: slice, value: torch.Tensor) -> None:
        self.per_token["divergence"][part] = value if not self.masked else torch.where(self.live[part], value, 0.0)

    def products_of_gradient(self, dz: torch.Tensor, hidden: torch.Tensor, part: slice, sums: torch.Tensor, add: bool) -> None:
        """Computes ``d_weight (+)= dz.T @ hidden`` and adds to d_bias, of ``dz[tokens, part of the vocabulary]``."""
        if self.problem.needs[1]:
            multiply(sums[part], dz.T, hidden, add, self.scratch)
        if self.problem.needs[2]:
            self.d_bias[part] += dz.sum(0, dtype=torch.float32)


def part_or(tensor: torch.Tensor | None, part: slice, otherwise: torch.Tensor) -> torch.Tensor:
    """Returns the part of a tensor, or ``otherwise`` where there is none."""
    return otherwise if tensor is None or tensor is otherwise else tensor[part]


def _weighted(factor: torch.Tensor, values: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Returns the sum of factor times value over counted tokens, in float64; tokens of factor 0 are ignored, even if NaN."""
    terms = torch.where(factor == 0, 0.0, factor.double() * values.double())
    return (terms if counted is None else torch.where(counted, terms, 0.0)).sum()
