"""Finds the cheapest changes of settings with which stages fit in a given memory."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from undo_core.attacks.config import HEADLINE
from undo_core.attacks.search import SearchConfig
from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.graph import Graph, attacked_models, graph_of, measured_models
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
    predict, graph = predictor(config), graph_of(config)
    # The stages of each section of the configuration, because a flag applies to all of them, with their names in it.
    sections: dict[str, list[tuple[str, Stage]]] = {}
    for section, name, stage in _sections(config, graph):
        sections.setdefault(section, []).append((name, stage))
    flags, hopeless = [], []
    for section, members in sections.items():
        group = [(name, stage) for name, stage in members if predict(stage).total > limit]
        if not group:
            continue

        def need(changes: dict[str, Any], group: list[tuple[str, Stage]] = group) -> int:
            return max(peak(predict, stage, changes) for _, stage in group)

        first = group[0][1]
        named = " and ".join(name for name, _ in group if name)
        title = named or (first.title if len(group) == 1 else section)
        fit, least = cheapest_fit(first, limit, need, [stage for _, stage in members])
        if fit is None:
            with_ = f"with {_flags(section, least)}" if least.changes else "and no setting changes that"
            hopeless.append(f"{title} needs at least {_gib(least.memory_bytes)} GiB, {with_}")
        else:
            flags.append(f"{title}: {_gib(need({}))} GiB; {_gib(fit.memory_bytes)} GiB with {_flags(section, fit)}")
    return flags, hopeless


def _sections(config: RunConfig, graph: Graph) -> Iterator[tuple[str, str, Stage]]:
    """Yields the stages, one for each attack and measure, with their section of the configuration and their name in it, if any."""
    for stage in graph.stages():
        yield stage.kind, "", stage
    for name, models in attacked_models(config, graph).items():
        trials = [stage for _, line in next(iter(models.values())).lines() for stage in line]
        yield _section(config, name), name, largest(trials)
    for name, measured in measured_models(config, graph).items():
        yield f"measures.{name}", f"measures.{name}", next(iter(measured.values()))


def _section(config: RunConfig, name: str) -> str:
    """The section of the configuration with the settings of an attack; a search has those of the attack that it is like."""
    own = config.attacks.get(name)
    if own is None or (isinstance(own, SearchConfig) and own.like is None):
        return HEADLINE
    return f"attacks.{name}.like" if isinstance(own, SearchConfig) else f"attacks.{name}"


def peak(predict: Predict, stage: Stage, changes: dict[str, Any]) -> int:
    """Returns the largest peak memory, in bytes, of a stage with changed settings and the stages that the changes add."""
    changed, known = stage.changed(changes), {source.key for source in stage.inputs.values()}
    added = [source for source in changed.inputs.values() if source.key not in known]
    return max(predict(each).total for each in (changed, *added))


def cheapest_fit(stage: Stage, limit: int, need: Need, others: Sequence[Stage] = ()) -> tuple[Fit | None, Fit]:
    """Finds the cheapest changes with which stages need at most ``limit`` bytes.

    A change is assumed to cost more than all changes before it in :meth:`Stage.cheaper` together. From the most expensive
    change down, each one is dropped if the cheaper changes that can be combined suffice without it. This takes a few
    predictions for each change instead of one for every subset.

    Args:
        stage: one of the stages, which says what can be changed.
        limit: memory in bytes.
        need: peak memory of the largest stage with given changes.
        others: all stages that the changes concern, which must accept them.

    Returns:
        The cheapest changes that fit, or None; and the same changes, or, if none fit, those with the least memory.
    """
    concerned = [stage, *others]
    possible = [change for change in stage.cheaper() if _accepted(concerned, change)]
    known: dict[tuple[Change, ...], Fit] = {}
    agree = functools.cache(functools.partial(_agree, concerned))

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


def _agree(stages: Sequence[Stage], one: Change, other: Change) -> bool:
    """Whether two changes can be made together."""
    return one.flag != other.flag and _accepted(stages, one, other)


def _accepted(stages: Sequence[Stage], *changes: Change) -> bool:
    return all(stage.accepts(_smallest(changes)) for stage in stages)


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
