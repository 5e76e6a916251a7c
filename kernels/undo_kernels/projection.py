"""Projection to logits: ``z = softcap(scale * (h @ W.T + b)) / temperature``, in float32 or float64.

``logits()`` allocates all ``[tokens, V]`` of them. The reference backend calls it; the fused backends avoid that memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from undo_kernels.accumulation import AddedProduct
from undo_kernels.matmul import Product
from undo_kernels.vocabulary_shard import SummedGradient, VocabularyShard


@dataclass(frozen=True)
class Projection:
    """Hidden states and the head that turns them into logits.

    Attributes:
        hidden: ``[tokens, d]``.
        weight: ``[V, d]``.
        bias: ``[V]`` or None.
        scale: factor on ``h @ W.T + b``.
        softcap: ``c`` of ``c * tanh(z / c)``, or None.
        temperature: divides the capped logits.
        vocab_size: number of vocabulary entries; later rows of the weight are padding and ignored. None: every row is an entry.
        shard: where the entries lie in the whole vocabulary, if weight and bias are this process's part of a sharded head.
        accumulate_into: parameter that the weight is a leading part of, and whose gradient the weight's is added to in place; None:
            autograd accumulates it.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    vocab_size: int | None = None
    shard: VocabularyShard | None = None
    accumulate_into: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocabulary(self) -> int:
        """Number of vocabulary entries of ``weight``."""
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    @property
    def entries(self) -> int:
        """Number of vocabulary entries over all processes that share the head."""
        return self.vocabulary if self.shard is None else self.shard.entries

    @property
    def widest(self) -> int:
        """Largest number of vocabulary entries that a process holds; decisions that all must take alike depend on it."""
        return self.vocabulary if self.shard is None else self.shard.widest

    def take(self, tokens: torch.Tensor | slice) -> Projection:
        """Returns the same head on a subset of the tokens."""
        return replace(self, hidden=self.hidden[tokens])

    def logits(self) -> torch.Tensor:
        """Returns ``[tokens, vocabulary]`` in float32, or in float64 if an operand is float64."""
        dtype = compute_dtype(self.hidden, self.weight)
        z = self._products(dtype)
        if self.bias is not None:
            z = z + self.bias[: self.vocabulary].to(dtype)
        return shape_logits(z, self.scale, self.softcap, self.temperature)

    def _products(self, dtype: torch.dtype) -> torch.Tensor:
        if self.accumulate_into is not None:
            return AddedProduct.apply(self.hidden, self.weight, self.accumulate_into, self.vocabulary, dtype)
        hidden, weight = self.hidden.to(dtype), self.weight[: self.vocabulary].to(dtype)
        if self.shard is not None and hidden.requires_grad:
            hidden = SummedGradient.apply(hidden, self.shard)
        # Reductions over the vocabulary are several times faster if the longer of the two dimensions is contiguous.
        return Product.apply(hidden, weight) if self.tokens <= self.vocabulary else Product.apply(weight, hidden).T


class GivenLogits(Projection):
    """Precomputed logits, stored in ``hidden``; there is no head, scale or softcap."""

    @property
    def vocabulary(self) -> int:
        return self.hidden.shape[-1] if self.vocab_size is None else self.vocab_size

    def take(self, tokens: torch.Tensor | slice) -> Projection:
        return GivenLogits(self.hidden[tokens], self.weight, temperature=self.temperature, vocab_size=self.vocab_size)

    def logits(self) -> torch.Tensor:
        z = self.hidden[:, : self.vocabulary]
        z = z if z.dtype == torch.float64 else z.float()
        return z if self.temperature == 1.0 else z / self.temperature


def shape_logits(z: torch.Tensor, scale: float, softcap: float | None, temperature: float) -> torch.Tensor:
    """Applies scale, softcap and temperature to the matrix product."""
    if scale != 1.0:
        z = z * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z if temperature == 1.0 else z / temperature


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Returns float64 if an operand is float64, else float32: logits are never rounded to 16 bits."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
