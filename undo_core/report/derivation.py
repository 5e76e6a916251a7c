"""Derives the quantities of a report from the results of one or several seeds.

In the notation of arXiv 2506.06278, with P the worst-case forget performance after the headline number of attack steps, and S
the training until the retain target is first reached:

    R = (P_undo - P_unlearn) / (P_filter - P_unlearn)        C = S_undo / S_filter

S_undo includes the unlearning: its tokens, its FLOPs, and its steps, converted to steps of as many tokens as the student's.

The worst case is the attack and learning rate with the largest forget accuracy or the smallest forget loss.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

from undo_core.io.untrusted import refused
from undo_core.report.attacks import Point, bounded, drawn, envelope
from undo_core.report.metrics import STUDENTS, UNITS, ModelReport, Order, Report, Stat
from undo_core.report.results import KINDS, check_results
from undo_core.report.robustness import robustness_point

CENSORED = "the model did not recover"
BROKEN = "broken before the attack: less than half of the original's retain performance"
FILTER_CENSORED = "data filtering did not recover"
NO_FILTER = "no data filtering"
WORKING = 0.5  # share of the original's retain performance below which a model is broken
_STOP = {"steps": "stop_step", "tokens": "stop_tokens", "flops": "stop_flops"}


def derive(results: list[dict[str, Any]], title: str) -> Report:
    """Derives everything that the report shows.

    Args:
        results: contents of ``results.json``, one per seed, of runs that differ only in their seed.
        title: title of the report.

    Raises:
        ValueError: no results, an unknown format, a repeated seed, or runs whose settings differ.
    """
    check_results(results)
    with refused("results: got some of another form, wanted what undo run or undo attack wrote"):
        return _derived(results, title)


def is_censored(entry: dict[str, Any], has_target: bool) -> bool:
    """Whether training to a retain target ended at its step limit instead."""
    training = entry.get("training")
    return has_target and entry["kind"] in (*STUDENTS, "filter") and training is not None and training.get("stop_step") is None


def is_broken(entry: dict[str, Any], original: dict[str, Any] | None, higher: bool) -> bool:
    """Whether a model has less than :data:`WORKING` of the original's retain performance before any attack.

    Performance is the accuracy, or exp(-loss). A broken model relearns little, whatever it holds. False without an original.
    """
    scores = [(each or {"metrics": {}})["metrics"].get("retain") for each in (original, entry)]
    if scores[0] is None or scores[1] is None:
        return False
    before, after = (score["value"] for score in scores)
    return after < WORKING * before if higher else after > before - math.log(WORKING)


def _derived(results: list[dict[str, Any]], title: str) -> Report:
    results = sorted(results, key=lambda result: result["seed"])
    metric = results[0]["metric"]
    higher, headline = metric["kind"] == "accuracy", metric["headline_step"]
    targets = {r["seed"]: r["metric"]["retain_target"] for r in results if r["metric"].get("retain_target") is not None}
    entries: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        for entry in result["models"]:
            entries.setdefault(entry["name"], {})[result["seed"]] = entry
    worst = {name: {seed: envelope(e, seed, higher, headline) for seed, e in by.items()} for name, by in entries.items()}
    named = {
        kind: next((n for n, by in entries.items() if _first(by)["kind"] == kind), None)
        for kind in ("original", "unlearn", "filter")
    }

    def pick(table: dict[str, dict[int, Any]], name: str | None, seed: int) -> Any:
        return table.get(name or "", {}).get(seed)

    def broken(name: str, seed: int) -> bool:
        return is_broken(entries[name][seed], pick(entries, named["original"], seed), higher)

    def robustness(name: str, seed: int) -> Point | str:
        entry, control = entries[name][seed], pick(entries, named["filter"], seed)
        ends = [(pick(worst, n, seed) or {}).get(headline) for n in (name, named["unlearn"], named["filter"])]
        if control is None:
            return NO_FILTER
        if is_censored(entry, seed in targets):
            return CENSORED
        if is_censored(control, seed in targets):
            return FILTER_CENSORED
        if broken(name, seed):
            return BROKEN
        if ends[0] is None or ends[1] is None or ends[2] is None:
            return "not attacked for the headline number of steps, or a control was not"
        return robustness_point(ends[0], ends[1], ends[2])

    def compute(name: str, seed: int, unit: str) -> Point | str:
        entry, control = entries[name][seed], pick(entries, named["filter"], seed)
        if control is None:
            return NO_FILTER
        if seed not in targets:
            return "no retain target to train to"
        spent, base = ((e.get("training") or {}).get(_STOP[unit]) for e in (entry, control))
        if is_censored(entry, True) or is_censored(control, True):
            return CENSORED if is_censored(entry, True) else FILTER_CENSORED
        if broken(name, seed):
            return BROKEN
        if (control.get("training") or {}).get("short_of_target"):
            return "data filtering, another run's, ended before it met this retain target"
        if unit == "steps" and spent is not None:
            if "unlearning_steps" not in entry["training"]:
                return "steps of the unlearning not recorded"
            spent += entry["training"]["unlearning_steps"]
        if spent is None or base is None:
            return "training not counted"
        if base == 0:
            return "data filtering met the retain target before training"
        return Point(seed, spent / base)

    models = []
    for name, by in entries.items():
        first = _first(by)
        students = by if first["kind"] in STUDENTS else {}
        ranked = by if first["kind"] in (*STUDENTS, "oracle", "oracle-random") else {}
        own = {seed: drawn(entry, seed, higher) for seed, entry in by.items()}
        groups = {f"{key} {g}" for e in by.values() for key, m in e["metrics"].items() for g in m.get("groups") or {}}
        models.append(
            ModelReport(
                name=name,
                kind=first["kind"],
                alpha=first.get("alpha"),
                metrics={key: _evaluations(by, lambda e, key=key: e["metrics"].get(key)) for key in _keys(by)},
                groups={label: _evaluations(by, lambda e, label=label: _group(e, label)) for label in sorted(groups)},
                worst=_by_step(worst[name]),
                drawn=_by_step(own),
                bounded=Stat(tuple(p for seed, e in by.items() if (p := bounded(e, seed, metric)) is not None)),
                robustness=_stat((seed, robustness(name, seed)) for seed in ranked),
                compute={unit: _stat((seed, compute(name, seed, unit)) for seed in students) for unit in UNITS},
                censored=tuple(seed for seed, e in by.items() if is_censored(e, seed in targets)),
                broken=tuple(seed for seed in by if broken(name, seed)),
                entries=by,
            )
        )
    models.sort(key=lambda m: (KINDS.index(m.kind), m.alpha or 0.0))
    orders = [_order(models, seed, headline, higher) for seed in (r["seed"] for r in results)]
    if len(results) > 1:
        orders.append(_order(models, None, headline, higher))
    return Report(title, metric["kind"], headline, targets, models, orders, results)


def _order(models: list[ModelReport], seed: int | None, headline: int, higher: bool) -> Order:
    chain, left_out = [], []
    for model in models:
        if model.kind not in ("undo", "random") or headline not in model.worst:
            continue
        points = [p for p in model.worst[headline].points if seed in (None, p.seed)]
        if not points:
            continue
        if any(seed in (None, s) for s in model.censored):
            left_out.append(model.name)
        else:
            chain.append((model.name, Stat(tuple(points))))
    sign = 1.0 if higher else -1.0
    rises = []
    for (name, before), (following, after) in itertools.pairwise(chain):
        rise = sign * (after.mean - before.mean)
        if rise > 0:
            a, b = before.spread, after.spread
            overlap = bool(a and b and a[0] <= b[1] and b[0] <= a[1])
            rises.append({"from": name, "to": following, "by": rise, "intervals_overlap": overlap})
    return Order(seed, [(name, stat.mean) for name, stat in chain], rises, left_out)


def _stat(values: Iterable[tuple[int, Point | str]]) -> Stat:
    pairs = list(values)
    missing = {seed: value for seed, value in pairs if isinstance(value, str)}
    return Stat(tuple(value for _, value in pairs if not isinstance(value, str)), missing)


def _evaluations(entries: dict[int, dict[str, Any]], score: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Stat:
    found = {seed: score(entry) for seed, entry in entries.items()}
    return Stat(
        tuple(
            Point(s, m["value"], m.get("low"), m.get("high"), m.get("n"), stage=entries[s].get("stage"))
            for s, m in found.items()
            if m is not None
        )
    )


def _group(entry: dict[str, Any], label: str) -> dict[str, Any] | None:
    key, _, group = label.partition(" ")
    return ((entry["metrics"].get(key) or {}).get("groups") or {}).get(group)


def _keys(entries: dict[int, dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for entry in entries.values() for key in entry["metrics"]))


def _by_step(curves: dict[int, dict[int, Point]]) -> dict[int, Stat]:
    """Curves of the seeds as a quantity at each step."""
    steps = sorted({step for curve in curves.values() for step in curve})
    return {step: Stat(tuple(curve[step] for curve in curves.values() if step in curve)) for step in steps}


def _first(entries: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return next(iter(entries.values()))
