"""Which measure of the inside predicts relearning: rank correlations with the worst case, and their intervals."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from undo_core.report.inside import measures_of
from undo_core.report.metrics import Report, Stat
from undo_core.report.robustness import DIVERGED
from undo_core.report.table import Cell, Table

FEWEST = 5  # pairs of model and seed below which no correlation is stated
DRAWS = 2000
Pair = tuple[float, float]


def correlation_table(report: Report) -> Table:
    """Table of Spearman's rank correlation of each measure with the worst-case forget performance after the headline step.

    Each model and seed that was attacked is a pair, except for broken models, which a sentence below names. No rows without measures,
    or with fewer than :data:`FEWEST` pairs.
    """
    headers = [
        ("measure", ""),
        ("rank correlation", "with worst-case forget"),
        ("95 % interval", "over models and seeds"),
        ("pairs", "model and seed"),
    ]
    rows = []
    for name in measures_of(report):
        pairs = pairs_of(report, name)
        if len(pairs) >= FEWEST:
            found, interval = spearman(pairs), bootstrap(pairs)
            shown = "n/a" if found is None else f"{found:+.2f}"
            span = "n/a" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"
            rows.append([Cell(name), Cell(shown), Cell(span), Cell(str(len(pairs)))])
    lost = [model.label for model in report.models if model.broken]
    said = f"Models with less than half of the original's retain performance before any attack are left out: {', '.join(lost)}."
    return Table(headers, rows, below=[said] if rows and lost else [])


def pairs_of(report: Report, name: str) -> list[Pair]:
    """The number of a measure before any attack and the worst case after it, for each model and seed that has both.

    Broken models are left out: they score badly after an attack too, whatever they hold.
    """
    pairs = []
    for model in report.models:
        for point in model.worst.get(report.headline, Stat()).points:
            number = ((model.entries[point.seed].get("measures") or {}).get(name) or {}).get("number")
            if number is not None and point.value < DIVERGED and point.seed not in model.broken:
                pairs.append((number, point.value))
    return pairs


def spearman(pairs: Sequence[Pair]) -> float | None:
    """Spearman's rank correlation, equal values with their mean rank; None if one side has a single value."""
    xs, ys = (_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    mean = (len(pairs) + 1) / 2
    products = math.fsum((x - mean) * (y - mean) for x, y in zip(xs, ys, strict=True))
    squares = [math.fsum((rank - mean) ** 2 for rank in ranks) for ranks in (xs, ys)]
    return products / math.sqrt(squares[0] * squares[1]) if all(squares) else None


def bootstrap(pairs: Sequence[Pair]) -> tuple[float, float] | None:
    """The 95 % interval of the rank correlation over resampled pairs, by percentiles; the same pairs give the same interval.

    None if no more than half of the samples have a correlation.
    """
    generator = random.Random(0)
    drawn = [spearman(generator.choices(pairs, k=len(pairs))) for _ in range(DRAWS)]
    known = sorted(value for value in drawn if value is not None)
    if 2 * len(known) <= DRAWS:
        return None
    return known[round(0.025 * (len(known) - 1))], known[round(0.975 * (len(known) - 1))]


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, start = [0.0] * len(values), 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for index in order[start : end + 1]:
            ranks[index] = (start + end) / 2 + 1
        start = end + 1
    return ranks
