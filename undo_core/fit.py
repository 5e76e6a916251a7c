"""The cheapest change of settings with which stages fit in a given memory."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from undo_core.attacks.config import AttackConfig

Settings = dict[str, Any]  # of a stage
Need = Callable[[dict[str, Any]], int]  # peak bytes with these changes

# Cheapest first: in time, then in what may change the result. "micro_batch_size" stands for the largest one that fits.
CHANGES: tuple[tuple[str, Any], ...] = (
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

    A change is taken to be dearer than all before it in ``CHANGES`` together, so sets of them are tried in the order of binary
    numbers.

    Args:
        kind: of the stages, and ``settings`` those of one of them, to see what can be changed.
        limit: bytes.
        need: peak of the largest of the stages with changes.
    """
    found = []
    for changes in _sets(kind, settings):
        for changed in _sizes(kind, settings, changes, limit, need):
            found.append(Fit(changed, need(changed)))
            if found[-1].memory_bytes <= limit:
                return found[-1], found[-1]
    return None, min(found, key=lambda fit: fit.memory_bytes)


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


def _sets(kind: str, settings: Settings) -> Iterator[dict[str, Any]]:
    possible = [change for change in CHANGES if _possible(kind, settings, *change)]
    for number in range(1 << len(possible)):
        chosen = [change for index, change in enumerate(possible) if number >> index & 1]
        names = [name for name, _ in chosen]
        if len(set(names)) < len(names) or {"micro_batch_size", "step_in_backward"} <= set(names):
            continue
        yield {_path(kind, name): value for name, value in chosen}


def _possible(kind: str, settings: Settings, name: str, value: Any) -> bool:
    """Whether the stage has this setting and it is not so already."""
    if name == "teacher.kind":
        matched = "hidden" in settings  # a cache knows no layers
        return kind == "distill" and not matched and settings.get("teacher", {}).get("kind", "resident") == "resident"
    training = _training(kind, settings)
    if name == "optimizer" and not training["optimizer"].startswith("adamw"):
        return False
    if name == "micro_batch_size":
        size = training.get(name) or training["batch_size"]
        return name in training and size > 1 and not training["step_in_backward"]
    if name == "step_in_backward" and training.get("micro_batch_size") is not None:
        return False
    if value == "adamw-offload" and not torch.cuda.is_available():
        return False
    if name == "precision" and training[name] == "bfloat16":
        return False
    return name in training and training[name] != value


def _training(kind: str, settings: Settings) -> Settings:
    """A stage's training settings; an attack's leave out what is at its default."""
    return {**dataclasses.asdict(AttackConfig()), **settings} if kind == "relearn" else settings["train"]


def _path(kind: str, name: str) -> str:
    return name if kind == "relearn" or name.startswith("teacher") else f"train.{name}"


def _sizes(kind: str, settings: Settings, changes: dict[str, Any], limit: int, need: Need) -> Iterator[dict[str, Any]]:
    """The changes with each micro-batch size that is worth a try, the largest first; the smallest alone where it does not fit."""
    path = _path(kind, "micro_batch_size")
    if path not in changes:
        yield changes
        return
    training = _training(kind, settings)
    size = training["micro_batch_size"] or training["batch_size"]
    smallest = {**changes, path: 1}
    if need(smallest) > limit:
        yield smallest
        return
    while size > 1:
        size = -(-size // 2)
        yield {**changes, path: size}
