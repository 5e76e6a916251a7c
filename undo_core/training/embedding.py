"""The input embedding's gradient, added to the head's where the two share a weight.

A tied weight gets two gradients: the head's, ``[V, d]`` and dense, and the embedding's, which has as many rows as there are tokens
but which ``torch.nn.functional.embedding`` returns as ``[V, d]`` too. For a vocabulary of 256,000 the second one is the largest
tensor of the backward pass. Here its rows are added into ``weight.grad`` in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

LEAST_BYTES = 4 << 20  # of the weight, below which a second gradient costs less than avoiding it


class TiedEmbedding:
    """The tied weight of a model whose embedding adds its gradient in place; see :func:`tied_gradient_in_place`."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self._complete: Callable[[torch.Tensor], None] | None = None
        self._lookups = 0  # whose backward is still to come
        self._accumulated = False  # whether the head's gradient has come

    def on_gradient(self, complete: Callable[[torch.Tensor], None]) -> torch.utils.hooks.RemovableHandle:
        """Call ``complete(weight)`` in each backward pass once the head's and the embedding's gradients are both in ``weight.grad``.

        What ``weight.register_post_accumulate_grad_hook`` would do, which knows of the head's alone.
        """
        self._complete = complete
        return self.weight.register_post_accumulate_grad_hook(self._head_came)

    def reset(self) -> None:
        """Before a step: a forward pass whose backward never came, somebody's evaluation, is not waited for."""
        self._lookups, self._accumulated = 0, False

    def _head_came(self, weight: torch.Tensor) -> None:
        self._accumulated = True
        self._finish()

    def _finish(self) -> None:
        if self._complete is not None and self._accumulated and not self._lookups:
            self._accumulated = False
            self._complete(self.weight)


class _Lookup(torch.autograd.Function):
    """Rows of the weight; the backward adds to them in ``weight.grad``."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, ids: torch.Tensor, tied: TiedEmbedding, padding: int | None) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.tied, ctx.padding = tied, padding
        tied._lookups += 1
        return tied.weight.detach()[ids]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        weight = ctx.tied.weight
        if ctx.padding is not None:
            gradient = gradient.masked_fill((ids == ctx.padding)[..., None], 0.0)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        # A token's rows are summed in their order, in float32, and added once: repeatable, and right in bfloat16.
        tokens, place = _distinct(ids.flatten())
        rows = gradient.flatten(0, -2).to(torch.promote_types(weight.dtype, torch.float32))
        sums = torch.ops.aten.embedding_dense_backward(rows, place, len(tokens), -1, False)
        weight.grad.index_copy_(0, tokens, sums.add_(weight.grad[tokens]).to(weight.dtype))
        ctx.tied._lookups -= 1
        ctx.tied._finish()
        return None, None, None, None


def _distinct(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The different ids, and the place of each id among them; on the meta device, where nobody knows, as if all were different."""
    return (ids, torch.empty_like(ids)) if ids.is_meta else ids.unique(return_inverse=True)


@contextlib.contextmanager
def tied_gradient_in_place(model: PreTrainedModel) -> Iterator[TiedEmbedding | None]:
    """Within the block, training ``model`` adds its input embedding's gradient into the head's; None where the two are not tied
    or the weight is small.

    The gradient is the same up to the order of a sum. Its memory: ``[tokens, d]`` instead of ``[V, d]``. Only ``backward`` sees the
    embedding's part: ``torch.autograd.grad`` with respect to the weight gives the head's alone.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and isinstance(embedding, nn.Embedding) and head.weight is embedding.weight
    plain = tied and embedding.weight.requires_grad and embedding.max_norm is None and "forward" not in vars(embedding)
    if not plain or embedding.scale_grad_by_freq or embedding.sparse or embedding.weight.nbytes < LEAST_BYTES:
        yield None
        return
    own = TiedEmbedding(embedding.weight)
    anchor = torch.zeros((), device=embedding.weight.device, requires_grad=True)
    forward, padding = embedding.forward, embedding.padding_idx

    def rows_in_place(ids: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return forward(ids)
        rows = _Lookup.apply(anchor, ids, own, padding).flatten(0, -2)
        # The module's own forward, which may scale, on the few rows as if they were its weight.
        order = torch.arange(len(rows), device=ids.device).view(ids.shape)
        embedding.padding_idx = None
        del embedding.forward
        try:
            return torch.func.functional_call(embedding, {"weight": rows}, (order,))
        finally:
            embedding.padding_idx, embedding.forward = padding, rows_in_place

    embedding.forward = rows_in_place
    try:
        yield own
    finally:
        del embedding.forward
