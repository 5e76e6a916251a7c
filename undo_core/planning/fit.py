"""Finds the cheapest changes of settings with which stages fit in a given memory."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.graph import attacked_models, graph_of, measured_models
from undo_core.pipeline.needs import Change
from undo_core.pipeline.stage import Stage
from undo_core.planning.models import Predict, predictor
from undo_core.planning.table import largest

Need = Callable[[dict[str, Any]], int]  # peak memory in bytes with these changes
Agree = Callable[[Change, Change], bool]


@dataclass(frozen=True)
class Fit:
    """Changes of settings and the peak memory with them.

    Attributes:
        changes: new values by path below the stage's section of the configuration, such as
            ``{"train.activation_checkpointing": True}``.
        memory_bytes: predicted peak memory.
    """

    changes: dict[str, Any]
    memory_bytes: int


def fit_notes(config: RunConfig, limit: int) -> tuple[list[str], list[str]]:
    """Finds flags with which every stage fits in ``limit`` bytes.

    Returns:
        A line with flags for each section of the configuration that needs them, and a line for each that no flags make fit.
    """
    predict, groups = predictor(config), dict[str, list[Stage]]()
    graph = graph_of(config)
    first = {name: next(iter(models.values())) for name, models in attacked_models(config, graph).items()}
    attacks = {name: [stage for _, stages in attacked.lines() for stage in stages] for name, attacked in first.items()}
    measured = {f"measures.{name}": next(iter(m.values())) for name, m in measured_models(config, graph).items()}
    sections = {stage.key: name for name, trials in attacks.items() for stage in trials}
    sections |= {stage.key: name for name, stage in measured.items()}
    for stage in graph.stages() + [largest(trials) for trials in attacks.values()] + list(measured.values()):
        if predict(stage).total > limit:
            # Grouped, because a flag applies to all stages of a section.
            groups.setdefault(sections.get(stage.key, stage.kind), []).append(stage)
    flags, hopeless = [], []
    for name, group in groups.items():
        section = f"attacks.{name}" if name in config.attacks else name if name in attacks else group[0].kind

        def need(changes: dict[str, Any], group: list[Stage] = group) -> int:
            return max(peak(predict, stage, changes) for stage in group)

        title = name if len(group) > 1 or group[0].key in sections else group[0].title
        fit, least = cheapest_fit(group[0], limit, need)
        if fit is None:
            with_ = f"with {_flags(section, least)}" if least.changes else "and no setting changes that"
            hopeless.append(f"{title} needs at least {_gib(least.memory_bytes)} GiB, {with_}")
        else:
            flags.append(f"{title}: {_gib(need({}))} GiB; {_gib(fit.memory_bytes)} GiB with {_flags(section, fit)}")
    return flags, hopeless


def peak(predict: Predict, stage: Stage, changes: dict[str, Any]) -> int:
    """Returns the largest peak memory, in bytes, of a stage with changed settings and the stages that the changes add."""
    changed, known = stage.changed(changes), {source.key for source in stage.inputs.values()}
    added = [source for source in changed.inputs.values() if source.key not in known]
    return max(predict(each).total for each in (changed, *added))


def cheapest_fit(stage: Stage, limit: int, need: Need) -> tuple[Fit | None, Fit]:
    """Finds the cheapest changes with which stages need at most ``limit`` bytes.

    A change is assumed to cost more than all changes before it in :meth:`Stage.cheaper` together. From the most expensive
    change down, each one is dropped if the cheaper changes that can be combined suffice without it. This takes a few
    predictions for each change instead of one for every subset.

    Args:
        stage: one of the stages, which says what can be changed.
        limit: memory in bytes.
        need: peak memory of the largest stage with given changes.

    Returns:
        The cheapest changes that fit, or None; and the same changes, or, if none fit, those with the least memory.
    """
    possible = stage.cheaper()
    known: dict[tuple[Change, ...], Fit] = {}
    agree = functools.cache(functools.partial(_agree, stage))

    def fit(chosen: tuple[Change, ...]) -> Fit:
        if chosen not in known:
            changes = _smallest(chosen)
            known[chosen] = Fit(changes, need(changes))
        return known[chosen]

    def least(chosen: tuple[Change, ...], cheaper: list[Change]) -> Fit:
        """Adds as many ``cheaper`` changes as can be combined; returns the first combination that fits, else the smallest."""
        fits = []
        for together in _together(possible, chosen, cheaper, agree):
            fits.append(fit(together))
            if fits[-1].memory_bytes <= limit:
                break
        return min(fits, key=lambda fit: fit.memory_bytes)

    smallest = least((), possible)
    if smallest.memory_bytes > limit:
        return None, smallest
    chosen: tuple[Change, ...] = ()
    for index in reversed(range(len(possible))):
        alone = all(agree(possible[index], other) for other in chosen)
        if alone and least(chosen, possible[:index]).memory_bytes > limit:
            chosen = (possible[index], *chosen)
    # The loop keeps true that chosen fits together with the changes not examined yet; none are left, so chosen fits.
    found = fit(chosen)
    for change in chosen:
        found = _first_that_fits(found, change, limit, need)
    return found, found


def _first_that_fits(smallest: Fit, change: Change, limit: int, need: Need) -> Fit:
    """Replaces the value of ``change`` by its first value that fits, found by bisection; the last one is known to fit."""
    first, last, best = 0, len(change.values) - 1, smallest
    while first < last:
        middle = (first + last) // 2
        changes = {**smallest.changes, change.flag: change.values[middle]}
        tried = Fit(changes, need(changes))
        if tried.memory_bytes <= limit:
            last, best = middle, tried
        else:
            first = middle + 1
    return best


def _together(
    possible: list[Change], chosen: tuple[Change, ...], cheaper: list[Change], agree: Agree
) -> Iterator[tuple[Change, ...]]:
    """Yields ``chosen`` with as many of the cheaper changes as can be combined.

    Of two changes that exclude each other, the first combination has the more expensive one, the second the one with several
    values.
    """
    seen = set()
    for prefer_several in (False, True):
        together = list(chosen)
        for change in sorted(reversed(cheaper), key=lambda change: not (prefer_several and len(change.values) > 1)):
            if all(agree(change, other) for other in together):
                together.append(change)
        result = tuple(sorted(together, key=possible.index))
        if result not in seen:
            seen.add(result)
            yield result


def _agree(stage: Stage, one: Change, other: Change) -> bool:
    """Whether two changes can be made together."""
    return one.flag != other.flag and stage.accepts(_smallest((one, other)))


def _smallest(chosen: tuple[Change, ...]) -> dict[str, Any]:
    """The changes, each with the value that needs the least memory."""
    return {change.flag: change.values[-1] for change in chosen}


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def _flags(section: str, fit: Fit) -> str:
    return " ".join(f"--{section}.{path}={str(value).lower()}" for path, value in fit.changes.items())


def bytes_of(text: str) -> int:
    """Converts a size to bytes: ``24GB`` (powers of 1000), ``24GiB`` (powers of 1024), ``500MB`` or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ValueError(f"memory: got {text!r}, wanted a size such as 24GB, 24GiB or 500MB")
    power = " KMGT".index(found[2].upper()) if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)
