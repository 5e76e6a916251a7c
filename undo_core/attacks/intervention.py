"""An attack that changes a model once, in its weights, its activations or its input, and is then evaluated.

Each kind is one file in :mod:`undo_core.attacks.interventions`, found by being there: a frozen dataclass of settings with the
method :meth:`Intervention.apply`.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from undo_core.attacks.config import Trial
from undo_core.data.sequences import Sequences
from undo_core.evaluation.kinds import enter
from undo_core.evaluation.metrics import evaluate
from undo_core.models import head_of
from undo_core.models.layers import change_output, find_layers

INTERVENTIONS: dict[str, type[Intervention]] = {}
Prompted = Callable[[Sequences], tuple[Sequences, torch.Tensor]]
"""Function that puts something before sequences: returns the longer sequences, and which of their tokens count."""


@dataclass(frozen=True)
class Given:
    """What an intervention may use besides the model.

    Attributes:
        forget: training text of the forgotten capability; the evaluation uses other sequences.
        retain: training text of what was kept.
        original: returns the model before the unlearning; each call loads another copy.
        seed: seed of whatever is drawn.
        undone: functions that remove what was added to the model, such as hooks; called after the evaluation.
    """

    forget: Sequences
    retain: Sequences
    original: Callable[[], PreTrainedModel]
    seed: int = 0
    undone: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


@dataclass(frozen=True)
class Effort:
    """What an intervention computes before the evaluation, for ``undo plan``.

    Attributes:
        steps: batches of training text that run through the model.
        sequences: sequences in a batch.
        passes: forward passes of a batch; a backward pass, which computes no gradient of the weights, counts as one.
    """

    steps: int = 0
    sequences: int = 0
    passes: int = 0


def grid(name: str, *defaults: Any) -> Any:
    """Declares a setting with several values, each of which is tried; ``name`` is its name in that of a trial."""
    return field(default_factory=lambda: list(defaults), metadata={"grid": name})


@dataclass(frozen=True)
class Intervention(abc.ABC):
    """Base of the settings of all interventions.

    A subclass has a field ``kind`` with the kind's name, and other fields; those declared by :func:`grid` are tried in every
    combination. In :meth:`apply` each of them has a single value.

    Attributes:
        seed: seed of whatever is drawn; None derives it from the run's seed.
        draws: whether anything is drawn, so that the seed changes the result.
        needs_original: whether it needs the original model. The worst case leaves such an attack out: whoever has the original
            needs no attack.
        trains: False: an intervention has no learning rate of the grid and no curve over steps.
        seeds: 1: an intervention has a single trial for each point of its grid.
        evaluations: 0, the step at which the changed model is evaluated.
    """

    seed: int | None = field(default=None, kw_only=True)
    draws: ClassVar[bool] = False
    needs_original: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    seeds: ClassVar[int] = 1
    evaluations: ClassVar[list[int]] = [0]  # read only

    def __init_subclass__(cls) -> None:
        enter(INTERVENTIONS, cls)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of attacks that it tries: its own."""
        return (self.kind,)  # pyrefly: ignore[missing-attribute]

    @abc.abstractmethod
    def apply(self, model: PreTrainedModel, given: Given) -> Prompted | None:
        """Changes ``model`` in place; returns how the evaluated sequences change, or None if they do not.

        Raises:
            ValueError: the settings do not suit the model; nothing is changed.
        """

    def effort(self) -> Effort:
        """What :meth:`apply` computes, apart from changes of the weights."""
        return Effort()

    def points(self) -> dict[str, dict[str, Any]]:
        """The points of the grid: the value of each grid setting, by the name of the trial, such as ``weight-0.5``."""
        names, found = self._grid(), {}
        for values in itertools.product(*(getattr(self, name) for name in names)):
            own = dict(zip(names, values, strict=True))
            found["-".join(f"{names[name]}-{_shown(value)}" for name, value in own.items()) or self.kind] = own
        return found

    def point(self, trial: str) -> dict[str, Any]:
        """The values of one trial by their names in that of the trial, such as ``{"weight": 0.5}``."""
        names = self._grid()
        return {names[name]: value for name, value in self.points()[trial].items()}

    def _grid(self) -> dict[str, str]:
        return {entry.name: entry.metadata["grid"] for entry in dataclasses.fields(self) if "grid" in entry.metadata}

    def trials(self, rates: Sequence[float] | None = None) -> list[Trial]:
        """The trials of the grid; there are no learning rates to choose."""
        return [Trial(setting=name) for name in self.points()]

    def at(self, trial: Trial) -> Intervention:
        """This intervention at one point of its grid."""
        own = self.points()[trial.setting or ""]
        return dataclasses.replace(self, **{name: [value] for name, value in own.items()})

    def settings(self) -> dict[str, Any]:
        """The settings that change the result, as JSON values; they are part of the stage's key."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "seed" or self.draws}


@contextlib.contextmanager
def intervened(model: PreTrainedModel, attack: Intervention, given: Given) -> Iterator[Callable[..., dict[str, Any]]]:
    """Context in which ``model`` is under an intervention at one point of its grid; yields an :func:`evaluate` that knows it.

    On exit hooks are removed. Changes of the weights remain.

    Raises:
        ValueError: ``attack`` has several points, or does not suit the model.
    """
    if len(attack.points()) != 1:
        raise ValueError(f"attack: got {len(attack.points())} points of the grid, wanted one: see Intervention.at")
    with given.undone:
        prompted = attack.apply(model, given)

        def scored(model: PreTrainedModel, sequences: Sequences) -> dict[str, Any]:
            if prompted is None:
                return evaluate(model, sequences)
            longer, counted = prompted(sequences)
            return evaluate(model, longer, counted=counted)

        yield scored


def change_layer(model: PreTrainedModel, given: Given, index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes the outputs of a layer until the intervention ends."""
    head_of(model)  # measures the head before the hidden states change
    given.undone.callback(change_output(find_layers(model)[index], change).remove)


def check_counts(**counts: int) -> None:
    """Raises a ValueError unless each of the settings is at least 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, wanted an integer >= 1")


def check_numbers(name: str, values: list[float], low: float, high: float, *, above: bool = False) -> None:
    """Raises a ValueError unless ``values`` are different finite numbers from ``low`` (or above it) to ``high``."""
    good = [math.isfinite(value) and (low < value if above else low <= value) and value <= high for value in values]
    if not values or not all(good) or len(set(values)) < len(values):
        wanted = f"{'above' if above else 'from'} {low:g}{'' if high == math.inf else f' to {high:g}'}"
        raise ValueError(f"{name}: got {values}, wanted different numbers {wanted}")


def check_names(name: str, values: list[str], known: tuple[str, ...]) -> None:
    """Raises a ValueError unless ``values`` are different names among ``known``."""
    if not values or set(values) - set(known) or len(set(values)) < len(values):
        raise ValueError(f"{name}: got {values}, wanted different ones of {', '.join(known)}")


def _shown(value: Any) -> str:
    short = f"{value:g}" if isinstance(value, (int, float)) else str(value)
    return short if isinstance(value, str) or float(short) == value else repr(value)
