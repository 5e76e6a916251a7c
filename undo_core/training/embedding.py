"""In-place gradient of an input embedding that shares its weight with the head.

A tied weight gets two gradients. The head's is dense, ``[V, d]``. The embedding's has at most one non-zero row per token, but
``torch.nn.functional.embedding`` returns it as ``[V, d]`` too. For a vocabulary of 256,000 this second gradient is the largest
tensor of the backward pass. Here its rows are added to ``weight.grad`` in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from undo_kernels.accumulation import OnlyBackward, check_unwatched, refuse_double_backward
from undo_kernels.ops.checks import is_dtensor

_NAME = "tied_gradient_in_place"
LEAST_BYTES = 4 << 20  # size of the weight below which a second gradient costs less than avoiding it


class TiedEmbedding:
    """Tied weight whose embedding gradient is added in place; see :func:`tied_gradient_in_place`."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self._complete: Callable[[torch.Tensor], None] | None = None
        self._lookups = 0  # embedding lookups whose backward pass has not run yet
        self._accumulated = False  # whether the head's gradient is in weight.grad
        self.active = True  # until the end of the context

    def on_gradient(self, complete: Callable[[torch.Tensor], None]) -> torch.utils.hooks.RemovableHandle:
        """Registers ``complete(weight)``, called in each backward pass once ``weight.grad`` holds both gradients.

        It replaces ``weight.register_post_accumulate_grad_hook``, which would fire after the head's gradient alone.
        """
        self._complete = complete
        return self.weight.register_post_accumulate_grad_hook(self._head_came)

    def check(self) -> None:
        """Refuses a hook that was registered since, except that of :meth:`on_gradient`."""
        if self._complete is None:
            check_unwatched(_NAME, self.weight)

    def reset(self) -> None:
        """Forgets pending lookups before a step: a forward pass may have run with gradients but without a backward pass."""
        self._lookups, self._accumulated = 0, False

    def _head_came(self, weight: torch.Tensor) -> None:
        self._accumulated = True
        self._finish()

    def _finish(self) -> None:
        if self._complete is not None and self._accumulated and not self._lookups:
            self._accumulated = False
            self._complete(self.weight)


class _Lookup(torch.autograd.Function):
    """Embedding lookup whose backward pass adds to rows of ``weight.grad`` in place."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, ids: torch.Tensor, tied: TiedEmbedding, padding: int | None) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.tied, ctx.padding = tied, padding
        tied._lookups += 1
        return tied.weight.detach()[ids]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, ...]:
        refuse_double_backward(_NAME)
        (ids,) = ctx.saved_tensors
        ctx.tied.check()
        weight = ctx.tied.weight
        if weight.requires_grad:  # not frozen since the forward
            if ctx.padding is not None:
                gradient = gradient.masked_fill((ids == ctx.padding)[..., None], 0.0)
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            # The rows of a token are summed in float32 in a fixed order and added once: deterministic, and accurate in bfloat16.
            tokens, place = _distinct(ids.flatten())
            rows = gradient.flatten(0, -2).to(torch.promote_types(weight.dtype, torch.float32))
            sums = torch.ops.aten.embedding_dense_backward(rows, place, len(tokens), -1, False)
            weight.grad.index_copy_(0, tokens, sums.add_(weight.grad[tokens]).to(weight.dtype))
        ctx.tied._lookups -= 1
        ctx.tied._finish()
        return None, None, None, None


def _distinct(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the distinct ids and the index of each id among them; on the meta device, all ids are assumed distinct."""
    return (ids, torch.empty_like(ids)) if ids.is_meta else ids.unique(return_inverse=True)


@contextlib.contextmanager
def tied_gradient_in_place(model: PreTrainedModel) -> Iterator[TiedEmbedding | None]:
    """Context in which the backward pass adds the input embedding's gradient to the head's in place::

        with tied_gradient_in_place(model):
            for batch in batches:
                loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()

    It works in any loop or trainer. Everything else, ``zero_grad``, gradient accumulation, clipping, autocast and a loss scaler
    included, stays as it is. The gradient is the same up to the order of a sum. Memory: ``[tokens, d]`` instead of ``[V, d]``.
    With gradient accumulation, ``accumulate_into=model.lm_head.weight`` of the losses (:mod:`undo_kernels.ops`) saves the head's
    second gradient too. Each forward pass and its backward pass both lie inside the context. Call ``backward()`` without ``inputs``:
    autograd would run only what leads to them, and the embedding's gradient does not, so that it would be missing without an error.

    Yields the tied weight, or None where there is nothing to save: the two are not tied, the weight is frozen or below 4 MiB, or
    its embedding has ``max_norm``, ``sparse`` or ``scale_grad_by_freq``. A lookup in a graph of ``torch.compile`` has its dense
    gradient.

    Raises:
        ValueError: the weight is a DTensor, has a gradient hook, or is trained by several processes: what is added in place would
            be missed. Also where the embedding gets another weight within the context.
        RuntimeError: in a backward pass that is differentiated again, or by ``torch.autograd.grad`` with respect to the weight.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and isinstance(embedding, nn.Embedding) and head.weight is embedding.weight
    plain = tied and embedding.weight.requires_grad and embedding.max_norm is None and "forward" not in vars(embedding)
    if not plain or embedding.scale_grad_by_freq or embedding.sparse or embedding.weight.nbytes < LEAST_BYTES:
        yield None
        return
    if is_dtensor(embedding.weight):
        raise ValueError(
            f"{_NAME}: got a model whose embedding is a DTensor, wanted a plain tensor (FSDP reduces the gradient itself)"
        )
    check_unwatched(_NAME, embedding.weight)
    own = TiedEmbedding(embedding.weight)
    guard = own.weight.register_hook(OnlyBackward(_NAME, own.weight))
    anchor = torch.zeros((), device=embedding.weight.device, requires_grad=True)
    kind, padding = type(embedding), embedding.padding_idx

    class InPlace(kind):
        """Class of the embedding within the context. A deep copy of the module has it too, and looks up its own weight."""

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            taken = self is embedding and own.active and torch.is_grad_enabled() and self.weight.requires_grad
            if not taken or torch.compiler.is_compiling():
                return super().forward(ids)
            if self.weight is not own.weight:
                raise ValueError(
                    f"{_NAME}: got a model whose embedding has another weight than when the context began, wanted the same parameter"
                )
            own.check()
            rows = _Lookup.apply(anchor, ids, own, padding).flatten(0, -2)
            # Run the module's own forward, which may scale its output, with these rows as its weight. Hooks run around it, once.
            order = torch.arange(len(rows), device=ids.device).view(ids.shape)
            self.padding_idx, self._parameters["weight"] = None, rows
            try:
                return super().forward(order)
            finally:
                self.padding_idx, self._parameters["weight"] = padding, own.weight

    InPlace.__name__, InPlace.__qualname__ = kind.__name__, kind.__qualname__
    embedding.__class__ = InPlace
    try:
        yield own
    finally:
        own.active = False
        if type(embedding) is InPlace:  # else another class was made of it, which goes on with the plain lookup
            embedding.__class__ = kind
        guard.remove()
