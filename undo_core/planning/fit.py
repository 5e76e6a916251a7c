"""The cheapest change of settings with which stages fit in a given memory."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from undo_core.attacks.config import AttackConfig, attack_config
from undo_core.training.config import TrainConfig
from undo_core.unlearning import unlearn_config

Settings = dict[str, Any]  # of a stage
Need = Callable[[dict[str, Any]], int]  # peak bytes with these changes

Change = tuple[str, Any]  # a setting and its new value
Agree = Callable[[Change, Change], bool]

# Cheapest first: in time, then in what may change the result. "micro_batch_size" stands for the largest one that fits.
CHANGES: tuple[Change, ...] = (
    ("activation_checkpointing", True),
    ("micro_batch_size", None),
    ("teacher.kind", "cached"),
    ("step_in_backward", True),
    ("optimizer", "adamw-8bit"),
    ("optimizer", "adamw-4bit"),
    ("precision", "bfloat16-stochastic"),
    ("optimizer", "adamw-offload"),
)


@dataclass(frozen=True)
class Fit:
    """Settings to change, by their path below the stage's section of the configuration, and the peak with them.

    Attributes:
        changes: such as ``{"train.activation_checkpointing": True}``.
        memory_bytes: predicted.
    """

    changes: dict[str, Any]
    memory_bytes: int


def cheapest_fit(kind: str, settings: Settings, limit: int, need: Need) -> tuple[Fit | None, Fit]:
    """The cheapest changes with which stages need at most ``limit`` bytes, None where there are none; and those that need least.

    A change is taken to be dearer than all before it in ``CHANGES`` together. Each one is left out, the dearest first, where as many
    cheaper ones as agree suffice without it: a few predictions a change, instead of one for every set.

    Args:
        kind: of the stages, and ``settings`` those of one of them, to see what can be changed.
        limit: bytes.
        need: peak of the largest of the stages with changes.
    """
    possible = [change for change in CHANGES if _possible(kind, settings, *change)]
    known: dict[tuple[Change, ...], Fit] = {}
    agree = functools.cache(functools.partial(_agree, kind, settings))

    def fit(chosen: tuple[Change, ...]) -> Fit:
        if chosen not in known:
            changes = _by_path(kind, chosen)
            known[chosen] = Fit(changes, need(changes))
        return known[chosen]

    def least(chosen: tuple[Change, ...], cheaper: list[Change]) -> Fit:
        """With all of the cheaper changes that go together; the first of them that fits."""
        fits = []
        for together in _together(chosen, cheaper, agree):
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
    found = fit(chosen)  # what fitted before a change was looked at fits after it
    path = _path(kind, "micro_batch_size")
    if path in found.changes:
        found = _widest(found, path, _training(kind, settings), limit, need)
    return found, found


def _widest(smallest: Fit, path: str, training: Settings, limit: int, need: Need) -> Fit:
    """With the largest micro-batch, of halves of the size that is, that fits."""
    sizes = [training["micro_batch_size"] or training["batch_size"]]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    first, last, best = 1, len(sizes) - 1, smallest  # the last one fits
    while first < last:
        middle = (first + last) // 2
        changes = {**smallest.changes, path: sizes[middle]}
        tried = Fit(changes, need(changes))
        if tried.memory_bytes <= limit:
            last, best = middle, tried
        else:
            first = middle + 1
    return best


def _together(chosen: tuple[Change, ...], cheaper: list[Change], agree: Agree) -> Iterator[tuple[Change, ...]]:
    """``chosen`` and as many of the cheaper changes as agree: the dearer of two that do not, or micro-batches."""
    seen = set()
    for wanted in (None, "micro_batch_size"):
        together = list(chosen)
        for change in sorted(reversed(cheaper), key=lambda change: change[0] != wanted):
            if all(agree(change, other) for other in together):
                together.append(change)
        result = tuple(sorted(together, key=CHANGES.index))
        if result not in seen:
            seen.add(result)
            yield result


def _agree(kind: str, settings: Settings, one: Change, other: Change) -> bool:
    """Whether two changes can be made together."""
    return one[0] != other[0] and _accepted(kind, settings, one, other)


def _accepted(kind: str, settings: Settings, *chosen: Change) -> bool:
    """Whether the settings themselves allow the changes."""
    changed = apply_changes(settings, _by_path(kind, chosen))
    try:
        if kind == "unlearn":
            unlearn_config(changed)
        elif kind == "relearn":
            attack_config(changed)
        else:
            TrainConfig(**changed["train"])
    except ValueError:
        return False
    return True


def _by_path(kind: str, chosen: tuple[Change, ...]) -> dict[str, Any]:
    return {_path(kind, name): 1 if name == "micro_batch_size" else value for name, value in chosen}


def apply_changes(settings: Settings, changes: dict[str, Any]) -> Settings:
    """A copy of the stage's settings with changes in it."""
    changed = copy.deepcopy(settings)
    for path, value in changes.items():
        *outer, name = path.split(".")
        place = changed
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = value
    return changed


def _possible(kind: str, settings: Settings, name: str, value: Any) -> bool:
    """Whether the stage has this setting, allows the change, and it is not so already."""
    if name == "teacher.kind":
        matched = "hidden" in settings  # a cache knows no layers
        return kind == "distill" and not matched and settings.get("teacher", {}).get("kind", "resident") == "resident"
    training = _training(kind, settings)
    if name == "optimizer" and not training["optimizer"].startswith("adamw"):
        return False
    if not _accepted(kind, settings, (name, value)):
        return False
    if name == "micro_batch_size":  # it would change what some methods compute
        sums = kind != "unlearn" or all(entry.sums for entry in unlearn_config(settings).entries())
        return (training[name] or training["batch_size"]) > 1 and sums
    if value == "adamw-offload" and not torch.cuda.is_available():
        return False
    if name == "precision" and training[name] == "bfloat16":
        return False
    return training[name] != value


def _training(kind: str, settings: Settings) -> Settings:
    """A stage's training settings; an attack's leave out what is at its default."""
    return {**dataclasses.asdict(AttackConfig()), **settings} if kind == "relearn" else settings["train"]


def _path(kind: str, name: str) -> str:
    return name if kind == "relearn" or name.startswith("teacher") else f"train.{name}"
