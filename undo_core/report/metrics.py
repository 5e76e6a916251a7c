"""The quantities of a report: of one model over its seeds, of the order over alpha, and of all models.

:mod:`undo_core.report.derivation` defines and computes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from undo_core.report.attacks import Point
from undo_core.report.results import FORMAT, unit_of
from undo_core.report.robustness import MIN_DENOMINATOR

KEPT = 0.9  # a model that keeps more than this share of its forget performance has hardly forgotten
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
UNTAUGHT = ("random", "filter", "oracle-random")  # models whose training had no part in the forget capability


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
        broken: seeds in which the model is useless before any attack, and has neither R nor C.
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
    broken: tuple[int, ...]
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
    def never_had_it(self) -> bool:
        """Whether the model never had the forget capability: it can be taught it, but it has nothing to bring back."""
        return self.kind in UNTAUGHT or any(entry.get("reference") for entry in self.entries.values())

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
    def asked(self) -> bool:
        """Whether performance is measured on multiple-choice questions."""
        data: dict[str, Any] = (self.results[0].get("config") or {}).get("data") or {}
        return bool((data.get("questions") or {}).get("forget"))

    @property
    def scored(self) -> str:
        """What a performance is measured on, in the plural."""
        return "questions" if self.asked else "sequences"

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

    def original(self, key: str) -> Stat:
        """A performance of the original model before any attack; empty without one."""
        return next((model.metrics[key] for model in self.of("original") if key in model.metrics), Stat())

    def reaches(self, value: float, stat: Stat) -> bool:
        """Whether a performance is at least as good as the worse end of a quantity's range, or as its mean if it has no range."""
        ends = stat.spread or (stat.mean, stat.mean)
        return value >= ends[0] if self.higher else value <= ends[1]

    def back_after(self, model: ModelReport) -> int | None:
        """First attack step after which the worst case reaches the original's forget performance; None if none does."""
        original = self.original("forget")
        steps = sorted(model.worst) if original else []
        return next((step for step in steps if self.reaches(model.worst[step].mean, original)), None)

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
