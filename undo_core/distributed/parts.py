"""Values of a whole micro-batch of which every rank has a part, for losses that are no sum over sequences.

Every rank computes the same loss from the parts of all ranks. Its gradient reaches only this rank's own part, and the gradients of
the parameters are summed over the ranks: each part then counts once. An all-reduce inside autograd would count it once per rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from undo_core.distributed import ranks


def joined(own: torch.Tensor) -> torch.Tensor:
    """Returns the ranks' tensors one after another along dimension 0; only this rank's part has a gradient."""
    if ranks.count() == 1:
        return own
    lengths = ranks.gather(len(own))
    padded = own.detach().new_zeros(max(lengths), *own.shape[1:])
    padded[: len(own)] = own.detach()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    parts = [part[:length] for part, length in zip(parts, lengths, strict=True)]
    parts[ranks.rank()] = own
    return torch.cat(parts)


def added_up(own: torch.Tensor) -> torch.Tensor:
    """Returns the sum of the ranks' values; the gradient is that of this rank's own."""
    return own if ranks.count() == 1 else own + (ranks.total(own) - own).detach()


def once(value: torch.Tensor) -> torch.Tensor:
    """Returns a value that every rank computed alike, so that the sum over the ranks has it once; the gradient stays whole."""
    return value if ranks.count() == 1 else value + value.detach() * (1 / ranks.count() - 1)
