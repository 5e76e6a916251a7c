"""The losses over the vocabulary on CPUs: torch's matrix products on tiles, with the C++ kernels of ``csrc/`` between them.

A tile is ``[BLOCK_V vocabulary entries, tokens]`` of float32 logits, ``W @ H.T``: tokens lie along the vector lanes, and the
kernel reads a tile while it is still in the cache. Two plans:

* ``chunk``: processes as many tokens at a time as the workspace has room for logits. The first pass computes the log-sum-exps
  and keeps the logits; the second turns them into the gradient. Four products, 8 bytes of workspace per (token, vocabulary
  entry).
* ``recompute``: keeps no logits. The second pass computes them again, with the loop over the vocabulary outermost, so that each
  row of the weight's gradient is written once. Six products (five without the teacher's log-sum-exp), a few MiB of workspace.

bfloat16 heads use the processor's bfloat16 instructions if it has some (``csrc/bf16_product.h``): they give the logits in float32, and
in the ``chunk`` plan torch's bfloat16 product multiplies the gradient, rounded to bfloat16. Otherwise weight tiles are converted to
float32, which is several times faster than torch's bfloat16 product there (docs/findings/cpu-losses.md). float16 is always
converted: AVX512-FP16 and Arm's float16 products add up in float16.

If the log-sum-exps are known, or nothing else is needed, one pass suffices and neither plan keeps logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from undo_kernels.cpu import plan as plans
from undo_kernels.cpu.chunk import Chunk
from undo_kernels.cpu.extension import Field, kernels
from undo_kernels.cpu.instruction_set import bfloat16_product, vectors
from undo_kernels.cpu.workspace import reusable, workspace
from undo_kernels.library.backends import register
from undo_kernels.problem import DENSE, Problem, Result, gradient_dtype
from undo_kernels.projection import GivenLogits, Projection
from undo_kernels.record import Call, record, recording


@register("vocab_loss", "cpu")
@torch.no_grad()
def vocab_loss(problem: Problem) -> Result:
    """Computes a problem's total, its tokens' losses and the gradients in ``needs``; float32, bfloat16 and float16 inputs."""
    run = _Run(problem)
    try:
        return run.result()
    finally:
        run.chunks.clear()  # a reference cycle would keep the gradient alive, and make autograd copy it


def _new(*shape: int | torch.Size, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns an uninitialised CPU tensor; ignores torch's default dtype and device."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


class _Run:
    """One call: the buffers shared by its chunks, and the order of its passes."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.shard = problem, problem.shard
        counted = problem.counted
        self.index = None if counted is None or bool(counted.all()) else counted.nonzero().squeeze(-1)
        self.count = problem.tokens if self.index is None else len(self.index)
        self.vocabulary = problem.student.vocabulary
        self.vectors, self.bfloat16 = vectors(), bfloat16_product()
        self.plan = plans.cpu_plan(problem, self.count, bool(self.bfloat16))
        self.block_v, size = self.plan.block_v, self.plan.tokens_per_chunk
        self.gradient = any(problem.needs)
        self.stride = plans.padded(min(size, self.count))
        new = _new
        sides = 2 if problem.target in DENSE else 1
        extent = self.vocabulary if self.plan.stored else self.block_v
        self.leading = plans.leading(self.stride)
        self.logits = workspace(sides * extent * self.leading).view(sides, extent, self.leading).unbind()
        self.upcast = new(self.block_v, self.plan.upcast_width)
        self.partial = new(-(-self.block_v // kernels.BLOCK), kernels.FIELDS, self.stride, dtype=torch.float64)
        self._outputs()
        self.chunks = [
            Chunk(self, number, start, min(size, self.count - start)) for number, start in enumerate(range(0, self.count, size))
        ]

    def _outputs(self) -> None:
        p, new, zeros = self.problem, _new, partial(torch.zeros, dtype=torch.float32, device="cpu")
        wanted = {
            "divergence": True,
            "nll": p.label_factor is not None,
            "lse_s": True,
            "lse_t": p.target in DENSE,
            "entropy": p.statistics,
            "agreement": p.statistics,
        }
        self.per_token = {name: zeros(p.tokens if keep else 0) for name, keep in wanted.items()}
        needs_hidden, needs_weight, needs_bias = p.needs
        dtype = gradient_dtype(p.student.hidden.dtype) if self.shard is None else torch.float32
        self.d_hidden = new(0)
        if needs_hidden and p.inplace:
            self.d_hidden = p.student.hidden
        elif needs_hidden:
            partly = self.index is not None or isinstance(p.student, GivenLogits)
            self.d_hidden = (zeros if partly else new)(p.student.hidden.shape, dtype=dtype)
        weight = p.student.weight
        dtype = gradient_dtype(weight.dtype)
        self.adds = p.earlier is not None
        self.d_weight = new(0)
        if needs_weight:
            self.d_weight = p.earlier if self.adds else reusable(weight.shape, dtype)
        self.d_bias = zeros(weight.shape[0]) if needs_bias else new(0)
        if needs_weight and not self.adds:
            self.d_weight[self.vocabulary if self.count else 0 :].zero_()
        self.direct = dtype == torch.float32  # products are written straight into the gradient
        self.sum_weight = None if not needs_weight or self.direct else self.d_weight
        if self.plan.accumulator:
            self.sum_weight = reusable(torch.Size((self.vocabulary, weight.shape[1])), torch.float32)
        narrow = {"dtype": torch.bfloat16} if self.plan.narrow else {}
        self.product = new(self.block_v, weight.shape[1], **narrow) if needs_weight and not self.direct else None
        self.narrow = new(self.block_v, self.stride, **narrow) if self.plan.narrow else None

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Yields the first vocabulary entry and the number of entries of each tile."""
        for first in range(0, self.vocabulary, self.block_v):
            yield first, min(self.block_v, self.vocabulary - first)

    def result(self) -> Result:
        """Runs the passes and returns the result."""
        if recording():
            self._record()
        # Each part goes through all passes before the next one: a chunk whose logits are kept, or all chunks. Processes that share
        # a head exchange once.
        single = self.plan.outer == "tokens" and self.shard is None
        parts = [[chunk] for chunk in self.chunks] if single else [self.chunks] * bool(self.chunks)
        for part in parts:
            self._statistics(part)
            self._mixtures(part)
            self._gradients(part)
            self._sum_losses(part)
            for chunk in part:
                chunk.close()
        if self.plan.accumulator and self.chunks:
            self._put(self.d_weight[: self.vocabulary], self.sum_weight, True)
        if self.problem.inplace and self.gradient:
            self.d_hidden[:, self.vocabulary :].zero_()
            if self.index is not None:
                self.d_hidden.masked_fill_(~self.problem.counted[:, None], 0.0)
        if self.shard is not None and self.problem.needs[0]:
            self._sum_hidden_gradient()
        p, out = self.problem, self.per_token
        total = _weighted(p.factor, out["divergence"], self.index)
        if p.label_factor is not None:
            total = total + _weighted(p.label_factor, out["nll"], self.index)
        d_bias = self.d_bias.to(gradient_dtype(p.student.bias.dtype)) if p.needs[2] else self.d_bias
        return Result(total.float(), *out.values(), self.d_hidden, self.d_weight, d_bias)  # pyrefly: ignore[bad-argument-count]

    def _sum_hidden_gradient(self) -> None:
        """Sums the gradient of the hidden states over the processes that share the head, before it is rounded."""
        if self.count:
            counted = self.d_hidden if self.index is None else self.d_hidden[self.index]
            self.shard.sum_(counted)
            if self.index is not None:
                self.d_hidden[self.index] = counted
        self.d_hidden = self.d_hidden.to(gradient_dtype(self.problem.student.hidden.dtype))

    def _record(self) -> None:
        p = self.problem
        sides = [p.student] + ([p.teacher] if p.target in DENSE else [])
        form = self.vectors + (f"+{self.bfloat16}" if self.bfloat16 and any(map(plans.tiled, sides)) else "")
        plan = "inplace" if p.inplace else self.plan.name
        record(Call("vocab_loss", "cpu", plan, form, self.count, self.vocabulary, self.gradient))

    def _project(self, chunk: Chunk, side: Projection, which: int, first: int, entries: int) -> torch.Tensor:
        """Returns the products of one tile, ``[entries, stride]``, before bias, scale and softcap."""
        at = first if self.plan.stored else 0
        z = self.logits[which][at : at + entries, : chunk.stride]
        if which in chunk.packed:
            weight = side.weight[first : first + entries]
            weight = weight if weight.stride(1) == 1 else weight.contiguous()
            kernels.bf16_project(
                self.bfloat16, weight.data_ptr(), weight.stride(0), entries, chunk.packed[which].data_ptr(), chunk.stride,
                weight.shape[1], z.data_ptr(), z.stride(0),
            )  # fmt: skip
            return z
        if not isinstance(side, GivenLogits):
            return torch.mm(self._weight(side, first, entries), chunk.hidden[which].T, out=z)
        given = side.hidden[:, first : first + entries]
        z[:, : chunk.tokens].copy_((given[chunk.part] if self.index is None else given.index_select(0, chunk.index)).T)
        if which == 1 and chunk.unseen is not None:
            z.index_fill_(1, chunk.unseen, 0.0)
        z[:, chunk.tokens :].zero_()
        return z

    def _weight(self, side: Projection, first: int, entries: int) -> torch.Tensor:
        weight = side.weight[first : first + entries]
        if weight.dtype == torch.float32:
            return weight
        return self.upcast[:entries].view(-1)[: entries * weight.shape[1]].view(entries, -1).copy_(weight)

    def _tile(self, chunk: Chunk, first: int, entries: int) -> list[torch.Tensor]:
        sides = [self.problem.student] + ([self.problem.teacher] if self.problem.target in DENSE else [])
        return [self._project(chunk, side, which, first, entries) for which, side in enumerate(sides)]

    def _statistics(self, part: list[Chunk]) -> None:
        """Computes the maxima and sums of exponentials of all tokens, unless they are known, and what follows from them."""
        for chunk in part if self.plan.first_pass else []:
            chunk.c.picking = True
            for first, entries in self.tiles():
                z = self._tile(chunk, first, entries)
                kernels.stats(self.vectors, chunk.c, z[0].data_ptr(), z[1].data_ptr() if len(z) > 1 else 0, first, entries)
            chunk.c.picking = False
        if self.shard is not None and self.plan.first_pass:
            sums = [chunk.sums() for chunk in part]
            whole = {name: torch.cat([one[name] for one in sums]) for name in sums[0]}
            witness = self.shard.witness(self.problem.student.hidden)
            merged = self.shard.merged(whole, witness if self.index is None else witness[:, self.index])
            at = 0
            for chunk in part:
                chunk.put_sums({name: values[at : at + chunk.tokens] for name, values in merged.items()})
                at += chunk.tokens
        for chunk in part:
            chunk.finish()

    def _mixtures(self, part: list[Chunk]) -> None:
        """Computes KL(s || m), which the gradient of the JSD needs in addition to the log-sum-exps."""
        if self.problem.target != "jsd" or not self.gradient:
            return
        for chunk in part:
            for first, entries in self.tiles():
                z = self._second(chunk, first, entries)
                kernels.loss(self.vectors, chunk.c, z[0].data_ptr(), z[1].data_ptr(), first, entries, False)
        self._sum_over_processes(part, [Field.VALUE, Field.MIXED])
        for chunk in part:
            chunk.mix()

    def _sum_losses(self, part: list[Chunk]) -> None:
        """Sums the losses over the processes that share the head, where each computed the terms of its own entries."""
        if self.problem.target == "jsd" and self.gradient:  # summed before the gradient
            for chunk in part if self.shard is not None else []:
                chunk.state[Field.VALUE] = chunk.value
        elif self.problem.target in (*DENSE, "uniform") and not self.problem.repeated:
            self._sum_over_processes(part, [Field.VALUE])

    def _sum_over_processes(self, part: list[Chunk], fields: list[Field]) -> None:
        if self.shard is None:
            return
        summed = self.shard.sum_(torch.cat([chunk.state[fields, : chunk.tokens] for chunk in part], 1))
        at = 0
        for chunk in part:
            chunk.state[fields, : chunk.tokens] = summed[:, at : at + chunk.tokens]
            at += chunk.tokens

    def _second(self, chunk: Chunk, first: int, entries: int) -> list[torch.Tensor]:
        """Returns a tile's logits, after scale, softcap and temperature, for the second pass."""
        if self.plan.stored:
            return [z[first : first + entries] for z in self.logits]
        z = self._tile(chunk, first, entries)
        for which, tile in enumerate(z):
            kernels.shape(self.vectors, chunk.c, tile.data_ptr(), which == 0, first, entries)
        return z

    def _gradients(self, part: list[Chunk]) -> None:
        """Computes losses and gradients, tile by tile."""
        tiles = list(self.tiles()) if self.plan.second_pass else []
        if self.plan.outer == "tokens" and not self.plan.narrow:
            # Last tile first, because it is still in the cache. Rounded gradients need ascending order: they overwrite earlier tiles.
            tiles.reverse()
        for first, entries in tiles:
            for chunk in part:
                self._gradient(chunk, first, entries)
            if self.plan.outer == "vocabulary" and self.sum_weight is not None:
                self._put(self.d_weight[first : first + entries], self.product[:entries], True)

    def _gradient(self, chunk: Chunk, first: int, entries: int) -> None:
        """Adds a tile's contribution to the loss and to each gradient."""
        p, number = self.problem, chunk.number
        needs_hidden, needs_weight, needs_bias = p.needs
        z = self._second(chunk, first, entries)
        teacher = z[1].data_ptr() if len(z) > 1 else 0
        kernels.loss(self.vectors, chunk.c, z[0].data_ptr(), teacher, first, entries, self.gradient)
        if not self.gradient:
            return
        dz = z[0][:, : chunk.stride]
        if chunk.tokens < chunk.stride:
            dz[:, chunk.tokens :].zero_()
        if needs_bias:  # before the rounded gradient overwrites this one
            self.d_bias[first : first + entries] += dz.sum(1)
        if needs_hidden and isinstance(p.student, GivenLogits):
            part = dz[:, : chunk.tokens].T
            place = self.d_hidden[:, first : first + entries]
            if self.index is None:
                place[chunk.part].copy_(part)
            else:
                place.index_copy_(0, chunk.index, part.to(place.dtype))
        elif self.plan.narrow:
            narrow = self._narrow(dz, chunk, first, entries)
            if needs_weight:
                self._narrow_weight_gradient(narrow, chunk, number, first, entries)
        elif needs_hidden:
            weight = self._weight(p.student, first, entries)
            chunk.hidden_sum().addmm_(dz.T, weight)
        if needs_weight and not self.plan.narrow:
            self._weight_gradient(dz, chunk, number, first, entries)

    def _narrow(self, dz: torch.Tensor, chunk: Chunk, first: int, entries: int) -> torch.Tensor:
        """Returns the tile's gradient in bfloat16 and keeps a copy, in the logits' memory, for the hidden states' gradient."""
        narrow = self.narrow[:entries, : chunk.stride]
        narrow.copy_(dz)
        if self.problem.needs[0]:  # safe: two rounded tiles fit in the memory of one tile that has been read
            self._kept(chunk)[first : first + entries].copy_(narrow)
        return narrow

    def _kept(self, chunk: Chunk) -> torch.Tensor:
        return self.logits[0].view(-1).view(torch.bfloat16)[: self.vocabulary * chunk.stride].view(self.vocabulary, -1)

    def narrow_hidden_gradient(self, chunk: Chunk) -> torch.Tensor:
        """Returns the hidden states' gradient, ``[stride, d]`` bfloat16: one product over the vocabulary, rounded once."""
        return torch.mm(self._kept(chunk).T, self.problem.student.weight[: self.vocabulary])

    def _narrow_weight_gradient(self, narrow: torch.Tensor, chunk: Chunk, number: int, first: int, entries: int) -> None:
        target = self.d_weight[first : first + entries]
        # For some shapes torch's 16-bit product multiplies the old content of `out` by 0, so a NaN in uninitialised memory
        # would stay.
        if number == 0 and not self.plan.accumulator and not self.adds:
            torch.mm(narrow, chunk.narrow_hidden, out=target.zero_())
            return
        product = torch.mm(narrow, chunk.narrow_hidden, out=self.product[:entries].zero_())
        if self.plan.accumulator:
            summed = self.sum_weight[first : first + entries]
            summed.copy_(product) if number == 0 else summed.add_(product)
        else:
            self._put(target, product, number == 0)

    def _weight_gradient(self, dz: torch.Tensor, chunk: Chunk, number: int, first: int, entries: int) -> None:
        outer = self.plan.outer == "vocabulary"
        if self.direct or self.plan.accumulator:
            out = (self.d_weight if self.direct else self.sum_weight)[first : first + entries]
        else:
            out = self.product[:entries]
        # Else it holds the sum of earlier chunks, or of earlier calls.
        fresh = (number == 0 and not (self.direct and self.adds)) or not (self.direct or self.plan.accumulator or outer)
        if fresh:
            torch.mm(dz, chunk.hidden[0], out=out)
        else:
            out.addmm_(dz, chunk.hidden[0])
        if self.direct or self.plan.accumulator or outer:
            return
        self._put(self.d_weight[first : first + entries], out, number == 0)

    def _put(self, target: torch.Tensor, values: torch.Tensor, first: bool) -> None:
        """Writes the first values of a part of the gradient, or adds them to an earlier gradient; adds later ones."""
        target.copy_(values) if first and not self.adds else target.add_(values)


def _weighted(factor: torch.Tensor, values: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Returns the sum of factor times value over the counted tokens, in float64; tokens of factor 0 are ignored, even if NaN."""
    terms = torch.where(factor == 0, 0.0, factor.double() * values.double())
    return (terms if index is None else terms[index]).sum()
