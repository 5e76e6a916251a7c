"""Compares three predictions of an alpha's compute and robustness on the recorded sweep over alpha.

    python bench/study_predictions.py

A short distillation: the logit of the student's retain accuracy is extrapolated, by the line through the last five evaluations of the
first 100 to 300 steps, to the retain target. A short attack: R after 20 or 40 of the 100 attack steps, as it is and corrected by a line that
the other two seeds give. The neighbours: R by the line, and steps by the line through their logarithms, between the next smaller and the
next larger alpha; this is what the search for an alpha reports. Prints errors over three seeds; docs/guides/alpha.md has them.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from undo_core.report.alpha_search import between
from undo_core.report.compare import load
from undo_core.report.derivation import derive
from undo_core.report.metrics import ModelReport, Report
from undo_core.report.robustness import ratio_of_robustness

FOLDER = Path(__file__).resolve().parents[1] / "bench" / "results" / "sweep-alpha"
STRONG = 0.6  # alphas from here on decide whether a target of robustness is reached


def main() -> None:
    """Prints the tables."""
    report = derive([values for _, values in load([FOLDER])], "")
    students = [(seed, model) for model in report.of("undo") for seed in report.seeds]
    print("Steps to the retain target, students that need more than the short run has:\n")
    print("| from | students | without a prediction | median factor | worst factor |\n|---|---:|---:|---:|---:|")
    for budget in (100, 200, 300):
        asked = [(_stop(m, seed), _extrapolated(report, m, seed, budget)) for seed, m in students if _stop(m, seed) > budget]
        _print_factors(f"the first {budget} steps", [pair for pair in asked if pair[1]], sum(not guess for _, guess in asked))
    inner = [(seed, *three) for seed in report.seeds for three in zip(*(report.of("undo")[i:] for i in range(3)), strict=False)]
    guesses = [(_stop(m, s), math.exp(between(m.alpha, _log(low, s), _log(high, s)))) for s, low, m, high in inner]
    _print_factors("both neighbours", guesses, 0)
    print("\nR after 100 attack steps:\n")
    print(
        f"| from | mean error | standard deviation | largest | standard deviation, alpha from {STRONG:g} |\n|---|---:|---:|---:|---:|"
    )
    for step in (20, 40):
        pairs = [(seed, m.alpha, _r(report, m, seed, step), _r(report, m, seed, report.headline)) for seed, m in students]
        _print_errors(f"{step} attack steps", [(alpha, early - late) for _, alpha, early, late in pairs])
        corrected = []
        for held in report.seeds:
            line = statistics.linear_regression(*zip(*((e, late) for s, _, e, late in pairs if s != held), strict=True))
            corrected += [(a, line.intercept + line.slope * e - late) for s, a, e, late in pairs if s == held]
        _print_errors(f"{step} attack steps, corrected", corrected)
    rs = [(m.alpha, *((x.alpha, _r(report, x, s, report.headline)) for x in (low, m, high))) for s, low, m, high in inner]
    _print_errors("both neighbours", [(alpha, between(alpha, low, high) - own[1]) for alpha, low, own, high in rs])
    inside = sum(low[1] <= own[1] <= high[1] for _, low, own, high in rs)
    steps = sum(_stop(low, s) <= _stop(m, s) <= _stop(high, s) for s, low, m, high in inner)
    print(f"\nBetween its neighbours' values lies R in {inside} and the number of steps in {steps} of {len(inner)} cases.")


def _stop(model: ModelReport, seed: int) -> int:
    return model.entries[seed]["training"]["stop_step"]


def _log(model: ModelReport, seed: int) -> tuple[float, float]:
    return model.alpha, math.log(_stop(model, seed))


def _extrapolated(report: Report, model: ModelReport, seed: int, budget: int) -> float | None:
    """Steps at which the line through the last five evaluations of a short run meets the target; None if it does not rise."""
    history = [e for e in model.entries[seed]["training"]["history"] if "retain" in e and e["step"] <= budget][-5:]
    slope, intercept = statistics.linear_regression([e["step"] for e in history], [_logit(e) for e in history])
    target = report.targets[seed]
    return (math.log(target / (1 - target)) - intercept) / slope if slope > 0 else None


def _logit(evaluation: dict[str, Any]) -> float:
    share = min(max(evaluation["retain"], 0.002), 0.998)  # accuracies of 0 and 1 have none
    return math.log(share / (1 - share))


def _r(report: Report, model: ModelReport, seed: int, step: int) -> float:
    (unlearn,), (control,) = report.of("unlearn"), report.of("filter")
    ends = [next(p.value for p in of.worst[step].points if p.seed == seed) for of in (model, unlearn, control)]
    found = ratio_of_robustness(*ends)
    if isinstance(found, str):
        raise SystemExit(f"R of {model.name}, seed {seed}, after {step} steps: {found}")
    return found


def _print_factors(name: str, pairs: list[tuple[float, float]], missing: int) -> None:
    factors = [math.exp(abs(math.log(guess / true))) for true, guess in pairs]
    print(f"| {name} | {len(pairs) + missing} | {missing} | {statistics.median(factors):.2f} | {max(factors):.2f} |")


def _print_errors(name: str, errors: list[tuple[float, float]]) -> None:
    every, strong = [e for _, e in errors], [e for alpha, e in errors if alpha >= STRONG]
    spreads = statistics.stdev(every), max(map(abs, every)), statistics.stdev(strong)
    print(f"| {name} | {statistics.fmean(every):+.2f} | {' | '.join(f'{value:.2f}' for value in spreads)} |")


if __name__ == "__main__":
    main()
