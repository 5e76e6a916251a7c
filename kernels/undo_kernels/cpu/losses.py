"""The vocabulary losses on CPUs: torch's matrix products on tiles, the C++ row kernels of ``csrc/`` between them.

A tile is ``[BLOCK_V vocabulary rows, tokens]`` of float32 logits, ``W @ H.T``: tokens lie along the vector lanes, and the row
kernel reads a tile while it is still in the cache that the product left it in. Two plans:

* ``chunk``: as many tokens as the workspace holds the logits of. Their tiles stay between the pass that finds the
  log-sum-exps and the pass that turns them into the gradient. Four products, 8 bytes of workspace a (token, vocabulary row).
* ``recompute``: no logits stay. The second pass projects again, vocabulary outermost, so that each row of the weight's gradient
  is written once. Six products (five without the teacher's log-sum-exp), a few MiB of workspace.

bfloat16 heads use AMX tiles where the processor has them: logits through ``csrc/amx.cpp``, which keeps them in float32, and in the
``chunk`` plan the gradient's products through torch's own, of a gradient rounded to bfloat16. Elsewhere weight tiles are widened.

One pass suffices, and no logits stay in either plan, where the log-sum-exps are known or where nothing but them is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from undo_kernels.cpu import plan as plans
from undo_kernels.cpu.extension import Field, Target, kernels
from undo_kernels.cpu.instruction_set import has_amx, vectors
from undo_kernels.cpu.workspace import workspace
from undo_kernels.library import register
from undo_kernels.problem import DENSE, SPARSE, Problem, Result, gradient_dtype
from undo_kernels.projection import GivenLogits, Projection
from undo_kernels.record import Call, record, recording
from undo_kernels.sparse import sparse_terms

_ROWS = ("base_s", "base_t", "log_sum_s", "log_sum_t", "gap", "offset", "weight", "own", "label_weight")
_NOWHERE = 1e30  # base of lanes past the last token: every probability is 0 there


@register("vocab_loss", "cpu")
@torch.no_grad()
def vocab_loss(problem: Problem) -> Result:
    """The problem's total, its rows' losses and the gradients that it needs; float32, bfloat16 and float16 inputs."""
    run = _Run(problem)
    try:
        return run.result()
    finally:
        run.chunks.clear()  # a cycle would keep the gradient until the garbage collector comes, and make autograd copy it


def _new(*shape: int | torch.Size, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Whatever torch's default dtype and device are."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


class _Run:
    """One call: the buffers that its chunks share, and the order of its passes."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        counted = problem.counted
        self.index = None if counted is None or bool(counted.all()) else counted.nonzero().squeeze(-1)
        self.count = problem.rows if self.index is None else len(self.index)
        self.vocabulary = problem.student.vocabulary
        self.vectors, self.amx = vectors(), has_amx()
        self.plan = plans.cpu_plan(problem, self.count, self.amx)
        self.block_v, rows = self.plan.block_v, self.plan.rows_per_chunk
        self.gradient = any(problem.needs)
        self.stride = plans.padded(min(rows, self.count))
        new = _new
        sides = 2 if problem.target in DENSE else 1
        extent = self.vocabulary if self.plan.stored else self.block_v
        self.leading = plans.leading(self.stride)
        self.logits = workspace(sides * extent * self.leading).view(sides, extent, self.leading).unbind()
        self.upcast = new(self.block_v, self.plan.upcast_width)
        self.partial = new(-(-self.block_v // kernels.BLOCK), kernels.FIELDS, self.stride, dtype=torch.float64)
        self.skipped = self.dropped = 0.0
        self._outputs()
        self.chunks = [_Chunk(self, start, min(rows, self.count - start)) for start in range(0, self.count, rows)]

    def _outputs(self) -> None:
        p, new, zeros = self.problem, _new, partial(torch.zeros, dtype=torch.float32, device="cpu")
        rows = p.rows
        wanted = {
            "divergence": True,
            "nll": p.label_factor is not None,
            "lse_s": True,
            "lse_t": p.target in DENSE,
            "entropy": p.statistics,
            "agreement": p.statistics,
        }
        self.per_row = {name: zeros(rows if keep else 0) for name, keep in wanted.items()}
        needs_hidden, needs_weight, needs_bias = p.needs
        dtype = gradient_dtype(p.student.hidden.dtype)
        self.d_hidden = new(0)
        if needs_hidden and p.inplace:
            self.d_hidden = p.student.hidden
        elif needs_hidden:
            partly = self.index is not None or isinstance(p.student, GivenLogits)
            self.d_hidden = (zeros if partly else new)(p.student.hidden.shape, dtype=dtype)
        weight = p.student.weight
        dtype = gradient_dtype(weight.dtype)
        self.d_weight = new(weight.shape, dtype=dtype) if needs_weight else new(0)
        self.d_bias = zeros(weight.shape[0]) if needs_bias else new(0)
        if needs_weight:
            self.d_weight[self.vocabulary if self.count else 0 :].zero_()
        self.direct = dtype == torch.float32  # products go straight into the gradient
        self.sum_weight = None if not needs_weight or self.direct else self.d_weight
        if self.plan.accumulator:
            self.sum_weight = new(self.vocabulary, weight.shape[1])
        narrow = {"dtype": torch.bfloat16} if self.plan.narrow else {}
        self.product = new(self.block_v, weight.shape[1], **narrow) if needs_weight and not self.direct else None
        self.narrow = new(self.block_v, self.stride, **narrow) if self.plan.narrow else None

    def tiles(self) -> Iterator[tuple[int, int]]:
        """First vocabulary row and number of rows of each tile."""
        for first in range(0, self.vocabulary, self.block_v):
            yield first, min(self.block_v, self.vocabulary - first)

    def result(self) -> Result:
        """Runs the passes."""
        if recording():
            self._record()
        if self.plan.outer == "rows":
            for number, chunk in enumerate(self.chunks):
                self._statistics(chunk)
                self._losses(chunk)
                # Last tile first, for it is still in a cache; rounded gradients are kept in the tiles' own order.
                tiles = list(self.tiles()) if self.plan.second_pass else []
                for first, rows in tiles if self.plan.narrow else reversed(tiles):
                    self._gradient(chunk, number, first, rows)
                chunk.close()
        else:
            for chunk in self.chunks:
                self._statistics(chunk)
            if self.problem.target == "jsd":
                for chunk in self.chunks:
                    self._losses(chunk)
            for first, rows in self.tiles():
                for number, chunk in enumerate(self.chunks):
                    self._gradient(chunk, number, first, rows)
                if self.sum_weight is not None and self.chunks:
                    self.d_weight[first : first + rows].copy_(self.product[:rows])
            for chunk in self.chunks:
                chunk.close()
        if self.plan.accumulator and self.chunks:
            self.d_weight[: self.vocabulary].copy_(self.sum_weight)
        if self.problem.inplace and self.gradient:
            self.d_hidden[:, self.vocabulary :].zero_()
            if self.index is not None:
                self.d_hidden.masked_fill_(~self.problem.counted[:, None], 0.0)
        p, out = self.problem, self.per_row
        total = _weighted(p.factor, out["divergence"], self.index)
        if p.label_factor is not None:
            total = total + _weighted(p.label_factor, out["nll"], self.index)
        entries = max(self.count, 1) * self.vocabulary
        filtered = torch.tensor([self.skipped / entries, math.sqrt(self.dropped)])
        d_bias = self.d_bias.to(gradient_dtype(p.student.bias.dtype)) if p.needs[2] else self.d_bias
        return Result(total.float(), *out.values(), filtered, self.d_hidden, self.d_weight, d_bias)  # pyrefly: ignore[bad-argument-count]

    def _record(self) -> None:
        p = self.problem
        sides = [p.student] + ([p.teacher] if p.target in DENSE else [])
        form = self.vectors + ("+amx" if self.amx and any(map(plans.tiled, sides)) else "")
        plan = "inplace" if p.inplace else self.plan.name
        record(Call("vocab_loss", "cpu", plan, form, self.count, self.vocabulary, self.gradient))

    def _project(self, chunk: _Chunk, side: Projection, which: int, first: int, rows: int) -> torch.Tensor:
        """Products of one tile, ``[rows, stride]``, before bias, scale and softcap."""
        at = first if self.plan.stored else 0
        z = self.logits[which][at : at + rows, : chunk.stride]
        if which in chunk.packed:
            weight = side.weight[first : first + rows]
            weight = weight if weight.stride(1) == 1 else weight.contiguous()
            kernels.amx_project(
                weight.data_ptr(), weight.stride(0), rows, chunk.packed[which].data_ptr(), chunk.stride, weight.shape[1],
                z.data_ptr(), z.stride(0),
            )  # fmt: skip
            return z
        if not isinstance(side, GivenLogits):
            return torch.mm(self._weight(side, first, rows), chunk.hidden[which].T, out=z)
        given = side.hidden[:, first : first + rows]
        z[:, : chunk.tokens].copy_((given[chunk.part] if self.index is None else given.index_select(0, chunk.rows)).T)
        z[:, chunk.tokens :].zero_()
        return z

    def _weight(self, side: Projection, first: int, rows: int) -> torch.Tensor:
        weight = side.weight[first : first + rows]
        if weight.dtype == torch.float32:
            return weight
        return self.upcast[:rows].view(-1)[: rows * weight.shape[1]].view(rows, -1).copy_(weight)

    def _tile(self, chunk: _Chunk, first: int, rows: int) -> list[torch.Tensor]:
        sides = [self.problem.student] + ([self.problem.teacher] if self.problem.target in DENSE else [])
        return [self._project(chunk, side, which, first, rows) for which, side in enumerate(sides)]

    def _statistics(self, chunk: _Chunk) -> None:
        """Maxima and sums of exponentials of every row, unless they are known."""
        if self.plan.first_pass:
            chunk.c.picking = True
            for first, rows in self.tiles():
                z = self._tile(chunk, first, rows)
                kernels.stats(self.vectors, chunk.c, z[0].data_ptr(), z[1].data_ptr() if len(z) > 1 else 0, first, rows)
            chunk.c.picking = False
        chunk.finish()

    def _losses(self, chunk: _Chunk) -> None:
        """What the gradient needs beyond the log-sum-exps: jsd's KL(s || m)."""
        if self.problem.target != "jsd" or not self.gradient:
            return
        for first, rows in self.tiles():
            z = self._second(chunk, first, rows)
            kernels.loss(self.vectors, chunk.c, z[0].data_ptr(), z[1].data_ptr(), first, rows, False)
        chunk.mix()

    def _second(self, chunk: _Chunk, first: int, rows: int) -> list[torch.Tensor]:
        """A tile of shaped logits after the first pass."""
        if self.plan.stored:
            return [z[first : first + rows] for z in self.logits]
        z = self._tile(chunk, first, rows)
        for which, tile in enumerate(z):
            kernels.shape(self.vectors, chunk.c, tile.data_ptr(), which == 0, first, rows)
        return z

    def _gradient(self, chunk: _Chunk, number: int, first: int, rows: int) -> None:
        """Loss of a tile, and its share of every gradient."""
        p = self.problem
        needs_hidden, needs_weight, needs_bias = p.needs
        z = self._second(chunk, first, rows)
        teacher = z[1].data_ptr() if len(z) > 1 else 0
        largest, squares = kernels.loss(self.vectors, chunk.c, z[0].data_ptr(), teacher, first, rows, self.gradient)
        if not self.gradient:
            return
        dz = z[0][:, : chunk.stride]
        skip = p.filter_below > 0 and largest < p.filter_below
        if skip:
            self.skipped += rows * chunk.tokens
            self.dropped += squares
        if chunk.tokens < chunk.stride:
            dz[:, chunk.tokens :].zero_()
        if needs_bias and not skip:  # before the rounded gradient takes the place of this one
            self.d_bias[first : first + rows] += dz.sum(1)
        if needs_hidden and isinstance(p.student, GivenLogits):
            part = dz[:, : chunk.tokens].T
            part = torch.zeros_like(part) if skip else part
            place = self.d_hidden[:, first : first + rows]
            if self.index is None:
                place[chunk.part].copy_(part)
            else:
                place.index_copy_(0, chunk.rows, part.to(place.dtype))
        elif self.plan.narrow:
            narrow = self._narrow(dz, chunk, first, rows, skip)
            if needs_weight and not skip:
                self._narrow_weight_gradient(narrow, chunk, number, first, rows)
            elif needs_weight and number == 0:
                self.d_weight[first : first + rows].zero_()
                if self.plan.accumulator:
                    self.sum_weight[first : first + rows].zero_()
        elif needs_hidden and not skip:
            weight = self._weight(p.student, first, rows)
            chunk.hidden_sum().addmm_(dz.T, weight)
        if needs_weight and not self.plan.narrow:
            self._weight_gradient(dz, chunk, number, first, rows, skip)

    def _narrow(self, dz: torch.Tensor, chunk: _Chunk, first: int, rows: int, skip: bool) -> torch.Tensor:
        """The tile's gradient in bfloat16, kept for the hidden states' product in the first half of the logits' memory."""
        narrow = self.narrow[:rows, : chunk.stride]
        narrow.zero_() if skip else narrow.copy_(dz)
        if self.problem.needs[0]:  # the tiles up to here have been read, and two of these take the place of one of those
            self._kept(chunk)[first : first + rows].copy_(narrow)
        return narrow

    def _kept(self, chunk: _Chunk) -> torch.Tensor:
        return self.logits[0].view(-1).view(torch.bfloat16)[: self.vocabulary * chunk.stride].view(self.vocabulary, -1)

    def narrow_hidden_gradient(self, chunk: _Chunk) -> torch.Tensor:
        """``[stride, d]`` bfloat16, one product over the whole vocabulary, rounded once."""
        return torch.mm(self._kept(chunk).T, self.problem.student.weight[: self.vocabulary])

    def _narrow_weight_gradient(self, narrow: torch.Tensor, chunk: _Chunk, number: int, first: int, rows: int) -> None:
        target = self.d_weight[first : first + rows]
        # torch's 16-bit product multiplies what `out` held by 0, for some shapes: NaN in fresh memory would stay.
        if number == 0 and not self.plan.accumulator:
            torch.mm(narrow, chunk.narrow_hidden, out=target.zero_())
            return
        product = torch.mm(narrow, chunk.narrow_hidden, out=self.product[:rows].zero_())
        if self.plan.accumulator:
            target = self.sum_weight[first : first + rows]
        target.copy_(product) if number == 0 else target.add_(product)

    def _weight_gradient(self, dz: torch.Tensor, chunk: _Chunk, number: int, first: int, rows: int, skip: bool) -> None:
        outer = self.plan.outer == "vocabulary"
        if self.direct or self.plan.accumulator:
            out = (self.d_weight if self.direct else self.sum_weight)[first : first + rows]
        else:
            out = self.product[:rows]
        fresh = number == 0 or not (self.direct or self.plan.accumulator or outer)  # else it holds the chunks before
        if skip:
            out.zero_() if fresh else None
        elif fresh:
            torch.mm(dz, chunk.hidden[0], out=out)
        else:
            out.addmm_(dz, chunk.hidden[0])
        if self.direct or self.plan.accumulator or outer:
            return
        target = self.d_weight[first : first + rows]
        target.copy_(out) if number == 0 else target.add_(out)


class _Chunk:
    """Some of the rows: hidden states, state and factors, padded to whole vectors."""

    def __init__(self, run: _Run, start: int, tokens: int) -> None:
        p = run.problem
        self.run, self.tokens, self.stride = run, tokens, plans.padded(tokens)
        self.part = slice(start, start + tokens)
        self.rows = None if run.index is None else run.index[self.part]
        dense = p.target in DENSE
        self.state = torch.zeros(kernels.FIELDS, self.stride, dtype=torch.float64)
        self.state[[Field.M_S, Field.M_T]] = -math.inf
        self.state[[Field.TOP_S, Field.TOP_T]] = -1
        self.state[Field.LABEL] = math.nan
        self.row = dict(zip(_ROWS, torch.zeros(len(_ROWS), self.stride, dtype=torch.float32), strict=True))
        self.row["base_s"].fill_(_NOWHERE)
        self.row["base_t"].fill_(_NOWHERE)
        gain = p.student.scale / p.student.temperature
        self.row["weight"][:tokens] = self.take(p.factor) * gain if p.target in (*DENSE, "uniform") else 0
        self.labels = None
        if p.label_factor is not None:
            self.row["own"][:tokens] = self.take(p.label_factor) * gain
            if p.labels is not None:
                self.labels = torch.full((self.stride,), -1, dtype=torch.int64)
                self.labels[:tokens] = self.take(p.labels)
                self.row["label_weight"].copy_(self.row["own"] * (self.labels >= 0))
        self._hidden: dict[int, torch.Tensor] | None = None
        self._packed: dict[int, torch.Tensor] | None = None
        self.d_hidden = None
        c = self.c = kernels.Chunk()
        c.tokens, c.stride, c.leading = tokens, self.stride, run.leading
        c.target = Target["forward" if p.target == "uniform" else p.target if p.target in DENSE else "own"]
        c.uniform, c.statistics = p.target == "uniform", p.statistics and dense
        c.beta, c.other = p.beta, 1.0 - p.beta
        c.full = p.label_factor is not None or p.filter_below > 0 or p.target in ("own", *SPARSE)
        self.biases = [_set_shape(c.student, p.student)]
        if dense:
            self.biases.append(_set_shape(c.teacher, p.teacher))
        c.state, c.partial = self.state.data_ptr(), run.partial.data_ptr()
        for name, row in self.row.items():
            setattr(c, name, row.data_ptr())
        c.labels = 0 if self.labels is None else self.labels.data_ptr()
        self.indices = self.logprobs = None
        if p.target in SPARSE:
            known = p.indices.shape[-1]
            self.indices = torch.full((self.stride, known), -1, dtype=torch.int64)
            self.indices[:tokens] = self.take(p.indices)
            self.picked = torch.full((self.stride, known), -math.inf, dtype=torch.float32)
            c.known, c.indices, c.picked = known, self.indices.data_ptr(), self.picked.data_ptr()

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The chunk's rows of a tensor over all rows."""
        return tensor[self.part] if self.rows is None else tensor.index_select(0, self.rows)

    def _sides(self) -> list[Projection]:
        p = self.run.problem
        return [p.student] + ([p.teacher] if p.target in DENSE else [])

    @property
    def hidden(self) -> dict[int, torch.Tensor]:
        """Hidden states of student (0) and teacher (1) in float32, ``[stride, d]``, zeros past the last token."""
        if self._hidden is None:
            p, self._hidden = self.run.problem, {}
            for which, side in enumerate(self._sides()):
                # Tiles take packed states; the float32 gradient of a bfloat16 head needs the student's widened all the same.
                used = which not in self.packed or (which == 0 and p.needs[1] and not self.run.plan.narrow)
                if used and not isinstance(side, GivenLogits):
                    self._hidden[which] = self._padded(side.hidden, torch.float32)
        return self._hidden

    def hidden_sum(self) -> torch.Tensor:
        """The hidden states' gradient, summed over tiles in float32, ``[stride, d]``."""
        if self.d_hidden is None:
            self.d_hidden = torch.zeros(self.stride, self.run.problem.student.hidden.shape[1], dtype=torch.float32)
        return self.d_hidden

    @property
    def packed(self) -> dict[int, torch.Tensor]:
        """Hidden states whose product runs on AMX tiles, ``[d / 2, stride]`` pairs of bfloat16."""
        if self._packed is None:
            self._packed = {}
            for which, side in enumerate(self._sides()):
                if self.run.amx and plans.tiled(side):
                    padded = self._padded(side.hidden, torch.bfloat16).contiguous()
                    self._packed[which] = padded.view(torch.int32).T.contiguous()
                    if which == 0 and self.run.plan.narrow:
                        self.narrow_hidden = padded
        return self._packed

    def _padded(self, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rows = self.take(hidden)
        if rows.dtype == dtype and self.tokens == self.stride:
            return rows
        padded = torch.zeros(self.stride, rows.shape[1], dtype=dtype)
        padded[: self.tokens] = rows
        return padded

    def finish(self) -> None:
        """Log-sum-exps, and everything that follows from them before the gradient."""
        run, p, n = self.run, self.run.problem, self.tokens
        state = self.state[:, :n]
        log_sum_s, log_sum_t = state[Field.L_S].log(), state[Field.L_T].log()
        if run.plan.first_pass:
            base_s, lse_s = state[Field.M_S], state[Field.M_S] + log_sum_s
        else:
            base_s = lse_s = self.take(p.lse_s).double()
            log_sum_s = torch.zeros_like(lse_s)
        if p.target in SPARSE:
            lse_rest, lse_s = lse_s, self._sparse(lse_s)
            base_s = torch.where(lse_rest > -math.inf, base_s, _NOWHERE)  # nothing is left beside the known entries
            log_sum_s = torch.where(lse_rest > -math.inf, log_sum_s, 0.0)
        if p.target == "uniform":
            self._set("base_t", torch.zeros_like(lse_s))
            self._set("log_sum_t", torch.full_like(lse_s, math.log(run.vocabulary)))
            self._set("gap", log_sum_s - math.log(run.vocabulary))
        elif p.target in DENSE:
            # Near zero from the sum of the differences; far from it that is log1p(-1 + rounding).
            ratio = state[Field.DIFFERENCE] / state[Field.L_T]
            gap = torch.where(ratio.abs() < 0.5, ratio.log1p(), log_sum_s - log_sum_t)
            self._set("base_t", state[Field.M_T])
            self._set("log_sum_t", log_sum_t)
            self._set("gap", gap)
            if p.target == "reverse":  # where it is infinite the gradient has no limit
                kl = (state[Field.CROSS] / state[Field.L_S] - gap).clamp_min(0)
                self._set("offset", torch.where(kl == math.inf, math.nan, kl))
            self._put("lse_t", state[Field.M_T] + log_sum_t)
        self._set("base_s", base_s)
        self._set("log_sum_s", log_sum_s)
        self.lse_s = lse_s
        self._put("lse_s", lse_s)
        if p.statistics and p.target in DENSE:
            self._put("entropy", log_sum_t - state[Field.ENERGY] / state[Field.L_T])
            self._put("agreement", (state[Field.TOP_S] == state[Field.TOP_T]).double())
        if p.label_factor is not None and self.labels is None:
            self._put("nll", lse_s)

    def _set(self, name: str, values: torch.Tensor) -> None:
        self.row[name][: self.tokens] = values

    def mix(self) -> None:
        """jsd's KL(s || m), which the gradient subtracts; the loss pass that follows sums again."""
        self._set("offset", self.state[Field.MIXED, : self.tokens])
        self.state[[Field.VALUE, Field.MIXED]] = 0

    def close(self) -> None:
        """Hands the chunk's rows over and frees its arrays."""
        p, n = self.run.problem, self.tokens
        if p.target in (*DENSE, "uniform"):
            self._put("divergence", self.state[Field.VALUE, :n])
        if self.labels is not None:
            label = self.state[Field.LABEL, :n]
            self._put("nll", self.lse_s - torch.where(self.labels[:n] < 0, 0.0, label))
        if self.run.plan.narrow and p.needs[0]:
            self.d_hidden = self.run.narrow_hidden_gradient(self)
        elif p.needs[0] and not isinstance(p.student, GivenLogits):
            self.hidden_sum()  # zeros where every block was skipped
        if self.d_hidden is not None:
            gradient = self.d_hidden[:n]
            if self.rows is None:
                self.run.d_hidden[self.part].copy_(gradient)
            else:
                self.run.d_hidden.index_copy_(0, self.rows, gradient.to(self.run.d_hidden.dtype))
        self._hidden = self._packed = self.narrow_hidden = self.d_hidden = None

    def _put(self, name: str, values: torch.Tensor) -> None:
        out = self.run.per_row[name]
        if self.rows is None:
            out[self.part] = values.float()
        else:
            out.index_copy_(0, self.rows, values.float())

    def _sparse(self, lse_rest: torch.Tensor) -> torch.Tensor:
        """Divergence and gradient at the known entries, and the factor of the rest's; returns the whole log-sum-exp."""
        p, n = self.run.problem, self.tokens
        gain = p.student.scale / p.student.temperature
        z = self.picked[:n].double()
        terms = sparse_terms(z, self.indices[:n], self.take(p.logprobs), lse_rest, p.target, self.run.vocabulary)
        factor = self.take(p.factor).double() * gain
        # The difference of the rest's probabilities spreads over the rest as the student's own does.
        self._set("own", factor * terms.rest)
        chain = 1.0
        if p.student.softcap is not None:
            chain = 1 - torch.where(self.indices[:n] >= 0, z * p.student.temperature / p.student.softcap, 0.0) ** 2
        self.picked[:n] = (terms.slope * chain * factor[:, None]).float()
        self._put("divergence", terms.divergence)
        return terms.lse


def _weighted(factor: torch.Tensor, values: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Sum of factor times value over the counted rows, in float64; a factor of 0 silences what is not finite."""
    terms = torch.where(factor == 0, 0.0, factor.double() * values.double())
    return (terms if index is None else terms[index]).sum()


def _set_shape(shape: object, side: Projection) -> torch.Tensor | None:
    """Copies the head's options; returns the bias in float32, to be kept alive."""
    shape.scale, shape.cap, shape.temperature = side.scale, side.softcap or 0.0, side.temperature
    if side.bias is None:
        return None
    bias = side.bias.float().contiguous()
    shape.bias = bias.data_ptr()
    return bias
