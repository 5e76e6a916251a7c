"""A chunk of tokens of a vocabulary loss: fills the ``Chunk`` of ``csrc/vocab_loss.h`` and does the arithmetic per token."""

from __future__ import annotations

import math
from typing import Protocol

import torch

from undo_kernels.cpu import plan as plans
from undo_kernels.cpu.extension import Field, Target, kernels
from undo_kernels.problem import DENSE, SPARSE, Problem
from undo_kernels.projection import GivenLogits, Projection
from undo_kernels.sparse_kl_terms import sparse_terms

_PER_TOKEN = ("base_s", "base_t", "log_sum_s", "log_sum_t", "gap", "offset", "weight", "own", "label_weight")
_NOWHERE = 1e30  # base of the padding lanes past the last token, which makes every probability there 0


class Run(Protocol):
    """The attributes of a call that its chunks use."""

    problem: Problem
    index: torch.Tensor | None
    vocabulary: int
    plan: plans.CpuPlan
    bfloat16: str
    leading: int
    partial: torch.Tensor
    per_token: dict[str, torch.Tensor]
    d_hidden: torch.Tensor

    def narrow_hidden_gradient(self, chunk: Chunk) -> torch.Tensor:
        """Returns the gradient of the chunk's hidden states, computed from its gradient tiles in bfloat16."""
        ...


