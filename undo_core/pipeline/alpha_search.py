"""The search for the cheapest alpha whose robustness reaches a target: which alpha to try next, from what the others showed.

A tried alpha is an ordinary student of the run (noise, distill, relearn), so that an interrupted search finds its stages again and
takes the same decisions. R decides by its point estimate. An alpha is cheaper than every larger one: less damage needs less repair.

The configuration's alphas come first. If none of them reaches the target, the largest alpha allowed is tried. Then the alphas
between the largest that misses and the smallest that reaches the target are narrowed down: by the line through R at both, or by
plain bisection where that line points outside the middle half or R is not known at one of them. Each try leaves at most three
quarters of the interval, up to the resolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

Outcome = (
    float | str | None
)  # R; why it is not defined; None for a student that reached its step limit before the retain target


@dataclass(frozen=True)
class AlphaSearch:
    """Settings of a search.

    Attributes:
        target: R that is to be reached.
        resolution: distance of neighbouring alphas at which the search ends; tried alphas are its multiples.
        tries: largest number of alphas that are tried besides the configured ones.
        largest: largest alpha that is tried if no configured one reaches the target.
        configured: number of alphas that the configuration names.
    """

    target: float
    resolution: float
    tries: int
    largest: float
    configured: int

    def following(self, tried: Mapping[float, Outcome]) -> float | str:
        """Returns the next alpha to try after those ``tried``, or why the search ends."""
        for alpha, outcome in tried.items():
            if isinstance(outcome, str):
                return f"R of α = {alpha:g} is not defined ({outcome})"
        proposed = self._proposed({alpha: outcome for alpha, outcome in tried.items() if not isinstance(outcome, str)})
        if isinstance(proposed, float) and len(tried) - self.configured >= self.tries:
            return f"the budget of {self.tries} tried alphas is spent"
        return proposed

    def _proposed(self, tried: Mapping[float, float | None]) -> float | str:
        reached = [alpha for alpha, value in tried.items() if value is not None and value >= self.target]
        if reached:
            high = min(reached)
            # Without damage the student is the teacher: R is 0.
            low, value = max(((a, v) for a, v in tried.items() if a < high), default=(0.0, 0.0))
            return self._between(low, value, high, tried[high]) or "neighbouring alphas are as close as the resolution"
        low = max((alpha for alpha, value in tried.items() if value is not None), default=0.0)
        high = min((alpha for alpha in tried if alpha > low), default=None)
        if high is not None:  # it is censored
            return self._between(low, None, high, None) or f"no student from α = {high:g} on reached its retain target"
        if low < self.largest:
            return self.largest
        return "no larger alpha is allowed"

    def _between(self, low: float, at_low: float | None, high: float, at_high: float | None) -> float | None:
        """The multiple of the resolution to try between two alphas; None if they are as close as the resolution."""
        first, last = (math.floor(low / self.resolution + 1e-9) + 1, math.ceil(high / self.resolution - 1e-9) - 1)
        if high - low <= self.resolution * (1 + 1e-9) or last < first:
            return None
        share = 0.5
        if at_low is not None and at_high is not None and at_high > at_low:
            line = (self.target - at_low) / (at_high - at_low)
            share = line if 0.25 <= line <= 0.75 else 0.5
        index = min(max(round((low + share * (high - low)) / self.resolution), first), last)
        return round(index * self.resolution, 9)
