"""Rounding to nearest with few bits and without any package: the plain quantisation that released models undergo.

For each group of ``group_size`` columns in a row, with the group's smallest value ``m``, its largest ``M`` and
``s = (M - m) / (2**bits - 1)``: ``W <- m + s * round((W - m) / s)``, the nearest of ``2**bits`` evenly spaced values (round to
nearest on an asymmetric grid, the baseline of Frantar et al. 2022, arXiv 2210.17323). That quantisation can restore an unlearned
capability: Zhang et al. 2024 (arXiv 2410.16454).

``kind: quantise`` rounds symmetrically by torchao instead, as the libraries that load models do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from undo_core.attacks.intervention import Given, Intervention, check_numbers, grid
from undo_core.attacks.matrices import matrices_of


@dataclass(frozen=True)
class Round(Intervention):
    """Rounds the weights of the linear layers to few bits.

    Attributes:
        kind: round.
        bits: numbers of bits of a weight, each from 1 to 8.
        group_size: columns that share a range; 0 for whole rows.
    """

    kind: Literal["round"] = "round"
    bits: list[int] = grid("bits", 4, 3, 2)
    group_size: int = 0

    def __post_init__(self) -> None:
        check_numbers("bits", self.bits, 1, 8)
        if self.group_size < 0:
            raise ValueError(f"group_size: got {self.group_size}, wanted an integer >= 0")

    @torch.no_grad()
    def apply(self, model: PreTrainedModel, given: Given) -> None:
        (bits,) = self.bits
        matrices = matrices_of(model)
        for name, matrix in matrices.items():
            if self.group_size and matrix.shape[1] % self.group_size:
                raise ValueError(
                    f"group_size: got {self.group_size}, wanted a divisor of the {matrix.shape[1]} columns of {name}"
                )
        for matrix in matrices.values():
            groups = matrix.float().reshape(len(matrix), -1, self.group_size or matrix.shape[1])
            low, high = groups.aminmax(dim=-1, keepdim=True)
            step = (high - low) / (2**bits - 1)
            steps = torch.where(step > 0, (groups - low) / step, 0.0).round()  # a group of equal values keeps them
            matrix.copy_((low + steps * step).reshape(matrix.shape))
