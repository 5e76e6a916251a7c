"""The passes of the chunk plan, which stores logits; see ``plan.py`` for its bytes and FLOPs.

For each chunk of tokens: library products into float32 logits; statistics; the gradient, which overwrites the student's logits
(float32) or has a buffer (16-bit); library products into d_hidden and d_weight.

Precomputed logits are one chunk without products. Nothing here makes the host wait for the device.
"""

from __future__ import annotations

import torch
import triton

from undo_kernels.sparse_kl_terms import sparse_terms
from undo_kernels.triton import row_kernels, tile_table
from undo_kernels.triton.arguments import LossForm, Split
from undo_kernels.triton.pair_math import OWN
from undo_kernels.triton.products import TILE_ROWS, logits, multiply, multiply_widened
from undo_kernels.triton.run import FUSED, Head, Run


class Chunks:
    """The chunk plan."""

    def __init__(self, run: Run) -> None:
        self.run, s = run, run.shapes
        scratch, size, leading = run.scratch, run.plan.rows_per_chunk, s.leading
        self.block = tile_table.row_block(run.target, run.vocabulary)
        self.parts, self.part = tile_table.row_parts(size, run.vocabulary, self.block.block_v)
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
        self.stats = scratch.take(tile_table.FIELDS, size, self.parts)
        self.losses = scratch.take(2, size, self.parts)
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
            total = run.d_weight[: run.vocabulary]
            total.add_(self.sums) if run.adds else total.copy_(self.sums)

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

    def _split(self, partial: torch.Tensor) -> Split:
        return Split(partial, self.run.vocabulary, self.part, self.parts, self.stats.shape[1] * self.parts)

    def _counted(self, part: slice) -> torch.Tensor:
        return self.run.counted[part] if self.run.masked else self.run.counted

    def _pick(self, z: torch.Tensor, index: torch.Tensor, out: torch.Tensor, part: slice, take: bool) -> None:
        run, known = self.run, index.shape[1]
        row_kernels.pick_rows[(z.shape[0],)](
            run.student.logits(z), index, self._counted(part), out, run.vocabulary, known,
            MASKED=run.masked, TAKE=take, BLOCK_K=triton.next_power_of_2(max(known, 1)), num_warps=1, **FUSED,
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
            row_kernels.stats_rows[(count, self.parts)](
                run.student.logits(z_s), (run.teacher or run.student).logits(z_t), self._split(self.stats), self._counted(part),
                TEACHER=s.teacher_sums_of_chunks, CROSS=run.crossed, STATISTICS=run.problem.statistics and s.dense, MASKED=run.masked,
                SAME=run.same, HOLES=s.sparse, BLOCK_V=self.block.block_v, num_warps=self.block.warps, **FUSED,
            )  # fmt: skip
        lse = torch.empty(count, dtype=torch.float64, device=run.device) if s.sparse else run.per_token["lse_s"][part]
        picked = run.combine(
            self.stats, part, self.parts, lse, s.teacher_sums_of_chunks, False, self.picked if s.sparse else None
        )
        self.own, self.at_label = (run.own[part] if run.nll else run.zero), run.label_gradient(part)
        if s.sparse:
            self.picked = picked
            self._sparse(part, lse)

    def _sparse(self, part: slice, lse_rest: torch.Tensor) -> None:
        """Computes losses, gradients at the known entries and the factor of the rest's gradient, in ``[tokens, k]`` tensors."""
        run, s = self.run, self.run.shapes
        terms = sparse_terms(
            self.picked.double(),
            run.whole_indices[part],
            run.logprobs[part],
            lse_rest,
            run.problem.target,
            run.problem.student.entries,
        )
        keep = run.live[part] if run.masked else torch.ones_like(terms.lse, dtype=torch.bool)
        run.per_token["lse_s"][part] = torch.where(keep, terms.lse, 0.0).float()
        run.put_divergence(part, terms.divergence.float())
        if run.nll:
            nll = terms.lse
            if run.labelled:
                nll = torch.where(run.labels[part] < 0, nll, nll - run.label_z[part].double())
            run.per_token["nll"][part] = torch.where(keep, nll, 0.0).float()
        if not s.gradient:
            return
        empty = lse_rest == -torch.inf
        for name in ("base_s", "log_sum_s"):  # if all entries are known, every remaining logit is -inf
            run.per_token[name][part] = torch.where(empty, 0.0, run.per_token[name][part])
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
            slope = slope * (1 - torch.where(run.indices[part] >= 0, z / run.student.cap, 0.0) ** 2)
        self.own, self.slope = rest.float(), slope.float()

    def _loss(self, z_s: torch.Tensor, z_t: torch.Tensor, part: slice, hidden: torch.Tensor | None) -> None:
        run, p, s, out = self.run, self.run.problem, self.run.shapes, self.run.per_token
        if run.code == OWN.value and not s.gradient:
            return
        count = z_s.shape[0]
        dz = (run.d_hidden[part] if run.student.given else self.dz[:count]) if s.gradient else z_s
        columns = p.student.hidden.shape[1] if run.student.given else run.vocabulary
        if s.mixture_pass or not s.gradient:
            self._launch_loss(z_s, z_t, dz, part, columns, run.loss_form(False, False))
        if s.mixture_pass:
            losses = run.over_processes(self.losses[:2, :count].double().sum(-1))
            out["offset"][part] = losses[1].float()
        if s.gradient:
            self._launch_loss(z_s, z_t, dz, part, columns, run.loss_form(True, run.nll or s.sparse))
        if run.code != OWN.value:
            if not s.mixture_pass:
                losses = run.over_processes(self.losses[:1, :count].double().sum(-1))
            run.put_divergence(part, losses[0].float())
        if not s.gradient:
            return
        if s.sparse:
            known = run.indices.shape[1]
            row_kernels.put_rows[(count,)](
                dz, run.indices[part], self.slope, self._counted(part), run.vocabulary, known, dz.stride(0), MASKED=run.masked, BLOCK_K=triton.next_power_of_2(max(known, 1)), num_warps=1, **FUSED,
            )  # fmt: skip
        if hidden is not None:
            dz = dz[:, : run.vocabulary]
            run.products_of_gradient(dz, hidden, slice(0, run.vocabulary), self.sums, self._holds(part))
            if p.needs[0]:
                self._hidden_gradient(dz, part)

    def _holds(self, part: slice) -> bool:
        """Returns whether the sum of weight gradients holds earlier chunks, or an earlier gradient."""
        return part.start > 0 or (self.run.adds and not self.run.plan.accumulator)

    def _launch_loss(
        self, z_s: torch.Tensor, z_t: torch.Tensor, dz: torch.Tensor, part: slice, columns: int, form: LossForm
    ) -> None:
        run = self.run
        row_kernels.loss_rows[(z_s.shape[0], self.parts)](
            run.student.logits(z_s), (run.teacher or run.student).logits(z_t), self._counted(part), run.sums(part),
            run.weights(part, self.own, self.at_label), dz, dz.stride(0), columns, self._split(self.losses), form,
            HOLES=run.shapes.sparse, BLOCK_V=self.block.block_v, num_warps=self.block.warps, **FUSED,
        )  # fmt: skip

    def _hidden_gradient(self, dz: torch.Tensor, part: slice) -> None:
        run, weight, scratch = self.run, self._weight(self.run.student), self.run.scratch
        moved = run.index is not None
        shape = dz.shape[0], weight.shape[1]
        out = scratch.take(*shape, dtype=run.d_hidden.dtype) if moved else run.d_hidden[part]
        # In float32 also for 16-bit results: a library may split the long sum and round its parts to the dtype of the result.
        wide = out if out.dtype == torch.float32 else scratch.take(*shape)
        if weight.dtype == run.student.product:
            multiply(wide, dz, weight, False, scratch)
        else:
            multiply_widened(wide, dz, weight, self._buffer(run.student), False, scratch)
        if wide is not out:
            out.copy_(wide)
            scratch.give(wide)
        if moved:
            run.d_hidden.index_copy_(0, run.place[part], out)
            scratch.give(out)
