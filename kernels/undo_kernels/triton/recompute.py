"""The passes of the recompute plan, which stores no logits; see ``plan.py`` for its bytes and FLOPs.

Statistics without logits; then for each block of the vocabulary, outermost: the gradient of all tokens from recomputed tiles,
and library products. Each row of d_weight is written once; d_hidden is summed in float32.

Nothing here makes the host wait for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from undo_kernels.triton import tile_kernels, tile_table
from undo_kernels.triton.arguments import Head, Split
from undo_kernels.triton.pair_math import OWN
from undo_kernels.triton.products import TILE_ROWS, Workspace, multiply, multiply_widened
from undo_kernels.triton.run import FUSED, Run


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
        self.losses = scratch.take(2, self.tiles, n).zero_()
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
        run, s, out = self.run, self.run.shapes, self.run.per_token
        self._statistics()
        if not s.loss_pass:
            return
        self.at_label = run.label_gradient(self.everything)
        if s.mixture_pass or not s.gradient:
            for first in range(0, run.vocabulary, self.block):
                self._loss(first, False)
            losses = run.over_processes(self.losses[: 1 + s.mixture_pass].double().sum(1))
            run.put_divergence(self.everything, losses[0].float())
        if s.mixture_pass:
            out["offset"].copy_(losses[1])
            self.losses.zero_()
        if not s.gradient:
            return
        if not run.vocabulary and run.problem.needs[0]:  # this process holds no entry of a sharded head
            self.d_hidden.zero_()
        for first in range(0, run.vocabulary, self.block):
            self._loss(first, True)
            self._products(first)
        if run.code != OWN.value and not s.mixture_pass:
            run.put_divergence(self.everything, run.over_processes(self.losses[:1].double().sum(1))[0].float())
        if run.problem.needs[0]:
            if run.index is not None:
                run.d_hidden.index_copy_(0, run.place, self.d_hidden.to(run.d_hidden.dtype))
            elif self.d_hidden is not run.d_hidden:
                run.d_hidden.copy_(self.d_hidden)

    def _heads(self, block_d: int, together: bool) -> tuple[Head, Head]:
        run = self.run
        student = run.student.matrices(self.hidden_s, self.weight_s, block_d, together)
        return student, (run.teacher or run.student).matrices(self.hidden_t, self.weight_t, block_d, together)

    def _options(self, tile: tile_table.Tile, together: bool) -> dict[str, Any]:
        return {
            "PRECISION": tile_table.precision(self.run.target, self.run.shapes.wide),
            "BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v, "BLOCK_D": tile.block_d, "PIECES": tile.pieces,
            "num_warps": tile.warps, "num_stages": tile.stages - together, **FUSED,
        }  # fmt: skip

    def _statistics(self) -> None:
        run, s, tile = self.run, self.run.shapes, self.stats_tile
        parts, part = tile_table.tile_parts(run.n, run.vocabulary, tile)
        partial = run.scratch.take(tile_table.FIELDS, run.n, parts)
        student, teacher = self._heads(tile.block_d, s.stats_together)
        if s.student_sums:
            tile_kernels.stats_tiles[(triton.cdiv(run.n, tile.block_t) * parts,)](
                student, teacher, Split(partial, run.vocabulary, part, parts, run.n * parts),
                run.labels if run.labelled else run.zero, run.label_z, run.n, LABELS=run.labelled,
                TEACHER=s.teacher_sums, CROSS=run.crossed, STATISTICS=run.problem.statistics and s.dense, SAME=run.same,
                **self._options(tile, s.stats_together),
            )  # fmt: skip
        if run.labelled and not s.student_sums:
            tile_kernels.pick_labels[(run.n,)](
                student, run.labels, run.label_z, run.vocabulary, BLOCK_D=256, num_warps=1, **FUSED
            )
        run.combine(partial, self.everything, parts, run.per_token["lse_s"], s.teacher_sums, True)
        run.scratch.give(partial)

    def _loss(self, first: int, gradient: bool) -> None:
        run, tile, together = self.run, self.loss_tile, self.run.shapes.together
        last = min(first + self.block, run.vocabulary)
        tile_kernels.loss_tiles[(triton.cdiv(run.n, tile.block_t) * triton.cdiv(last - first, tile.block_v),)](
            *self._heads(tile.block_d, together), run.counted, run.sums(self.everything),
            run.weights(self.everything, run.own, self.at_label),
            self.dz if gradient else run.zero, self.losses, run.n, first, last, self.tiles, self.block,
            run.loss_form(gradient, run.nll), **self._options(tile, together),
        )  # fmt: skip

    def _products(self, first: int) -> None:
        run = self.run
        part = slice(first, min(first + self.block, run.vocabulary))
        dz = self.dz[:, : part.stop - part.start]
        run.products_of_gradient(dz, self.hidden_s, part, run.d_weight, run.adds)
        if not run.problem.needs[0]:
            return
        weight = run.student.weight[part]
        if self.upcast is None:
            multiply(self.d_hidden, dz, weight, first > 0, run.scratch)
        else:
            multiply_widened(self.d_hidden, dz, weight, self.upcast, first > 0, run.scratch)


def _inner(tensor: torch.Tensor, scratch: Workspace) -> torch.Tensor:
    """Returns ``tensor`` with contiguous rows, copied into the workspace if necessary."""
    return tensor if tensor.stride(1) == 1 else scratch.count(tensor.contiguous())
