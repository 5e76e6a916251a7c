"""Quantities derived from the results of one or several seeds: worst cases, robustness, compute, order over alpha.

In the notation of arXiv 2506.06278, with P the worst-case forget performance after the headline number of attack steps, and S
the training until the retain target is first reached:

    R = (P_undo - P_unlearn) / (P_filter - P_unlearn)        C = S_undo / S_filter

S_undo includes the unlearning: its tokens, its FLOPs, and its steps, converted to steps of as many tokens as the student's.

The worst case is the attack and learning rate with the largest forget accuracy or the smallest forget loss.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from undo_core.io.untrusted import checked_object, refused
from undo_core.report.attacks import Point, bounded, drawn, envelope
from undo_core.report.robustness import MIN_DENOMINATOR, robustness_point

FORMAT = 1
KEPT = 0.9  # a model that keeps more than this share of its forget performance has hardly forgotten
KINDS = ("original", "defence", "unlearn", "undo", "damaged", "gated", "random", "filter", "oracle", "oracle-random")
STUDENTS = ("undo", "damaged", "gated", "random")  # models that are trained to the retain target
LABELS = {
    "original": "original",
    "unlearn": "unlearn only",
    "gated": "filter, then distill",
    "random": "random student",
    "filter": "data filtering",
    "oracle": "oracle matching",
    "oracle-random": "oracle matching, random student",
}
UNITS = ("steps", "tokens", "flops")
SEARCH_SETTINGS = ("target_robustness", "alpha_resolution", "alpha_tries", "alpha_max")
CENSORED = "the model is censored"
FILTER_CENSORED = "data filtering is censored"
NO_FILTER = "no data filtering"
_STOP = {"steps": "stop_step", "tokens": "stop_tokens", "flops": "stop_flops"}


@dataclass(frozen=True)
class Stat:
    """One quantity over the seeds: the points of seeds that have it, and the reasons why others lack it, by seed."""

    points: tuple[Point, ...] = ()
    missing: dict[int, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.points)

    @property
    def mean(self) -> float:
        """Mean over the seeds that have a value; there must be at least one."""
        return math.fsum(p.value for p in self.points) / len(self.points)

    @property
    def spread(self) -> tuple[float, float] | None:
        """Smallest and largest value over seeds; for one seed the 95 % interval of the evaluation, or None without one."""
        if len(self.points) > 1:
            values = [p.value for p in self.points]
            return min(values), max(values)
        if self.points and self.points[0].low is not None and self.points[0].high is not None:
            return self.points[0].low, self.points[0].high
        return None

    @property
    def rates(self) -> list[float]:
        """Distinct learning rates of the points, sorted."""
        return sorted({p.rate for p in self.points if p.rate is not None})

    def to_json(self) -> dict[str, Any]:
        """Mean, range over seeds and all points, as JSON values; absent parts are None or empty."""
        values = [p.value for p in self.points]
        points = [{key: value for key, value in vars(p).items() if value is not None} for p in self.points]
        return {
            "mean": self.mean if values else None,
            "min": min(values, default=None),
            "max": max(values, default=None),
            "points": points,
            "missing": [{"seed": seed, "reason": reason} for seed, reason in self.missing.items()],
        }


@dataclass(frozen=True)
class ModelReport:
    """Derived quantities of one model over the seeds.

    Attributes:
        name, kind, alpha: as in the results.
        metrics: retain, forget and held-out performance before the attack.
        groups: the same for each group of sequences, ``{"retain +": ...}``.
        worst: worst-case forget performance, ``{attack step: ...}``, with every attack at its own headline step after the run's.
        drawn: the same for a figure, where every attack stands at its own steps.
        bounded: worst case over the trials that leave the model useful; empty without a margin.
        robustness: R.
        compute: C in steps, tokens and FLOPs.
        censored: seeds in which training reached its step limit before the retain target.
        entries: the model's entry in each seed's results.
    """

    name: str
    kind: str
    alpha: float | None
    metrics: dict[str, Stat]
    groups: dict[str, Stat]
    worst: dict[int, Stat]
    drawn: dict[int, Stat]
    bounded: Stat
    robustness: Stat
    compute: dict[str, Stat]
    censored: tuple[int, ...]
    entries: dict[int, dict[str, Any]]

    @property
    def label(self) -> str:
        """Display name of the model."""
        if self.kind == "defence":
            return self.name
        if self.kind == "undo" and self.alpha is not None:
            return f"UNDO α={self.alpha:g}"
        if self.kind == "gated" and self.alpha is not None:
            return f"filter, then distill α={self.alpha:g}"
        return LABELS.get(self.kind, self.name)

    @property
    def attacks(self) -> dict[int, dict[str, Any]]:
        """Attack results by seed, for seeds that have one."""
        return {seed: entry["attack"] for seed, entry in self.entries.items() if entry.get("attack")}

    @property
    def rates(self) -> list[float]:
        """Learning rates of the headline attack, in ascending order."""
        return sorted({curve["rate"] for attack in self.attacks.values() for curve in attack["curves"]})

    @property
    def at_end_of_grid(self) -> bool:
        """Whether in some seed the worst learning rate of the headline attack is the smallest or the largest that was tried."""
        return any(attack.get("worst_at_end_of_grid") for attack in self.attacks.values())

    @property
    def trainings(self) -> dict[int, dict[str, Any]]:
        """Training results by seed, for seeds that have one."""
        return {seed: entry["training"] for seed, entry in self.entries.items() if entry.get("training")}


@dataclass(frozen=True)
class Order:
    """Check of whether the attack gets harder with every alpha, up to the random student.

    Attributes:
        seed: seed of the run; None for the mean over seeds.
        chain: pairs of model and worst-case forget performance at the headline step, in order of alpha, the random student
            last.
        rises: pairs of neighbours at which the attack got easier, with the difference and whether their intervals overlap.
        left_out: censored models, which did not stop at the retain target and cannot be compared.
    """

    seed: int | None
    chain: list[tuple[str, float]]
    rises: list[dict[str, Any]]
    left_out: list[str]

    @property
    def holds(self) -> bool | None:
        """True if no step of the chain rises; None if there are fewer than two models to compare."""
        return None if len(self.chain) < 2 else not self.rises


@dataclass(frozen=True)
class Report:
    """Everything that the report shows, derived from ``results``."""

    title: str
    kind: str
    headline: int
    targets: dict[int, float]
    models: list[ModelReport]
    orders: list[Order]
    results: list[dict[str, Any]]

    @property
    def higher(self) -> bool:
        """True for an accuracy, where higher is better; False for a loss."""
        return self.kind == "accuracy"

    @property
    def unit(self) -> str:
        """Unit of a performance: per cent, or nats for each token or each byte of the text."""
        return "%" if self.higher else unit_of(self.results[0]["metric"])

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs, in ascending order."""
        return [result["seed"] for result in self.results]

    @property
    def steps(self) -> list[int]:
        """Attack steps at which any model was evaluated."""
        return sorted({step for model in self.models for step in model.worst})

    @property
    def rates(self) -> list[float]:
        """Learning rates of the headline attack on any model, in ascending order."""
        return sorted({rate for model in self.models for rate in model.rates})

    @property
    def hardly_forgotten(self) -> bool:
        """Whether the unlearned model keeps more than :data:`KEPT` of the original's forget performance, before any attack.

        Performance is the accuracy, or exp(-loss), which is the geometric mean of the tokens' probabilities.
        """
        ends = [model.metrics.get("forget") for kind in ("original", "unlearn") for model in self.of(kind)]
        if len(ends) != 2 or not all(ends):
            return False
        before, after = (stat.mean for stat in ends)
        return after > KEPT * before if self.higher else after < before - math.log(KEPT)

    @property
    def strongest(self) -> ModelReport | None:
        """UNDO model with the largest alpha at which no seed is censored, or with the largest alpha if there is none."""
        models = self.of("undo")
        return next((model for model in reversed(models) if not model.censored), models[-1] if models else None)

    @property
    def further(self) -> list[ModelReport]:
        """The models of the section ``students``, which have a figure of their own, in its order."""
        named = {model.name: model for model in self.models}
        names = (self.results[0].get("config") or {}).get("students") or {}
        return [named[name] for name in names if name in named]

    @property
    def main(self) -> list[ModelReport]:
        """The other models."""
        further = {model.name for model in self.further}
        return [model for model in self.models if model.name not in further]

    def of(self, kind: str) -> list[ModelReport]:
        """Models of one kind."""
        return [model for model in self.models if model.kind == kind]

    def to_json(self) -> dict[str, Any]:
        """The derived numbers as JSON values, for ``report.json``."""
        return {
            "format": FORMAT,
            "title": self.title,
            "seeds": self.seeds,
            "metric": {"kind": self.kind, "headline_step": self.headline, "min_denominator": MIN_DENOMINATOR},
            "retain_targets": [{"seed": seed, "value": value} for seed, value in self.targets.items()],
            "models": [_model_json(model) for model in self.models],
            "order_over_alpha": [{**vars(order), "holds": order.holds} for order in self.orders],
        }


