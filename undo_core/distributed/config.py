"""Settings of how the ranks of a run work together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks of ``torchrun`` work together; like their number, it is not part of a stage's key.

    Attributes:
        tensor: ranks that share a vocabulary head: each holds a part of its entries, computes that part of the loss for the tokens of
            all of them, and is gathered only among ranks with the same part. It must divide the number of ranks. 1 gathers the whole
            head on every rank.
    """

    tensor: int = 1

    def __post_init__(self) -> None:
        if self.tensor < 1:
            raise ValueError(f"parallel.tensor: got {self.tensor}, wanted an integer >= 1")

    def check(self, count: int) -> None:
        """Raises a ValueError if ``count`` ranks cannot be divided into groups of ``tensor``."""
        if count == 1 and self.tensor > 1:
            raise ValueError(
                f"parallel.tensor: got {self.tensor} for a process that runs alone, wanted 1, or torchrun with a multiple of "
                f"{self.tensor} processes (for undo plan: --ranks)"
            )
        if count % self.tensor:
            raise ValueError(f"parallel.tensor: got {self.tensor} on {count} ranks, wanted a divisor of {count}")