class Chunk:
    """Some tokens of a call: hidden states, running log-sum-exp statistics and factors, padded to whole vectors."""

    def __init__(self, run: Run, number: int, start: int, tokens: int) -> None:
        p, self.number = run.problem, number
        self.run, self.tokens, self.stride = run, tokens, plans.padded(tokens)
        self.part = slice(start, start + tokens)
        self.index = None if run.index is None else run.index[self.part]
        dense = p.target in DENSE
        self.state = torch.zeros(kernels.FIELDS, self.stride, dtype=torch.float64)
        self.state[[Field.M_S, Field.M_T]] = -math.inf
        self.state[[Field.TOP_S, Field.TOP_T]] = -1
        self.state[Field.LABEL] = math.nan
        self.per_token = dict(zip(_PER_TOKEN, torch.zeros(len(_PER_TOKEN), self.stride, dtype=torch.float32), strict=True))
        self.per_token["base_s"].fill_(_NOWHERE)
        self.per_token["base_t"].fill_(_NOWHERE)
        gain = p.student.scale / p.student.temperature
        self.per_token["weight"][:tokens] = self.take(p.factor) * gain if p.target in (*DENSE, "uniform") else 0
        self.unseen = None if p.unseen is None else self.take(p.unseen).nonzero().squeeze(-1)
        self.labels = None
        if p.label_factor is not None:
            self.per_token["own"][:tokens] = self.take(p.label_factor) * gain
            if p.labels is not None:
                self.labels = torch.full((self.stride,), -1, dtype=torch.int64)
                self.labels[:tokens] = self.here(self.take(p.labels))
                self.per_token["label_weight"].copy_(self.per_token["own"] * (self.labels >= 0))
        self._hidden: dict[int, torch.Tensor] | None = None
        self._packed: dict[int, torch.Tensor] | None = None
        self.d_hidden = None
        c = self.c = kernels.Chunk()
        c.tokens, c.stride, c.leading = tokens, self.stride, run.leading
        c.target = Target["forward" if p.target == "uniform" else p.target if p.target in DENSE else "own"]
        c.uniform, c.statistics = p.target == "uniform", p.statistics and dense
        c.beta, c.other = p.beta, 1.0 - p.beta
        c.own_term = p.label_factor is not None
        self.biases = [_set_shape(c.student, p.student)]
        if dense:
            self.biases.append(_set_shape(c.teacher, p.teacher))
        c.state, c.partial = self.state.data_ptr(), run.partial.data_ptr()
        for name, values in self.per_token.items():
            setattr(c, name, values.data_ptr())
        c.labels = 0 if self.labels is None else self.labels.data_ptr()
        self.indices = self.logprobs = None
        if p.target in SPARSE:
            known = p.indices.shape[-1]
            self.indices = torch.full((self.stride, known), -1, dtype=torch.int64)
            self.indices[:tokens] = self.here(self.take(p.indices))
            self.picked = torch.full((self.stride, known), -math.inf, dtype=torch.float32)
            c.known, c.indices, c.picked = known, self.indices.data_ptr(), self.picked.data_ptr()

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the chunk's part of a tensor over all tokens."""
        return tensor[self.part] if self.index is None else tensor.index_select(0, self.index)

    def here(self, indices: torch.Tensor) -> torch.Tensor:
        """Returns indices into the vocabulary as indices into the entries of this process."""
        shard = self.run.problem.shard
        return indices if shard is None else shard.local(indices, self.run.vocabulary)

    def _sides(self) -> list[Projection]:
        p = self.run.problem
        return [p.student] + ([p.teacher] if p.target in DENSE else [])

    @property
    def hidden(self) -> dict[int, torch.Tensor]:
        """Hidden states of student (0) and teacher (1) in float32, ``[stride, d]``, with zeros past the last token."""
        if self._hidden is None:
            p, self._hidden = self.run.problem, {}
            for which, side in enumerate(self._sides()):
                # A bfloat16 product takes packed hidden states, but a weight gradient in float32 also needs the student's in float32.
                used = which not in self.packed or (which == 0 and p.needs[1] and not self.run.plan.narrow)
                if used and not isinstance(side, GivenLogits):
                    self._hidden[which] = self._padded(side.hidden, torch.float32)
        return self._hidden

    def hidden_sum(self) -> torch.Tensor:
        """Returns the gradient of the hidden states, summed over tiles in float32, ``[stride, d]``."""
        if self.d_hidden is None:
            self.d_hidden = torch.zeros(self.stride, self.run.problem.student.hidden.shape[1], dtype=torch.float32)
        return self.d_hidden

    @property
    def packed(self) -> dict[int, torch.Tensor]:
        """Hidden states as the bfloat16 product takes them (``csrc/bf16_product.h``); only of the sides that it computes."""
        if self._packed is None:
            self._packed = {}
            for which, side in enumerate(self._sides()):
                if self.run.bfloat16 and plans.tiled(side):
                    padded = self._padded(side.hidden, torch.bfloat16).contiguous()
                    if padded.storage_offset() % 2:  # a pair of k would begin inside a word
                        padded = padded.clone()
                    panels = padded.view(torch.int32).unflatten(0, (-1, kernels.PRODUCT_TOKENS))
                    self._packed[which] = panels.transpose(1, 2).contiguous()
                    if which == 0 and self.run.plan.narrow:
                        self.narrow_hidden = padded
        return self._packed

    def _padded(self, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        taken = self.take(hidden)
        if taken.dtype == dtype and self.tokens == self.stride:
            return taken
        padded = torch.zeros(self.stride, taken.shape[1], dtype=dtype)
        padded[: self.tokens] = taken
        return padded

    def sums(self) -> dict[str, torch.Tensor]:
        """Returns the sums over this process's entries, as :meth:`VocabularyShard.merged` takes them."""
        p, n = self.run.problem, self.tokens
        dense = p.target in DENSE
        names = ["m_s", "l_s"] + ["m_t", "l_t", "difference"] * dense + ["cross"] * (p.target == "reverse")
        names += ["energy", "top_s", "top_t"] * self.c.statistics + ["label"] * (self.labels is not None)
        found = {name: self.state[Field[name.upper()], :n] for name in names}
        if p.target in SPARSE:
            found["picked"] = torch.where(self.indices[:n] >= 0, self.picked[:n], 0.0)
        return found

    def put_sums(self, sums: dict[str, torch.Tensor]) -> None:
        """Replaces the sums by those over the whole vocabulary."""
        n = self.tokens
        if "picked" in sums:
            self.picked[:n] = sums.pop("picked")
        for name, values in sums.items():
            self.state[Field[name.upper()], :n] = values

    def finish(self) -> None:
        """Computes the log-sum-exps and the values per token that the gradient derives from them."""
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
            base_s = torch.where(lse_rest > -math.inf, base_s, _NOWHERE)  # -inf: every entry is a known one
            log_sum_s = torch.where(lse_rest > -math.inf, log_sum_s, 0.0)
        if p.target == "uniform":
            self._set("base_t", torch.zeros_like(lse_s))
            self._set("log_sum_t", torch.full_like(lse_s, math.log(p.student.entries)))
            self._set("gap", log_sum_s - math.log(p.student.entries))
        elif p.target in DENSE:
            # log1p is exact near zero. Far from it, the ratio may be -1 plus a rounding error, and log1p would amplify the
            # error.
            ratio = state[Field.DIFFERENCE] / state[Field.L_T]
            gap = torch.where(ratio.abs() < 0.5, ratio.log1p(), log_sum_s - log_sum_t)
            self._set("base_t", state[Field.M_T])
            self._set("log_sum_t", log_sum_t)
            self._set("gap", gap)
            if p.target == "reverse":  # where KL is infinite its gradient is undefined: NaN
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
        self.per_token[name][: self.tokens] = values

    def mix(self) -> None:
        """Stores KL(s || m), which the gradient of the JSD subtracts, and resets the sums for the pass that follows."""
        self._set("offset", self.state[Field.MIXED, : self.tokens])
        self.value = self.state[Field.VALUE].clone()
        self.state[[Field.VALUE, Field.MIXED]] = 0

    def close(self) -> None:
        """Writes the chunk's values to the outputs and frees its arrays."""
        p, n = self.run.problem, self.tokens
        if p.target in (*DENSE, "uniform"):
            self._put("divergence", self.state[Field.VALUE, :n])
        if self.labels is not None:
            label = self.state[Field.LABEL, :n]
            self._put("nll", self.lse_s - torch.where(self.take(p.labels) < 0, 0.0, label))
        if self.run.plan.narrow and p.needs[0]:
            self.d_hidden = self.run.narrow_hidden_gradient(self)
        elif p.needs[0] and not isinstance(p.student, GivenLogits):
            self.hidden_sum()  # allocates zeros if this process has no vocabulary entry
        if self.d_hidden is not None:
            gradient = self.d_hidden[:n]
            if self.index is None:
                self.run.d_hidden[self.part].copy_(gradient)
            else:
                self.run.d_hidden.index_copy_(0, self.index, gradient.to(self.run.d_hidden.dtype))
        self._hidden = self._packed = self.narrow_hidden = self.d_hidden = None

    def _put(self, name: str, values: torch.Tensor) -> None:
        out = self.run.per_token[name]
        if self.index is None:
            out[self.part] = values.float()
        else:
            out.index_copy_(0, self.index, values.float())

    def _sparse(self, lse_rest: torch.Tensor) -> torch.Tensor:
        """Computes divergence and gradient against a sparse teacher; returns the log-sum-exp over all entries."""
        p, n = self.run.problem, self.tokens
        gain = p.student.scale / p.student.temperature
        z = self.picked[:n].double()
        indices = self.take(p.indices)
        terms = sparse_terms(z, indices, self.take(p.logprobs), lse_rest, p.target, p.student.entries)
        factor = self.take(p.factor).double() * gain
        # The gradient of the rest is divided among its entries in proportion to the student's probabilities.
        self._set("own", factor * terms.rest)
        chain = 1.0
        if p.student.softcap is not None:
            chain = 1 - torch.where(indices >= 0, z * p.student.temperature / p.student.softcap, 0.0) ** 2
        self.picked[:n] = (terms.slope * chain * factor[:, None]).float()
        self._put("divergence", terms.divergence)
        return terms.lse


def _set_shape(shape: object, side: Projection) -> torch.Tensor | None:
    """Copies a head's options into ``shape``; returns the bias in float32, whose address ``shape`` holds: keep it alive."""
    shape.scale, shape.cap, shape.temperature = side.scale, side.softcap or 0.0, side.temperature
    if side.bias is None:
        return None
    bias = side.bias.float().contiguous()
    shape.bias = bias.data_ptr()
    return bias
