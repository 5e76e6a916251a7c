"""Magnitude pruning: the smallest weights become zero, which can remove a shallow suppression before it removes the capability.

``W_ij <- 0`` where ``|W_ij|`` is among the smallest ``share`` of all (Han et al. 2015, arXiv 1506.02626), of the matrix or of all
matrices together. Pruning as an attack on a suppressed capability: Jain et al. 2024 (arXiv 2311.12786).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from undo_core.attacks.intervention import Given, Intervention, check_names, check_numbers, grid
from undo_core.attacks.matrices import matrices_of

SCOPES = ("matrix", "global")


@dataclass(frozen=True)
class Prune(Intervention):
    """Sets the smallest weights of the linear layers to zero.

    Attributes:
        kind: prune.
        shares: shares of the weights that become zero, each from 0 to 1. Ties with the largest of them become zero too.
        scopes: matrix, where the share is that of each matrix, or global, where it is that of all matrices together.
    """

    kind: Literal["prune"] = "prune"
    shares: list[float] = grid("share", 0.1, 0.3, 0.5)
    scopes: list[str] = grid("scope", *SCOPES)

    def __post_init__(self) -> None:
        check_numbers("shares", self.shares, 0, 1)
        check_names("scopes", self.scopes, SCOPES)

    @torch.no_grad()
    def apply(self, model: PreTrainedModel, given: Given) -> None:
        (share,), (scope,) = self.shares, self.scopes
        matrices = list(matrices_of(model).values())
        for group in [matrices] if scope == "global" else [[matrix] for matrix in matrices]:
            largest = kth_smallest(group, round(share * sum(matrix.numel() for matrix in group)))
            for matrix in group:
                matrix.masked_fill_(matrix.abs() <= largest, 0.0)


def kth_smallest(tensors: Sequence[torch.Tensor], k: int) -> float:
    """Returns the ``k``-th smallest absolute value of all tensors together; a negative number if ``k`` is 0.

    The bits of a positive float32 increase with it as an integer, so that 31 bisections find the value exactly without sorting.
    Memory: one tensor.
    """
    if k == 0:
        return -1.0
    low, high = 0, 0x7F800000
    while low < high:
        middle = (low + high) // 2
        if sum(int((tensor.float().abs().view(torch.int32) <= middle).sum()) for tensor in tensors) >= k:
            high = middle
        else:
            low = middle + 1
    return float(torch.tensor(high, dtype=torch.int32).view(torch.float32))
