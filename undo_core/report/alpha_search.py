"""The search for the cheapest alpha that reaches a target of robustness: what each tried alpha showed, and the sentence on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from undo_core.report.attacks import Point
from undo_core.report.derivation import CENSORED, derive
from undo_core.report.metrics import ModelReport, Report, Stat
from undo_core.report.robustness import robustness_point
from undo_core.report.table import NONE, Cell, Notes, Table, ratio, ratio_cell

RULE = (
    "R decides by its point estimate. The interval covers the sampling of the evaluated sequences; other seeds of training and "
    "attack differ by more. A cheaper alpha is a smaller one."
)
PREDICTED = (
    "A prediction is made from the tried alphas next to an alpha before it is tried: by the line through R, with both neighbours' "
    "values as its interval, and by the line through the logarithms of the FLOPs."
)
UNSURE = "the interval of R contains the target, so that other test sequences could decide otherwise"


def outcomes(results: dict[str, Any]) -> dict[float, float | str | None]:
    """R by alpha, from the results of one seed; the reason where it is not defined, None where the student is censored."""
    report = derive([results], "")
    found: dict[float, float | str | None] = {}
    for model in report.of("undo"):
        point = robustness(report, model, results["seed"])
        found[model.alpha or 0.0] = point.value if isinstance(point, Point) else None if point == CENSORED else point
    return found


def robustness(report: Report, model: ModelReport, seed: int) -> Point | str:
    """R of a student at one seed against data filtering or, where a run has none, against the random student.

    Returns the reason where it is not defined.
    """
    if report.of("filter"):
        found = next((point for point in model.robustness.points if point.seed == seed), None)
        return found or model.robustness.missing[seed]
    (unlearn,), random = report.of("unlearn"), report.of("random")
    if seed in model.censored:
        return CENSORED
    if not random:
        return "neither data filtering nor a random student"
    if seed in random[0].censored:
        return "the random student did not recover"
    ends = [_attacked(of, report.headline, seed) for of in (model, unlearn, random[0])]
    if ends[0] is None or ends[1] is None or ends[2] is None:
        return "not attacked for the headline number of steps, or a control was not"
    return robustness_point(ends[0], ends[1], ends[2], "random")


def alpha_table(report: Report) -> Table:
    """Table of the tried alphas in the order of the search, one row for each; no rows without a search."""
    notes, rows = Notes(), []
    against = "data filtering" if report.of("filter") else "the random student"
    headers = [("seed", ""), ("alpha", ""), ("tried", ""), ("R", f"against {against}"), ("C", "steps"), ("C", "FLOPs")]
    headers += [("FLOPs", "with unlearning"), ("predicted R", ""), ("predicted FLOPs", ""), ("decision", "")]
    for seed, search in _searches(report):
        for index, alpha in enumerate(search["tried"]):
            model = next(m for m in report.of("undo") if m.alpha == alpha and seed in m.entries)
            found = robustness(report, model, seed)
            shown = Stat((found,)) if isinstance(found, Point) else Stat((), {seed: found})
            spent = [Stat(tuple(p for p in model.compute[unit].points if p.seed == seed)) for unit in ("steps", "flops")]
            flops = _flops(model, seed)
            predicted = predictions(report, seed, search["tried"][: max(index, search["configured"])], alpha)
            order = index + 1 - search["configured"]
            rows.append(
                [
                    Cell(str(seed)),
                    Cell(f"{alpha:g}"),
                    Cell(f"no. {order}" if order > 0 else "configured"),
                    ratio_cell(shown, notes),
                    *(Cell(ratio(stat.mean)) if stat else Cell() for stat in spent),
                    Cell(NONE if flops is None else f"{flops:.2e}"),
                    *(predicted if order > 0 else (Cell(), Cell())),
                    Cell(_decision(found, search["target"]), marks=notes.mark(UNSURE) if _unsure(found, search) else ""),
                ]
            )
    return Table(headers, rows, notes.texts)


def predictions(report: Report, seed: int, tried: Sequence[float], alpha: float) -> tuple[Cell, Cell]:
    """R of an alpha with its interval, and its FLOPs, predicted from the alphas tried before it.

    The neighbours' FLOPs are no interval: in the recorded sweep (bench/study_predictions.py) they rarely hold those between them.
    """
    known = {model.alpha: model for model in report.of("undo") if model.alpha in tried and seed in model.entries}
    found = {other: robustness(report, model, seed) for other, model in known.items()}
    ratios = {other: point.value for other, point in found.items() if isinstance(point, Point)}
    ratios.setdefault(0.0, 0.0)  # without damage the student is the teacher
    spent = {other: math.log(flops) for other, model in known.items() if (flops := _flops(model, seed))}
    flops = _predicted(spent, alpha, lambda value: f"{math.exp(value):.2e}")
    return _predicted(ratios, alpha, ratio), Cell(flops.main)


def between(alpha: float, low: tuple[float, float], high: tuple[float, float]) -> float:
    """Value at ``alpha`` of the line through two points, each an alpha and its value."""
    return low[1] + (alpha - low[0]) / (high[0] - low[0]) * (high[1] - low[1])


def alpha_sentences(report: Report) -> list[str]:
    """The outcome of the search for each seed: the cheapest alpha that reached the target, or that none did."""
    several = len(report.seeds) > 1
    said = [(seed, _sentence(report, seed, search)) for seed, search in _searches(report)]
    return [f"Seed {seed}: {text}" if several else text[0].upper() + text[1:] for seed, text in said]


def _sentence(report: Report, seed: int, search: dict[str, Any]) -> str:
    target, found = search["target"], {}
    for model in report.of("undo"):
        if model.alpha in search["tried"] and seed in model.entries:
            found[model.alpha] = model, robustness(report, model, seed)
    known = {alpha: point for alpha, (_, point) in sorted(found.items()) if isinstance(point, Point)}
    reached = [alpha for alpha, point in known.items() if point.value >= target]
    if not reached:
        best = max(known, key=lambda alpha: known[alpha].value, default=None)
        said = "" if best is None else f"; the closest is α = {best:g} with {_say(known[best])}"
        return f"no tried alpha up to {max(found):g} reached R = {target:g}{said}. The search ended because {search['ended']}."
    cheapest = reached[0]
    model, point = found[cheapest][0], known[cheapest]
    cost = next((p.value for p in model.compute["steps"].points if p.seed == seed), None)
    text = f"the cheapest tried alpha that reached R = {target:g} is {cheapest:g}, with {_say(point)}"
    text += "" if cost is None else f" at {100 * cost:.0f} % of data filtering's training steps"
    below = [alpha for alpha in found if alpha < cheapest]
    if below:
        nearest = max(below)
        text += f"; the next smaller one, {nearest:g}, {_missed(found[nearest][1])}"
    text += f". The search ended because {search['ended']}."
    if _unsure(point, search):
        text += f" At {cheapest:g}, {UNSURE}."
    swapped = [alpha for alpha, other in known.items() if alpha > cheapest and other.value < target]
    if swapped:
        named = ", ".join(f"{alpha:g}" for alpha in swapped)
        text += f" R does not rise with every step: at {named} it is below the target again."
    return text


def _predicted(known: dict[float, float], alpha: float, shown: Callable[[float], str]) -> Cell:
    low = max((other for other in known if other < alpha), default=None)
    high = min((other for other in known if other > alpha), default=None)
    if low is None or high is None:
        return Cell()
    ends = sorted((known[low], known[high]))
    return Cell(shown(between(alpha, (low, known[low]), (high, known[high]))), " to ".join(map(shown, ends)))


def _flops(model: ModelReport, seed: int) -> float | None:
    return (model.entries[seed].get("training") or {}).get("flops")


def _searches(report: Report) -> list[tuple[int, dict[str, Any]]]:
    return [(result["seed"], result["alpha_search"]) for result in report.results if result.get("alpha_search")]


def _attacked(model: ModelReport, headline: int, seed: int) -> Point | None:
    stat = model.worst.get(headline, Stat())
    return next((point for point in stat.points if point.seed == seed), None)


def _decision(found: Point | str, target: float) -> str:
    if isinstance(found, str):
        return "not repaired" if found == CENSORED else "not decided"
    return "reaches" if found.value >= target else "misses"


def _missed(found: Point | str) -> str:
    if isinstance(found, str):
        return "was not repaired to the retain target" if found == CENSORED else f"has no R ({found})"
    return f"missed it with {_say(found)}"


def _unsure(found: Point | str, search: dict[str, Any]) -> bool:
    if isinstance(found, str) or found.low is None or found.high is None:
        return False
    return found.low < search["target"] <= found.high


def _say(point: Point) -> str:
    interval = "" if point.low is None or point.high is None else f" ({ratio(point.low)} to {ratio(point.high)})"
    return f"R = {ratio(point.value)}{interval}"
