"""Attacks on one model in the results of one seed: their curves, and the worst case over them at every step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from undo_core.attacks.grid import bounded_worst, harm


@dataclass(frozen=True)
class Point:
    """Value of one seed.

    Attributes:
        seed: seed of the run.
        value: accuracy in [0, 1], nats per token, or a ratio.
        low, high: 95 % interval of the evaluation, if the value is a single evaluation.
        n: number of sequences evaluated.
        rate: learning rate of the attack that gave the value.
        retain: retain performance of the same attacked model.
        attack: name of the attack that gave the value; None for the headline attack.
        stage: folder of the model that was evaluated.
    """

    seed: int
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    rate: float | None = None
    retain: float | None = None
    attack: str | None = None
    stage: str | None = None


@dataclass(frozen=True)
class Curve:
    """Curve of one trial of an attack on one model, for example at one learning rate.

    Attributes:
        steps: steps at which the attack evaluates.
        points: the evaluated values, by step.
        headline: headline step of a further attack; None for the headline attack, which uses the run's.
        counts: whether it enters the worst case: the attack needs no original model.
    """

    steps: list[int]
    points: dict[int, Point]
    headline: int | None = None
    counts: bool = True

    def counted(self, step: int, headline: int | None) -> Point | None:
        """Returns the point of this curve to compare at a step of another attack.

        It is the last evaluation up to that step; but at the run's headline step it is the one at the attack's own headline
        step.
        """
        at = max((s for s in self.steps if s <= step), default=None)
        if step == headline and self.headline is not None:
            at = self.headline
        return self.points.get(at)


def attack_curves(entry: dict[str, Any], seed: int) -> list[Curve]:
    """Curves of every attack on a model, those of the headline attack first."""
    attacks = {None: entry.get("attack"), **(entry.get("attacks") or {})}
    curves = []
    for name, attack in attacks.items():
        for curve in (attack or {}).get("curves", ()):
            points = {}
            for index, (step, score) in enumerate(zip(attack["steps"], curve["forget"], strict=False)):
                retain = curve["retain"][index]["value"] if curve.get("retain") else None
                interval = (score.get("low"), score.get("high"), score.get("n"))
                points[step] = Point(seed, score["value"], *interval, curve.get("rate"), retain, name, curve.get("stage"))
            curves.append(Curve(attack["steps"], points, attack.get("headline_step"), not attack.get("needs_original")))
    return curves


def worst_by_attack(entry: dict[str, Any], seed: int, higher: bool, headline: int) -> dict[tuple[str | None, int], Point]:
    """Worst case of a model under each attack, over its grid, by the attack's name and its own headline step."""
    found: dict[tuple[str | None, int], Point] = {}
    for curve in attack_curves(entry, seed):
        step = headline if curve.headline is None else curve.headline
        point = curve.points.get(step)
        if point is not None:
            key = point.attack, step
            found[key] = max(found.get(key, point), point, key=lambda point: harm(point.value, higher))
    return found


def envelope(entry: dict[str, Any], seed: int, higher: bool, headline: int, least: bool = False) -> dict[int, Point]:
    """Worst case of a model at every step of its headline attack, over that attack's rates and all further attacks.

    For an attack that evaluates at other steps, the last earlier evaluation counts; an attack without training, which has only
    step 0, counts at every step. At ``headline``, the run's headline step, every attack counts at its own headline step, as in
    :func:`undo_core.worst_of`. With ``least``, returns the weakest attack at every step instead.
    """
    return _over(entry, seed, higher, (entry.get("attack") or {}).get("steps", ()), headline, least)


def drawn(entry: dict[str, Any], seed: int, higher: bool, least: bool = False) -> dict[int, Point]:
    """Worst case of a model over the steps for a figure: at every step of any attack that counts, each at its own steps.

    As :func:`envelope`, but without a headline step, at which an attack would stand at the step of another.
    """
    steps = {step for curve in attack_curves(entry, seed) if curve.counts for step in curve.steps}
    return _over(entry, seed, higher, sorted(steps), None, least)


def _over(
    entry: dict[str, Any], seed: int, higher: bool, steps: Iterable[int], headline: int | None, least: bool
) -> dict[int, Point]:
    curves, found = [curve for curve in attack_curves(entry, seed) if curve.counts], {}
    pick = min if least else max
    for step in steps:
        known = [point for curve in curves if (point := curve.counted(step, headline)) is not None]
        if known:
            found[step] = pick(known, key=lambda point: harm(point.value, higher))
    return found


def bounded(entry: dict[str, Any], seed: int, metric: dict[str, Any]) -> Point | None:
    """Worst case over the trials that leave the model useful; None without a margin in ``metric`` or for a model not attacked."""
    if metric.get("retain_margin") is None or not entry.get("attack"):
        return None
    worst = bounded_worst(entry, metric)
    forget = worst["forget"]
    interval = (forget.get("low"), forget.get("high"), forget.get("n"))
    return Point(seed, forget["value"], *interval, retain=worst["retain"]["value"], attack=worst["attack"])
