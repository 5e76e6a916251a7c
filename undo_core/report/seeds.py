"""Statistics over the seeds of a study: medians, bootstrap intervals, paired differences, and which of them may be called an order.

A seed is the unit that is drawn: its value holds what data, training, attack and evaluation of that seed did together. Two models
are compared by the differences of the seeds that both have. A difference counts as an order only if

- its bootstrap interval over the seeds does not contain 0, and
- Student's paired t-test gives p < 0.05 after Holm's correction for all comparisons of the same quantity, a column of the table.

The bootstrap (Efron 1979) is enumerated exactly for up to :data:`EXACT` seeds. With up to five seeds the interval of a median is the
range of the seeds; the range of n seeds holds the true median with the probability 1 - 2^(1 - n): 75 % for three, 94 % for five.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from undo_core.report.attacks import Point

LEVEL = 0.05  # two-sided
FEWEST = 3  # seeds below which there is no interval and no test
TOO_FEW = f"median over fewer than {FEWEST} seeds, too few for an interval over seeds"
EXACT = 8  # seeds up to which every resample is enumerated: 6435 different ones
DRAWS = 10_000  # resamples beyond that


@dataclass(frozen=True)
class Difference:
    """Paired differences of one quantity between two models.

    Attributes:
        seeds: seeds that both models have.
        median: median of the differences.
        interval: its bootstrap interval; None with fewer than :data:`FEWEST` seeds.
        p: of the paired t-test, uncorrected; None with fewer seeds.
        corrected: p after Holm's correction; None with fewer seeds.
    """

    seeds: tuple[int, ...]
    median: float
    interval: tuple[float, float] | None
    p: float | None
    corrected: float | None = None

    @property
    def ordered(self) -> bool:
        """Whether the difference may be called an order."""
        if self.interval is None or self.corrected is None:
            return False
        return not self.interval[0] <= 0 <= self.interval[1] and self.corrected < LEVEL


def bootstrap(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % percentile interval of the median over resampled seeds; None with fewer than :data:`FEWEST` values."""
    count = len(values)
    if count < FEWEST:
        return None
    if count <= EXACT:
        drawn = [
            (statistics.median([values[index] for index in chosen]), _ways(chosen))
            for chosen in itertools.combinations_with_replacement(range(count), count)
        ]
    else:
        generator = random.Random(0)
        drawn = [(statistics.median(generator.choices(values, k=count)), 1) for _ in range(DRAWS)]
    return _lower(drawn), -_lower([(-value, ways) for value, ways in drawn])


def paired(one: Sequence[Point], other: Sequence[Point]) -> Difference | None:
    """Differences ``one - other`` of the seeds that both have, without a correction; None if they share no seed."""
    theirs = {point.seed: point.value for point in other}
    differences = {point.seed: point.value - theirs[point.seed] for point in one if point.seed in theirs}
    if not differences:
        return None
    values = list(differences.values())
    return Difference(tuple(sorted(differences)), statistics.median(values), bootstrap(values), t_test(values))


def corrected(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """The differences in one quantity with Holm's correction over all of its tests (Holm 1979).

    The smallest of m p-values is multiplied by m, the next by m - 1 and so on; none becomes smaller than the one before it.
    """
    known = [(found.p, index, found) for index, found in enumerate(differences) if found is not None and found.p is not None]
    result, least = list(differences), 0.0
    for rank, (p, index, found) in enumerate(sorted(known, key=lambda entry: entry[:2])):
        least = max(least, min(1.0, (len(known) - rank) * p))
        result[index] = dataclasses.replace(found, corrected=least)
    return result


def t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p of Student's t-test that the mean difference is 0.

    None with fewer than :data:`FEWEST` differences, and where all are equal but not 0: the test then has no scale, and a few
    accuracies over a few hundred prompts are equal by chance.
    """
    count = len(differences)
    if count < FEWEST:
        return None
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    if deviation == 0:
        return 1.0 if mean == 0 else None
    return t_tail(abs(mean) / (deviation / math.sqrt(count)), count - 1)


def t_tail(t: float, freedom: int) -> float:
    """Probability that Student's t with so many degrees of freedom is at least ``t`` in size (Abramowitz and Stegun 26.7.3-4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    inside = math.sin(angle) * total
    return 1.0 - (2 / math.pi * (angle + inside) if odd else inside)


def _ways(chosen: Sequence[int]) -> int:
    """Number of orders in which a resample, given in ascending order, can be drawn."""
    repeats = (math.factorial(len(list(group))) for _, group in itertools.groupby(chosen))
    return math.factorial(len(chosen)) // math.prod(repeats)


def _lower(drawn: Sequence[tuple[float, int]]) -> float:
    """The smallest value below or at which at least half of :data:`LEVEL` of the resamples lie."""
    share, below = LEVEL / 2 * sum(ways for _, ways in drawn), 0
    for value, ways in sorted(drawn):
        below += ways
        if below >= share:
            return value
    raise AssertionError("the last value has all resamples below or at it")