def derive(results: list[dict[str, Any]], title: str) -> Report:
    """Derives everything that the report shows.

    Args:
        results: contents of ``results.json``, one per seed, of runs that differ only in their seed.
        title: title of the report.

    Raises:
        ValueError: no results, an unknown format, a repeated seed, or runs whose settings differ.
    """
    _check(results)
    with refused("results: got some of another form, wanted what undo run or undo attack wrote"):
        return _derived(results, title)


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
    named = {kind: next((n for n, by in entries.items() if _first(by)["kind"] == kind), None) for kind in ("unlearn", "filter")}

    def pick(table: dict[str, dict[int, Any]], name: str | None, seed: int) -> Any:
        return table.get(name or "", {}).get(seed)

    def robustness(name: str, seed: int) -> Point | str:
        entry, control = entries[name][seed], pick(entries, named["filter"], seed)
        ends = [(pick(worst, n, seed) or {}).get(headline) for n in (name, named["unlearn"], named["filter"])]
        if is_censored(entry, seed in targets):
            return CENSORED
        if control is None:
            return NO_FILTER
        if is_censored(control, seed in targets):
            return FILTER_CENSORED
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
                entries=by,
            )
        )
    models.sort(key=lambda m: (KINDS.index(m.kind), m.alpha or 0.0))
    orders = [_order(models, seed, headline, higher) for seed in (r["seed"] for r in results)]
    if len(results) > 1:
        orders.append(_order(models, None, headline, higher))
    return Report(title, metric["kind"], headline, targets, models, orders, results)


