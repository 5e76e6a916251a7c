"""A problem's sizes and properties, from which the plans and the passes derive what they do. Can be imported without triton."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from undo_kernels.problem import DENSE, SPARSE, Problem
from undo_kernels.projection import GivenLogits, Projection
from undo_kernels.triton import tile_table
from undo_kernels.triton.products import product_dtype

ALIGNED = 64  # rows of the buffers are padded to a multiple of this, for 16-byte loads and whole tiles
# Largest softcap over temperature of 16-bit inputs with approximate functions. Their tanh errs by 3e-7, so a logit by 3e-7 of its cap,
# beside logits that differ by 1e-3 at a KL of 1e-6. Nor can e**(z - cap) underflow: it is at least 2**-98.
STEEPEST = 34.0


@dataclass(frozen=True)
class Shapes:
    """A problem's sizes and properties, as the plans use them."""

    problem: Problem
    target: str  # name of the device in the tile table

    @property
    def given(self) -> bool:
        return isinstance(self.problem.student, GivenLogits)

    @property
    def dense(self) -> bool:
        return self.problem.target in DENSE

    @property
    def sparse(self) -> bool:
        return self.problem.target in SPARSE

    @property
    def sides(self) -> list[Projection]:
        return [self.problem.student] + ([self.problem.teacher] if self.dense else [])

    @property
    def compacted(self) -> bool:
        p = self.problem
        return p.counted is not None and p.max_counted is not None and p.max_counted < p.tokens and not self.given

    @property
    def tokens(self) -> int:
        """Number of tokens processed."""
        return self.problem.max_counted if self.compacted else self.problem.tokens

    @property
    def vocabulary(self) -> int:
        """Most vocabulary entries of any process that shares the head, so that all of them choose alike."""
        return self.problem.student.widest

    @property
    def leading(self) -> int:
        return -(-self.vocabulary // ALIGNED) * ALIGNED

    @property
    def width(self) -> int:
        return self.problem.student.hidden.shape[1]

    @property
    def gradient(self) -> bool:
        return any(self.problem.needs)

    @property
    def product(self) -> torch.dtype:
        return product_dtype(self.problem.student.hidden, self.problem.student.weight)

    @property
    def wide(self) -> bool:
        return any(product_dtype(s.hidden, s.weight) == torch.float32 for s in self.sides)

    @property
    def exact(self) -> bool:
        """Whether functions are exact to float32's rounding: for float32 inputs, and for softcaps above STEEPEST."""
        caps = (side.softcap / side.temperature for side in self.sides if side.softcap is not None)
        return self.wide or max(caps, default=0.0) > STEEPEST

    @property
    def crossed(self) -> bool:
        """Whether the statistics need the logits of both sides at the same time."""
        return self.dense and (self.problem.statistics or (self.problem.target == "reverse" and self.gradient))

    @property
    def student_sums(self) -> bool:
        return self.dense or self.problem.lse_s is None or self.sparse

    @property
    def teacher_sums(self) -> bool:
        """Whether the recompute plan computes the teacher's sums.

        The difference of two log-sum-exps that were rounded to float32 is not exact; that of one is, to 1e-7.
        """
        return self.dense and (self.crossed or self.problem.lse_t is None or self.problem.lse_s is not None)

    @property
    def teacher_sums_of_chunks(self) -> bool:
        """Whether the chunk plan does, which with exact functions sums the differences of both sides' exponentials."""
        return self.dense and (self.exact or self.teacher_sums)

    @property
    def loss_pass(self) -> bool:
        return self.gradient or self.dense or self.problem.target == "uniform"

    @property
    def mixture_pass(self) -> bool:
        return self.problem.target == "jsd" and self.gradient

    @property
    def ragged(self) -> bool:
        """Whether rows begin where no 16-byte load may."""
        return any(side.weight.shape[1] % 16 for side in self.sides)

    @property
    def stats_tile(self) -> tile_table.Tile:
        return self._tile("cross" if self.crossed else "stats")

    @property
    def loss_tile(self) -> tile_table.Tile:
        return self._tile("jsd" if self.problem.target == "jsd" else "loss")

    def _tile(self, kernel: str) -> tile_table.Tile:
        """Returns a kernel's tile, or a smaller one where single loads of ragged rows or exact functions need its registers."""
        tile = tile_table.tile(self.target, kernel, self.wide, self.width)
        if not self.ragged and self.exact == self.wide:
            return tile
        depth = 16 if self.wide else 32
        return replace(tile, block_t=min(tile.block_t, 64), block_v=min(tile.block_v, 128), block_d=min(tile.block_d, depth))

    @property
    def together(self) -> bool:
        """Whether one loop of the loss tiles forms the products of both sides."""
        return (
            self.dense
            and not self.ragged
            and len({side.weight.shape[1] for side in self.sides}) == 1
            and tile_table.together(self.target, self.exact)
        )

    @property
    def stats_together(self) -> bool:
        """Whether one loop of the statistics tiles does; with labels a program would spill registers."""
        labelled = self.problem.label_factor is not None and self.problem.labels is not None
        return self.together and (self.crossed or (self.teacher_sums and not labelled))

    def copies(self, side: Projection) -> bool:
        """Returns whether a side's hidden states are copied before the product."""
        masked = side is self.problem.student and self.problem.counted is not None
        return self.compacted or masked or side.hidden.dtype != product_dtype(side.hidden, side.weight)

    def hidden_bytes(self, tokens: int) -> int:
        linear = [s for s in self.sides if not isinstance(s, GivenLogits) and self.copies(s)]
        return sum(tokens * s.hidden.shape[1] * product_dtype(s.hidden, s.weight).itemsize for s in linear)

    def upcast_bytes(self, rows: int) -> int:
        cast = [s for s in self.sides if not isinstance(s, GivenLogits) and s.weight.dtype != product_dtype(s.hidden, s.weight)]
        return 4 * min(rows, self.vocabulary) * max((s.weight.shape[1] for s in cast), default=0)

    def bias_bytes(self) -> int:
        return 8 * self.vocabulary * self.problem.needs[2]
