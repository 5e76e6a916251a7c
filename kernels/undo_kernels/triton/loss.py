"""The vocabulary losses on GPUs: drivers of the two plans, see plan.py for their bytes and FLOPs.

chunk      for each chunk of rows: library products into float32 logits; statistics; the gradient written over the student's
           logits (float32) or beside them (16-bit); library products into d_hidden and d_weight.
recompute  statistics without logits; then for each block of the vocabulary, outermost: the gradient of all rows from recomputed
           tiles, and library products. Each row of d_weight is written once; d_hidden is summed in float32.

Given logits are one chunk whose products exist. Nothing here waits for the device.

float16 products take their gradient times a power of two, found on the device from the rows' factors and divided out of the
float32 results: at a KL of 1e-6 its entries are below float16's subnormals. Reverse KL's entries have no bound; they keep room
for 128 times the factor and saturate there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from undo_kernels.library import register
from undo_kernels.problem import DENSE, Problem, Result, gradient_dtype
from undo_kernels.projection import GivenLogits, Projection
from undo_kernels.record import Call, record, recording
from undo_kernels.sparse import sparse_terms
from undo_kernels.triton import recompute, rows, tuning
from undo_kernels.triton.device import current
from undo_kernels.triton.plan import GpuPlan, Shapes, gpu_plan
from undo_kernels.triton.products import TILE_ROWS, Workspace, logits, multiply, product_dtype, widened
from undo_kernels.triton.tiles import FORWARD, JSD, OWN, REVERSE

INTERPRETED = triton.knobs.runtime.interpret
_FUSED = {"enable_fp_fusion": True}  # said, since Triton's default changes between versions
_OUTPUTS = ("divergence", "nll", "lse_s", "lse_t", "entropy", "agreement")
_BASES = ("base_s", "base_t", "log_sum_s", "log_sum_t", "gap", "offset")  # what the loss kernels take of a row
_TARGETS = {"uniform": FORWARD.value, "forward": FORWARD.value, "reverse": REVERSE.value, "jsd": JSD.value}


@register("vocab_loss", "triton")
@torch.no_grad()
def vocab_loss(problem: Problem) -> Result:
    """The problem's total, its rows' losses and the gradients that it needs; float32, bfloat16 and float16 inputs."""
    return run(problem, Workspace(problem.student.hidden.device))


def run(problem: Problem, scratch: Workspace) -> Result:
    """:func:`vocab_loss`, with the workspace in the caller's hands."""
    hidden = problem.student.hidden
    if hidden.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(f"backend: got triton for tensors on {hidden.device}, wanted a GPU or TRITON_INTERPRET=1")
    if hidden.dtype == torch.float64:
        raise TypeError("dtype: got torch.float64, wanted float32, bfloat16 or float16 on the triton backend")
    with current(hidden.device):
        return _Run(problem, scratch).result()


class _Head:
    """One side as the kernels take it."""

    def __init__(self, side: Projection) -> None:
        self.side = side
        self.given = isinstance(side, GivenLogits)
        self.hidden, self.weight = side.hidden, side.weight
        self.product = product_dtype(side.hidden, side.weight)
        self.capped = side.softcap is not None
        self.gain = side.scale / side.temperature
        self.inner = side.scale / side.softcap if self.capped else self.gain
        self.outer = side.softcap / side.temperature if self.capped else 1.0
        self.has_bias = side.bias is not None
        self.bias = side.bias.contiguous() if self.has_bias else side.hidden