def unit_of(metric: dict[str, Any]) -> str:
    """Returns the unit of a loss; results of a run, whose models share a tokenizer, are in nats per token and do not say so."""
    return metric.get("unit", "nats/token")


def is_censored(entry: dict[str, Any], has_target: bool) -> bool:
    """Whether training to a retain target ended at its step limit instead."""
    training = entry.get("training")
    return has_target and entry["kind"] in (*STUDENTS, "filter") and training is not None and training.get("stop_step") is None


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


def _model_json(model: ModelReport) -> dict[str, Any]:
    return {
        "name": model.name,
        "kind": model.kind,
        "alpha": model.alpha,
        "metrics": {key: stat.to_json() for key, stat in model.metrics.items()},
        "groups": {key: stat.to_json() for key, stat in model.groups.items()},
        "worst_case_forget": [{"step": step, **stat.to_json()} for step, stat in model.worst.items()],
        **({"bounded_forget": model.bounded.to_json()} if model.bounded else {}),
        "R": model.robustness.to_json(),
        "C": {unit: stat.to_json() for unit, stat in model.compute.items()},
        "censored_seeds": list(model.censored),
    }


def _check(results: list[dict[str, Any]]) -> None:
    if not results:
        raise ValueError("results: got none, wanted the results of one run or of several seeds")
    for result in results:
        check_result(result)
    seeds = [result["seed"] for result in results]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"results: got seeds {seeds}, wanted each seed once")
    first = settings_of(results[0])
    for result in results[1:]:
        other = settings_of(result)
        differing = sorted(key for key in {**first, **other} if first.get(key) != other.get(key))
        if differing:
            named = ", ".join(differing[:3])
            raise ValueError(
                f"results: seeds {seeds[0]} and {result['seed']} differ in {named}; wanted runs that differ in their seed"
            )


def check_result(result: Any, where: str = "results") -> None:
    """Raises a ValueError that begins with ``where`` unless ``result`` has the outline of a run's results."""
    checked_object(result, where)
    if result.get("format") != FORMAT:
        raise ValueError(f"{where}: got format {result.get('format')!r}, wanted {FORMAT}")
    models = [{"name": str, "kind": str, "metrics": dict}]
    checked_object(result, where, metric={"kind": str, "headline_step": int}, models=models, seed=int)
    if result["metric"]["kind"] not in ("accuracy", "loss"):
        raise ValueError(f"{where}: got metric {result['metric']['kind']!r}, wanted accuracy or loss")
    for entry in result["models"]:
        if entry["kind"] not in KINDS:
            raise ValueError(f"{where}: got a model of kind {entry['kind']!r}, wanted one of {', '.join(KINDS)}")
    if not result["models"]:
        raise ValueError(f"{where}: got a run without models, wanted at least one")


def settings_of(result: dict[str, Any]) -> dict[str, Any]:
    """Settings that must agree between seeds, as a flat dictionary with dotted keys.

    Those of a search decide which alphas there are, and not how their models are made.
    """
    own = ("seed", "output", "name", "workers", "parallel", *SEARCH_SETTINGS)
    config = {k: v for k, v in (result.get("config") or {}).items() if k not in own}
    metric = {k: v for k, v in result["metric"].items() if k in ("kind", "headline_step", "unit", "retain_margin")}
    return dict(_flat({**config, "metric": metric}, ""))


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
