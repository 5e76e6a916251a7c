"""The fused ops of a model's head, for this rank's own tokens, wherever the entries of the head are.

Each has the arguments of the op of its name in :mod:`undo_core.ops`, with a :class:`undo_core.models.Head` in the place of weight, bias,
scale and softcap. A head that several ranks share (``parallel.tensor``) is called for the tokens of all of them: every one of these
ranks must call the op, with the same options. A loss that is not ``"none"`` must then be divided by a ``normalizer`` that is the same
on all ranks; each of them gets an equal share of the sum over their tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from undo_kernels.ops.checks import is_dtensor

from undo_core import ops
from undo_core.distributed.vocabulary import Group, Sharing, Tokens, local_part
from undo_core.models import Head

LOGITS = 1 << 25  # largest number of logits held at once
IGNORED = -100


def linear_cross_entropy(
    hidden: torch.Tensor, head: Head, labels: torch.Tensor, *, token_weight: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """Cross-entropy of ``labels``; -100 is ignored."""
    tokens = Tokens(head, labels.shape)
    value = ops.linear_cross_entropy(
        tokens.all(hidden),
        head.weight,
        tokens.all(labels, IGNORED),
        token_weight=tokens.all(token_weight),
        **options,
        **head.options(),
    )
    return tokens.mine(value)


def linear_uniform_kl(hidden: torch.Tensor, head: Head, *, mask: torch.Tensor, **options: Any) -> torch.Tensor:
    """``KL(uniform || p)`` of the tokens in ``mask``."""
    tokens = Tokens(head, mask.shape)
    value = ops.linear_uniform_kl(tokens.all(hidden), head.weight, mask=tokens.all(mask), **options, **head.options())
    return tokens.mine(value)


def linear_kl_div(
    hidden: torch.Tensor,
    head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    *,
    mask: torch.Tensor,
    token_weight: torch.Tensor | None = None,
    teacher_lse: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Divergence of a teacher's and a student's distributions of the tokens in ``mask``; both heads are shared, or none is."""
    tokens = Tokens(head, mask.shape)
    value = ops.linear_kl_div(
        tokens.all(hidden),
        head.weight,
        tokens.all(teacher_hidden),
        teacher_head.weight.detach(),
        mask=tokens.all(mask),
        token_weight=tokens.all(token_weight),
        teacher_lse=tokens.all(teacher_lse),
        **options,
        **head.options("student_"),
        **teacher_head.options("teacher_"),
    )
    return tokens.mine(value)


def linear_sparse_kl_div(
    hidden: torch.Tensor, head: Head, indices: torch.Tensor, logprobs: torch.Tensor, *, mask: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Forward KL of the tokens in ``mask`` against a teacher of which only some entries of each token are known."""
    tokens = Tokens(head, mask.shape)
    value = ops.linear_sparse_kl_div(
        tokens.all(hidden),
        head.weight,
        tokens.all(indices, -1),
        tokens.all(logprobs),
        mask=tokens.all(mask),
        **options,
        **head.options(),
    )
    return tokens.mine(value)


@torch.no_grad()
def most_likely(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Returns the tokens ``[n]`` with the largest logits, the first of equals, from hidden states ``[n, d]``."""
    tokens, holders = Tokens(head, hidden.shape[:1]), _holders(head)
    every, (weight, first) = tokens.all(hidden), local_part(head.weight)
    weight, bias = weight.float().T, None if head.bias is None else local_part(head.bias)[0].float()
    # Of the largest part, so that all holders split the tokens alike.
    entries = -(-len(head.weight) // head.weight.device_mesh.size()) if is_dtensor(head.weight) else weight.shape[1]
    found = []
    for part in every.split(max(1, LOGITS // entries)):
        if not part.numel():
            found.append(part.new_zeros(0, dtype=torch.int64))
        elif holders is None:
            found.append(_logits(part.float() @ weight, bias, head).argmax(-1))
        else:
            best = part.new_full((2, len(part)), -torch.inf, dtype=torch.float64)
            if weight.shape[1]:
                values, entries = _logits(part.float() @ weight, bias, head).max(-1)
                best = torch.stack([values.double(), (entries + first).double()])
            bests = holders.gather(best[None])
            holder = bests[:, 0].argmax(0)  # the first of equals: ranks hold the entries in their order
            found.append(bests[:, 1].gather(0, holder[None])[0].long())
    return tokens.mine(torch.cat(found))


def sampler(head: Head, vocab_size: int | None = None) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Returns a function that draws tokens ``[n]`` from hidden states ``[n, d]`` and numbers ``[n]`` in [0, 1).

    A drawn token is the first whose cumulative probability exceeds the number. The head must be whole; its entries from ``vocab_size``
    on are never drawn. Memory: of a 16-bit head a float32 copy, for as long as the function exists.
    """
    weight, bias = head.weight[:vocab_size].detach().float().T, None if head.bias is None else head.bias[:vocab_size].float()

    @torch.no_grad()
    def draw(hidden: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        found, size = [], max(1, LOGITS // weight.shape[1])
        for part, number in zip(hidden.split(size), uniform.split(size), strict=True):
            sums = _logits(part.float() @ weight, bias, head).softmax(-1).cumsum(-1, dtype=torch.float64)
            place = torch.searchsorted(sums, number.double()[:, None] * sums[:, -1:], right=True)[:, 0]
            found.append(place.clamp_max(weight.shape[1] - 1))
        return torch.cat(found)

    return draw


@torch.no_grad()
def logits_of(hidden: torch.Tensor, head: Head, entries: torch.Tensor) -> torch.Tensor:
    """Returns ``[n, k]`` float32: logits of vocabulary ``entries`` ``[n, k]`` from hidden states ``[n, d]``."""
    tokens, holders = Tokens(head, hidden.shape[:1]), _holders(head)
    every, asked, (weight, first) = tokens.all(hidden), tokens.all(entries), local_part(head.weight)
    held = (asked >= first) & (asked < first + len(weight))
    products = torch.zeros(asked.shape, dtype=torch.float32, device=every.device)
    if len(weight):
        places = torch.where(held, asked - first, 0)
        products = torch.bmm(weight[places].float(), every.float()[:, :, None])[:, :, 0]
        if head.bias is not None:
            products = products + local_part(head.bias)[0][places].float()
    if holders is not None:
        products = holders.sum_(torch.where(held, products, 0.0))
    return tokens.mine(_logits(products, None, head))


def _holders(head: Head) -> Sharing | None:
    """The ranks among which the entries of a head are divided, whether or not each has tokens of its own; None for a whole head."""
    return Group(head.weight.device_mesh) if head.sharing is None and is_dtensor(head.weight) else head.sharing


def _logits(logits: torch.Tensor, bias: torch.Tensor | None, head: Head) -> torch.Tensor:
    """Applies the head's bias, scale and softcap to ``hidden @ weight.T``. The softcap matters because it can create ties."""
    if bias is not None:
        logits = logits + bias
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
