"""The passes of the two plans; see ``plan.py`` for their bytes and FLOPs.

chunk      for each chunk of rows: library products into float32 logits; statistics; the gradient, which overwrites the
student's
           logits (float32) or has a buffer (16-bit); library products into d_hidden and d_weight.
recompute  statistics without logits; then for each block of the vocabulary, outermost: the gradient of all rows from recomputed
           tiles, and library products. Each row of d_weight is written once; d_hidden is summed in float32.

Precomputed logits are one chunk without products. Nothing here makes the host wait for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from undo_kernels.sparse_kl_terms import sparse_terms
from undo_kernels.triton import recompute, rows, tuning
from undo_kernels.triton.products import TILE_ROWS, Workspace, logits, multiply, widened
from undo_kernels.triton.run import BASES, FUSED, Head, Run, part_or
from undo_kernels.triton.tiles import OWN


class Chunks:
    """The chunk plan."""

    def __init__(self, run: Run) -> None:
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
        """Processes every chunk, then writes the separately summed weight gradient."""
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

    def _weight(self, head: Head) -> torch.Tensor:
        return head.weight[: self.run.vocabulary]

    def _buffer(self, head: Head) -> torch.Tensor | None:
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
            **run.projections(), **FUSED,
        }  # fmt: skip

    def _pick(self, z: torch.Tensor, index: torch.Tensor, out: torch.Tensor, part: slice, take: bool) -> None:
        run, known = self.run, index.shape[1]
        rows.pick_rows[(z.shape[0],)](
            z, run.student.bias, index, run.counted[part] if run.masked else run.counted, out,
            run.student.inner, run.student.outer, run.vocabulary, known, z.stride(0),
            HAS_BIAS=run.student.has_bias, CAPPED=run.student.capped, MASKED=run.masked, TAKE=take,
            BLOCK_K=triton.next_power_of_2(max(known, 1)), num_warps=1, **FUSED,
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
        """Computes losses, gradients at the known entries and the factor of the rest's gradient, in ``[rows, k]`` tensors."""
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
        for name in ("base_s", "log_sum_s"):  # if all entries are known, every remaining logit is -inf
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
            **{f"{name}_ptr": out[name][part] for name in BASES}, "factor_ptr": part_or(run.factor, part, run.zero),
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
                dz.stride(0), MASKED=run.masked, BLOCK_K=triton.next_power_of_2(max(known, 1)), num_warps=1, **FUSED,
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


class Recompute:
    """The recompute plan."""

    def __init__(self, run: Run) -> None:
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
        """Computes the statistics, then the loss and gradient block by block of the vocabulary."""
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
            **run.projections(), **FUSED,
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
                HAS_BIAS=run.student.has_bias, CAPPED=run.student.capped, BLOCK_D=256, num_warps=1, **FUSED,
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
            counted_ptr=run.counted, **{f"{name}_ptr": out[name] for name in BASES}, factor_ptr=run.factor, own_ptr=run.own, at_label_ptr=self.at_label, dz_ptr=dz,
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
    """Computes ``out (+)= dz @ weight`` in float32, widening one tile of the weight at a time."""
    for first in range(0, weight.shape[0], TILE_ROWS):
        tile = widened(weight, dz.dtype, first, TILE_ROWS, buffer)
        multiply(out, dz[:, first : first + TILE_ROWS], tile, add or first > 0, scratch)


def _inner(tensor: torch.Tensor, scratch: Workspace) -> torch.Tensor:
    """Returns ``tensor`` with contiguous rows, copied into the workspace if necessary."""
    return tensor if tensor.stride(1) == 1 else scratch.count(tensor.contiguous())