class _Run:
    """One call: what its passes share."""

    def __init__(self, problem: Problem, scratch: Workspace) -> None:
        p = self.problem = problem
        self.scratch, self.device = scratch, p.student.hidden.device
        self.target = tuning.target_of(self.device)
        self.shapes = s = Shapes(p, self.target)
        self.plan: GpuPlan = gpu_plan(p, self.target)
        self.n, self.vocabulary = s.rows, s.vocabulary
        self.student = _Head(p.student)
        self.teacher = _Head(p.teacher) if s.dense else None
        self.code = _TARGETS.get(p.target, OWN.value)
        self.uniform, self.pair = p.target == "uniform", p.target in (*DENSE, "uniform")
        self.nll, self.labelled = p.label_factor is not None, p.label_factor is not None and p.labels is not None
        self.filter = p.filter_below > 0 and s.gradient
        self._select()
        self._rows()
        self._gradients()

    def _select(self) -> None:
        """Which rows are worked on: all, all with some skipped, or the counted ones moved together in a stable order."""
        p, count = self.problem, self.problem.rows
        self.index = self.place = self.live = None
        if not self.shapes.compacted:
            self.live = p.counted
        else:
            position = p.counted.long().cumsum(0) - 1
            target = torch.where(p.counted & (position < self.n), position, self.n)
            rows_of = torch.arange(count, device=self.device)
            index = torch.zeros(self.n + 1, dtype=torch.int64, device=self.device).scatter_(0, target, rows_of)[: self.n]
            self.live = torch.arange(self.n, device=self.device) < p.counted.sum()
            self.index = torch.where(self.live, index, 0)
            self.place = torch.where(self.live, index, count)  # rows past the count go to a row that is cut off
        self.masked = self.live is not None
        self.counted = self.live.to(torch.uint8) if self.masked else torch.ones(1, dtype=torch.uint8, device=self.device)

    def _take(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        return tensor.contiguous() if self.index is None else tensor.index_select(0, self.index)

    def _rows(self) -> None:
        """What each row brings and what it is given."""
        p, n = self.problem, self.n
        self.zero = torch.zeros(1, device=self.device)
        self.row = {name: self.zero.new_zeros(n) for name in (*_OUTPUTS, *_BASES)}
        self.labels = self._take(p.labels) if self.labelled else None
        self.label_z = torch.full((n,), torch.nan, device=self.device) if self.labelled else self.zero
        self.known_s, self.known_t = self._take(p.lse_s), self._take(p.lse_t)
        self.indices, self.logprobs = self._take(p.indices), self._take(p.logprobs)
        self.scale = None
        self.factor = self.own = self.at_label = self.zero
        self.skipped = torch.zeros(2, dtype=torch.float64, device=self.device)
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
            dtype = gradient_dtype(hidden.dtype)
            extra = self.index is not None
            self.d_hidden = (self.zero.new_zeros if extra else new)((p.rows + extra, hidden.shape[1]), dtype=dtype)
        if needs_weight:
            self.d_weight = new(weight.shape, dtype=gradient_dtype(weight.dtype))
            self.d_weight[self.vocabulary if n else 0 :].zero_()
        if needs_bias:
            self.d_bias = self.scratch.take(p.student.bias.shape[0]).zero_()

    def result(self) -> Result:
        """Runs the plan."""
        if recording():
            plan, form = "inplace" if self.problem.inplace else self.plan.name, "interpreted" if INTERPRETED else ""
            record(Call("vocab_loss", "triton", plan, form, self.n, self.vocabulary, self.shapes.gradient))
        if self.n:
            (_Recompute if self.plan.name == "recompute" else _Chunks)(self).passes()
        p, out = self.problem, self.row
        if self.scale is not None:
            for gradient in (self.d_hidden, self.d_weight, self.d_bias):
                gradient.div_(self.scale)
        if self.index is not None:
            spread = self.zero.new_zeros(len(_OUTPUTS), p.rows + 1)
            spread.index_copy_(1, self.place, torch.stack([out[name] for name in _OUTPUTS]))
            out = {name: values[: p.rows].clone() for name, values in zip(_OUTPUTS, spread, strict=True)}
            self.d_hidden = self.d_hidden[: p.rows]
        if self.student.given and p.inplace and p.needs[0] and self.given is not p.student.hidden:
            self.d_hidden = p.student.hidden.copy_(self.given)
        none = self.zero.new_empty(0)
        total = _weighted(p.factor, out["divergence"], p.counted)
        if self.nll:
            total = total + _weighted(p.label_factor, out["nll"], p.counted)
        filtered = self.zero.new_zeros(2)
        if self.filter:
            count = self.live.sum().clamp_min(1) if self.masked else max(self.n, 1)
            norm = self.skipped[1].sqrt() / (1.0 if self.scale is None else self.scale)
            filtered = torch.stack([self.skipped[0] / (count * self.vocabulary), norm]).float()
        return Result(
            total=total.float(),
            divergence=out["divergence"],
            nll=out["nll"] if self.nll else none,
            lse_s=out["lse_s"],
            lse_t=out["lse_t"] if self.shapes.dense else none,
            teacher_entropy=out["entropy"] if p.statistics else none,
            top1_agreement=out["agreement"] if p.statistics else none,
            filtered=filtered,
            d_hidden=self.d_hidden,
            d_weight=self.d_weight,
            d_bias=self.d_bias.to(gradient_dtype(p.student.bias.dtype)) if p.needs[2] else self.d_bias,
        )

    def hidden(self, head: _Head, part: slice, clear: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of hidden states in the product's dtype; a copy, given second, where rows move, are cleared or are cast.

        Cleared: the gradient of a row that does not count is 0, and 0 * NaN would reach d_weight.
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

    def combine(self, partial: torch.Tensor, part: slice, parts: int, lse_s: torch.Tensor, teacher: bool, tiles: bool) -> None:
        """Log-sum-exps, their difference, reverse's offset and the nll of some rows; ``teacher``: its sums are there."""
        s, out = self.shapes, self.row
        count = lse_s.shape[0]
        p = self.problem
        rows.combine_rows[(count,)](
            partial, self.counted[part] if self.masked else self.counted, self.labels[part] if self.labelled else self.zero,
            _or(self.label_z, part, self.zero), _or(self.known_s, part, self.zero), _or(self.known_t, part, self.zero),
            lse_s, out["lse_t"][part], *(out[name][part] for name in _BASES), out["nll"][part], out["entropy"][part],
            out["agreement"][part], self.vocabulary, parts, partial.shape[1] * partial.shape[2],
            STUDENT=s.student_sums, TEACHER=teacher, CROSS=self.crossed, STATISTICS=p.statistics and s.dense,
            DIFFERENCES=teacher and not tiles, LESS_ONE=tiles,
            PAIR=self.pair, UNIFORM=self.uniform, NLL=self.nll and not s.sparse, LABELS=self.labelled, MASKED=self.masked,
            BLOCK_P=triton.next_power_of_2(parts), num_warps=1, **_FUSED,
        )  # fmt: skip

    @property
    def crossed(self) -> bool:
        return self.problem.target == "reverse" and self.shapes.gradient

    def label_gradient(self, part: slice) -> torch.Tensor:
        """The nll's whole gradient at each row's label, before the softcap's derivative: p - 1 without cancellation."""
        if not (self.labelled and self.shapes.gradient):
            return self.zero
        return (self.own[part].double() * torch.expm1(-self.row["nll"][part].double())).float()

    def put_divergence(self, part: slice, value: torch.Tensor) -> None:
        self.row["divergence"][part] = value if not self.masked else torch.where(self.live[part], value, 0.0)

    def projections(self) -> dict[str, Any]:
        """Options of the two heads that every kernel takes."""
        t = self.teacher or self.student
        s = self.student
        return {
            "inner_s": s.inner, "outer_s": s.outer, "inner_t": t.inner, "outer_t": t.outer,
            "BIAS_S": s.has_bias, "CAPPED_S": s.capped, "BIAS_T": t.has_bias, "CAPPED_T": t.capped,
        }  # fmt: skip

    def products_of_gradient(self, dz: torch.Tensor, hidden: torch.Tensor, part: slice, sums: torch.Tensor, add: bool) -> None:
        """``d_weight (+)= dz.T @ hidden`` and d_bias, of ``dz[rows, part of the vocabulary]``."""
        if self.problem.needs[1]:
            multiply(sums[part], dz.T, hidden, add, self.scratch)
        if self.problem.needs[2]:
            self.d_bias[part] += dz.sum(0, dtype=torch.float32)


class _Chunks:
    """The chunk plan."""

    def __init__(self, run: _Run) -> None:
        self.run, s = run, run.shapes
        scratch, size, leading = run.scratch, run.plan.rows_per_chunk, s.leading
        self.block = tuning.row(run.target, run.vocabulary)
        self.parts, self.part = tuning.row_parts(size, run.vocabulary, self.block.block_v)
        self.copied = not run.student.given or s.sparse
        self.z_s = scratch.take(size, leading) if self.copied else run.given
        self.z_t = self.z_s
        if run.teacher is not None:
            given = run.teacher.hidden
            given = given if given.stride(1) == 1 else scratch.count(given.contiguous())
            self.z_t = given if run.teacher.given else scratch.take(size, leading)
        self.dz = self.z_s
        if s.gradient and not run.student.given and run.student.product != torch.float32:
            self.dz = scratch.take(size, leading, dtype=run.student.product)
        self.stats = scratch.take(tuning.FIELDS, size, self.parts)
        self.losses = scratch.take(4, size, self.parts)
        heads = [h for h in (run.student, run.teacher) if h is not None and not h.given and h.weight.dtype != h.product]
        width = max((h.weight.shape[1] for h in heads), default=0)
        self.upcast = scratch.take(min(TILE_ROWS, run.vocabulary), width) if heads else None
        self.sums = run.d_weight
        if run.plan.accumulator:
            self.sums = scratch.take(run.vocabulary, run.student.weight.shape[1])

    def passes(self) -> None:
        """Every chunk, then what was summed separately."""
        run, size = self.run, self.run.plan.rows_per_chunk
        for first in range(0, run.n, size):
            self._chunk(slice(first, min(first + size, run.n)))
        if run.plan.accumulator:
            run.d_weight[: run.vocabulary].copy_(self.sums)

    def _chunk(self, part: slice) -> None:
        run, s = self.run, self.run.shapes
        count = part.stop - part.start
        hidden, copy = (None, None) if run.student.given else run.hidden(run.student, part, s.gradient)
        z_s = self.z_s[:count] if self.copied else self.z_s[part]
        if hidden is not None:
            logits(z_s[:, : run.vocabulary], hidden, self._weight(run.student), self._buffer(run.student), run.scratch)
        elif self.copied:
            z_s[:, : run.vocabulary].copy_(run.given[part, : run.vocabulary])
        z_t = z_s
        if run.teacher is not None and run.teacher.given:
            z_t = self.z_t[part]
        elif run.teacher is not None:
            z_t = self.z_t[:count]
            hidden_t, copy_t = run.hidden(run.teacher, part, False)
            logits(z_t[:, : run.vocabulary], hidden_t, self._weight(run.teacher), self._buffer(run.teacher), run.scratch)
            run.scratch.give(copy_t)
        self._statistics(z_s, z_t, part)
        if s.loss_pass:
            self._loss(z_s, z_t, part, hidden)
        run.scratch.give(copy)

    def _weight(self, head: _Head) -> torch.Tensor:
        return head.weight[: self.run.vocabulary]

    def _buffer(self, head: _Head) -> torch.Tensor | None:
        if self.upcast is None:
            return None
        width = head.weight.shape[1]
        return self.upcast.view(-1)[: self.upcast.shape[0] * width].view(-1, width)

    def _common(self, z_s: torch.Tensor, z_t: torch.Tensor, part: slice) -> dict[str, Any]:
        run, t = self.run, self.run.teacher or self.run.student
        return {
            "z_s_ptr": z_s, "z_t_ptr": z_t, "bias_s_ptr": run.student.bias, "bias_t_ptr": t.bias,
            "counted_ptr": run.counted[part] if run.masked else run.counted,
            "vocabulary": run.vocabulary, "part": self.part, "parts": self.parts,
            "stride_s": z_s.stride(0), "stride_t": z_t.stride(0), "stride_field": self.stats.shape[1] * self.parts,
            "MASKED": run.masked, "HOLES": run.shapes.sparse, "BLOCK_V": self.block.block_v, "num_warps": self.block.warps,
            **run.projections(), **_FUSED,
        }  # fmt: skip

    def _pick(self, z: torch.Tensor, index: torch.Tensor, out: torch.Tensor, part: slice, take: bool) -> None:
        run, known = self.run, index.shape[1]
        rows.pick_rows[(z.shape[0],)](
            z, run.student.bias, index, run.counted[part] if run.masked else run.counted, out,
            run.student.inner, run.student.outer, run.vocabulary, known, z.stride(0),
            HAS_BIAS=run.student.has_bias, CAPPED=run.student.capped, MASKED=run.masked, TAKE=take,
            BLOCK_K=triton.next_power_of_2(max(known, 1)), num_warps=1, **_FUSED,
        )  # fmt: skip

    def _statistics(self, z_s: torch.Tensor, z_t: torch.Tensor, part: slice) -> None:
        run, s = self.run, self.run.shapes
        count = z_s.shape[0]
        if run.labelled:
            self._pick(z_s, run.labels[part, None], run.label_z[part], part, False)
        if s.sparse:
            self.picked = torch.empty(count, run.indices.shape[1], device=run.device)
            self._pick(z_s, run.indices[part], self.picked, part, True)
        if s.student_sums:
            rows.stats_rows[(count, self.parts)](
                partial_ptr=self.stats, TEACHER=s.dense, CROSS=run.crossed,
                STATISTICS=run.problem.statistics and s.dense, **self._common(z_s, z_t, part),
            )  # fmt: skip
        lse = torch.empty(count, dtype=torch.float64, device=run.device) if s.sparse else run.row["lse_s"][part]
        run.combine(self.stats, part, self.parts, lse, s.dense, False)
        self.own, self.at_label = (run.own[part] if run.nll else run.zero), run.label_gradient(part)
        if s.sparse:
            self._sparse(part, lse)

    def _sparse(self, part: slice, lse_rest: torch.Tensor) -> None:
        """Losses, the rest's factor and the known entries' gradients from k numbers a row."""
        run, s = self.run, self.run.shapes
        terms = sparse_terms(
            self.picked.double(), run.indices[part], run.logprobs[part], lse_rest, run.problem.target, run.vocabulary
        )
        keep = run.live[part] if run.masked else torch.ones_like(terms.lse, dtype=torch.bool)
        run.row["lse_s"][part] = torch.where(keep, terms.lse, 0.0).float()
        run.put_divergence(part, terms.divergence.float())
        if run.nll:
            nll = terms.lse
            if run.labelled:
                nll = torch.where(run.labels[part] < 0, nll, nll - run.label_z[part].double())
            run.row["nll"][part] = torch.where(keep, nll, 0.0).float()
        if not s.gradient:
            return
        empty = lse_rest == -torch.inf
        for name in ("base_s", "log_sum_s"):  # every logit is -inf where nothing is left beside the known ones
            run.row[name][part] = torch.where(empty, 0.0, run.row[name][part])
        factor, own = run.factor[part].double(), run.own[part].double()
        rest = factor * terms.rest
        slope = factor[:, None] * terms.slope
        z = torch.where(run.indices[part] >= 0, self.picked.double(), -torch.inf)
        if run.nll:
            log_p = z - terms.lse[:, None]
            gradient = log_p.exp()
            if run.labelled:
                log_label = run.label_z[part].double() - terms.lse
                gradient = torch.where(run.indices[part] == run.labels[part, None], torch.expm1(log_p), gradient)
                at_rest = torch.where(empty, 0.0, rest * (run.label_z[part].double() - lse_rest).exp())
                self.at_label = (at_rest + own * torch.expm1(log_label)).float()
            slope = slope + own[:, None] * gradient
            rest = rest + own * torch.where(empty, 0.0, (lse_rest - terms.lse).exp())
        if run.student.capped:
            slope = slope * (1 - torch.where(run.indices[part] >= 0, z / run.student.outer, 0.0) ** 2)
        self.own, self.slope = rest.float(), slope.float()

    def _loss(self, z_s: torch.Tensor, z_t: torch.Tensor, part: slice, hidden: torch.Tensor | None) -> None:
        run, p, s, out = self.run, self.run.problem, self.run.shapes, self.run.row
        if run.code == OWN.value and not s.gradient:
            return
        count = z_s.shape[0]
        dz = (run.d_hidden[part] if run.student.given else self.dz[:count]) if s.gradient else z_s
        columns = p.student.hidden.shape[1] if run.student.given else run.vocabulary
        arguments = {
            **self._common(z_s, z_t, part), "partial_ptr": self.losses,
            **{f"{name}_ptr": out[name][part] for name in _BASES}, "factor_ptr": _or(run.factor, part, run.zero),
            "own_ptr": self.own, "at_label_ptr": self.at_label, "labels_ptr": run.labels[part] if run.labelled else run.zero,
            "dz_ptr": dz, "beta_t": p.beta, "beta_s": 1.0 - p.beta, "filter_below": p.filter_below, "columns": columns,
            "stride_dz": dz.stride(0), "TARGET": run.code, "UNIFORM": run.uniform,
        }  # fmt: skip
        grid = (count, self.parts)
        forward = {"GRADIENT": False, "NLL": False, "LABELS": False, "FILTER": False}
        if s.mixture_pass or not s.gradient:
            rows.loss_rows[grid](**arguments, **forward)
        if s.mixture_pass:
            out["offset"][part] = self.losses[1, :count].double().sum(-1).float()
        if s.gradient:
            mixed = run.nll or s.sparse
            rows.loss_rows[grid](**arguments, GRADIENT=True, NLL=mixed, LABELS=run.labelled, FILTER=run.filter)
        if run.code != OWN.value:
            run.put_divergence(part, self.losses[0, :count].double().sum(-1).float())
        if not s.gradient:
            return
        if run.filter:
            run.skipped += self.losses[2:, :count].double().sum((1, 2))
        if s.sparse:
            known = run.indices.shape[1]
            rows.put_rows[(count,)](
                dz, run.indices[part], self.slope, run.counted[part] if run.masked else run.counted, run.vocabulary, known,
                dz.stride(0), MASKED=run.masked, BLOCK_K=triton.next_power_of_2(max(known, 1)), num_warps=1, **_FUSED,
            )  # fmt: skip
        if hidden is not None:
            dz = dz[:, : run.vocabulary]
            run.products_of_gradient(dz, hidden, slice(0, run.vocabulary), self.sums, part.start > 0)
            if p.needs[0]:
                self._hidden_gradient(dz, part)

    def _hidden_gradient(self, dz: torch.Tensor, part: slice) -> None:
        run, weight, scratch = self.run, self._weight(self.run.student), self.run.scratch
        moved = run.index is not None
        shape = dz.shape[0], weight.shape[1]
        out = scratch.take(*shape, dtype=run.d_hidden.dtype) if moved else run.d_hidden[part]
        if weight.dtype == run.student.product:
            multiply(out, dz, weight, False, scratch)
        else:
            wide = scratch.take(*shape)
            _multiply_widened(wide, dz, weight, self._buffer(run.student), False, scratch)
            out.copy_(wide)
            scratch.give(wide)
        if moved:
            run.d_hidden.index_copy_(0, run.place[part], out)
            scratch.give(out)


class _Recompute:
    """The recompute plan."""

    def __init__(self, run: _Run) -> None:
        self.run, s, p = run, run.shapes, run.problem
        scratch, n = run.scratch, run.n
        self.everything = slice(0, n)
        self.hidden_s = _inner(run.hidden(run.student, self.everything, True)[0], scratch)
        self.weight_s = _inner(run.student.weight, scratch)
        self.hidden_t, self.weight_t = self.hidden_s, self.weight_s
        if run.teacher is not None:
            self.hidden_t = _inner(run.hidden(run.teacher, self.everything, False)[0], scratch)
            self.weight_t = _inner(run.teacher.weight, scratch)
        self.stats_tile, self.loss_tile = s.stats_tile, s.loss_tile
        self.block = run.plan.block_v
        self.tiles = self.block // self.loss_tile.block_v
        blocks = triton.cdiv(n, self.loss_tile.block_t)
        self.losses = scratch.take(2, self.tiles, n).zero_()
        self.skipped = scratch.take(2, self.tiles, blocks).zero_()
        if s.gradient:
            self.dz = scratch.take(n, self.block, dtype=run.student.product)
        self.d_hidden = run.d_hidden
        if p.needs[0] and (run.d_hidden.dtype != torch.float32 or run.index is not None):
            self.d_hidden = scratch.take(n, run.student.weight.shape[1])
        self.upcast = None
        if p.needs[0] and run.student.weight.dtype != run.student.product:
            self.upcast = scratch.take(min(TILE_ROWS, run.vocabulary), run.student.weight.shape[1])

    def passes(self) -> None:
        """Statistics, then the vocabulary block by block."""
        run, s, out = self.run, self.run.shapes, self.run.row
        self._statistics()
        if not s.loss_pass:
            return
        self.at_label = run.label_gradient(self.everything)
        if s.mixture_pass or not s.gradient:
            for first in range(0, run.vocabulary, self.block):
                self._loss(first, False)
            run.put_divergence(self.everything, self.losses[0].double().sum(0).float())
        if s.mixture_pass:
            out["offset"].copy_(self.losses[1].double().sum(0))
            self.losses.zero_()
        if not s.gradient:
            return
        for first in range(0, run.vocabulary, self.block):
            self._loss(first, True)
            self._products(first)
        if run.code != OWN.value:
            run.put_divergence(self.everything, self.losses[0].double().sum(0).float())
        if run.filter:
            run.skipped += self.skipped.double().sum((1, 2))
        if run.problem.needs[0]:
            if run.index is not None:
                run.d_hidden.index_copy_(0, run.place, self.d_hidden.to(run.d_hidden.dtype))
            elif self.d_hidden is not run.d_hidden:
                run.d_hidden.copy_(self.d_hidden)

    def _common(self, tile: tuning.Tile) -> dict[str, Any]:
        run = self.run
        t = run.teacher or run.student
        width_s, width_t = self.hidden_s.shape[1], self.hidden_t.shape[1]
        return {
            "hidden_s_ptr": self.hidden_s, "weight_s_ptr": self.weight_s, "bias_s_ptr": run.student.bias,
            "hidden_t_ptr": self.hidden_t, "weight_t_ptr": self.weight_t, "bias_t_ptr": t.bias,
            "labels_ptr": run.labels if run.labelled else run.zero, "LABELS": run.labelled,
            "rows": run.n, "width_s": width_s, "width_t": width_t,
            "stride_hidden_s": self.hidden_s.stride(0), "stride_weight_s": self.weight_s.stride(0),
            "stride_hidden_t": self.hidden_t.stride(0), "stride_weight_t": self.weight_t.stride(0),
            "EVEN_S": width_s % tile.block_d == 0, "EVEN_T": width_t % tile.block_d == 0,
            "PRECISION": tuning.precision(run.target, run.shapes.wide),
            "BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v, "BLOCK_D": tile.block_d, "PIECES": tile.pieces,
            "num_warps": tile.warps, "num_stages": tile.stages,
            **run.projections(), **_FUSED,
        }  # fmt: skip

    def _statistics(self) -> None:
        run, s, tile = self.run, self.run.shapes, self.stats_tile
        parts, part = tuning.tile_parts(run.n, run.vocabulary, tile)
        partial = run.scratch.take(tuning.FIELDS, run.n, parts)
        if s.student_sums:
            grid = (triton.cdiv(run.n, tile.block_t) * parts,)
            recompute.stats_tiles[grid](
                partial_ptr=partial, label_z_ptr=run.label_z, vocabulary=run.vocabulary, part=part, parts=parts,
                stride_field=run.n * parts, TEACHER=s.teacher_sums, CROSS=run.crossed,
                STATISTICS=run.problem.statistics and s.dense, **self._common(tile),
            )  # fmt: skip
        if run.labelled and not s.student_sums:
            recompute.pick_labels[(run.n,)](
                self.hidden_s, self.weight_s, run.student.bias, run.labels, run.label_z, run.student.inner, run.student.outer,
                run.vocabulary, self.hidden_s.shape[1], self.hidden_s.stride(0), self.weight_s.stride(0),
                HAS_BIAS=run.student.has_bias, CAPPED=run.student.capped, BLOCK_D=256, num_warps=1, **_FUSED,
            )  # fmt: skip
        run.combine(partial, self.everything, parts, run.row["lse_s"], s.teacher_sums, True)
        run.scratch.give(partial)

    def _loss(self, first: int, gradient: bool) -> None:
        run, p, out, tile = self.run, self.run.problem, self.run.row, self.loss_tile
        last = min(first + self.block, run.vocabulary)
        grid = (triton.cdiv(run.n, tile.block_t) * triton.cdiv(last - first, tile.block_v),)
        dz = self.dz if gradient else run.zero
        options = self._common(tile) | {"LABELS": run.labelled and gradient}
        recompute.loss_tiles[grid](
            counted_ptr=run.counted, **{f"{name}_ptr": out[name] for name in _BASES}, factor_ptr=run.factor, own_ptr=run.own, at_label_ptr=self.at_label, dz_ptr=dz,
            partial_ptr=self.losses, skipped_ptr=self.skipped, beta_t=p.beta, beta_s=1.0 - p.beta, filter_below=p.filter_below,
            begin=first, last=last, tiles=self.tiles, stride_dz=self.block, TARGET=run.code, UNIFORM=run.uniform,
            GRADIENT=gradient, NLL=run.nll and gradient, FILTER=run.filter and gradient, MASKED=run.masked, **options,
        )  # fmt: skip

    def _products(self, first: int) -> None:
        run = self.run
        part = slice(first, min(first + self.block, run.vocabulary))
        dz = self.dz[:, : part.stop - part.start]
        run.products_of_gradient(dz, self.hidden_s, part, run.d_weight, False)
        if not run.problem.needs[0]:
            return
        weight = run.student.weight[part]
        if self.upcast is None:
            multiply(self.d_hidden, dz, weight, first > 0, run.scratch)
        else:
            _multiply_widened(self.d_hidden, dz, weight, self.upcast, first > 0, run.scratch)


def _multiply_widened(
    out: torch.Tensor, dz: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor, add: bool, scratch: Workspace
) -> None:
    """``out (+)= dz @ weight`` in float32, a tile of the weight widened at a time."""
    for first in range(0, weight.shape[0], TILE_ROWS):
        tile = widened(weight, dz.dtype, first, TILE_ROWS, buffer)
        multiply(out, dz[:, first : first + TILE_ROWS], tile, add or first > 0, scratch)


def _inner(tensor: torch.Tensor, scratch: Workspace) -> torch.Tensor:
    """With neighbouring columns next to each other."""
    return tensor if tensor.stride(1) == 1 else scratch.count(tensor.contiguous())


def _or(tensor: torch.Tensor | None, part: slice, otherwise: torch.Tensor) -> torch.Tensor:
    return otherwise if tensor is None or tensor is otherwise else tensor[part]


def _weighted(factor: torch.Tensor, values: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Sum of factor times value over counted rows, in float64; a factor of 0 silences what is not finite."""
    terms = torch.where(factor == 0, 0.0, factor.double() * values.double())
    return (terms if counted is None else torch.where(counted, terms, 0.0)).sum()
