"""A measure of what a model still holds inside, as a curve over its layers or over another axis.

Each kind is one file in :mod:`undo_core.evaluation.inside`, found by being there: a frozen dataclass of settings with the method
:meth:`Measurement.curve`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from transformers import PreTrainedModel

from undo_core.data.sequences import Sequences
from undo_core.evaluation.kinds import enter

MEASUREMENTS: dict[str, type[Measurement]] = {}
Curve = list[tuple[float, float | None]]
"""Points of a curve: the layer (1 for the first, 0 for the embeddings) or another coordinate, and the value or None."""


@dataclass(frozen=True)
class Texts:
    """The text that a measure reads.

    Attributes:
        fit: validation sequences, by name (forget, retain), for what is fitted.
        score: test sequences, by name, for what is scored.
        reference: returns the model that the measured one is compared with.
    """

    fit: dict[str, Sequences]
    score: dict[str, Sequences]
    reference: Callable[[], PreTrainedModel]


@dataclass(frozen=True)
class Measurement(abc.ABC):
    """Base of the settings of all measures.

    A subclass has a field ``kind`` with the kind's name, and other fields.

    Attributes:
        text: text that is read: forget or retain.
        against: model to compare with: the original, or the data-filtered one of the same run.
        sequences: largest number of sequences that are read.
        compares: whether another model is needed. A measure without one is also taken of the original.
        reads: whether text is read.
        axis: name of the coordinate.
        value: what is measured, for the axis of a figure.
        summary: what :meth:`number` returns, for a column of a table.
    """

    text: Literal["forget", "retain"] = dataclasses.field(default="forget", kw_only=True)
    against: Literal["original", "filter"] = dataclasses.field(default="original", kw_only=True)
    sequences: int = dataclasses.field(default=256, kw_only=True)
    compares: ClassVar[bool] = True
    reads: ClassVar[bool] = True
    axis: ClassVar[str] = "layer"
    value: ClassVar[str]
    summary: ClassVar[str] = "mean"

    def __init_subclass__(cls) -> None:
        enter(MEASUREMENTS, cls)

    def __post_init__(self) -> None:
        for name, known in (("text", ("forget", "retain")), ("against", ("original", "filter"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted {' or '.join(known)}")
        if self.sequences < 2:
            raise ValueError(f"sequences: got {self.sequences}, wanted an integer >= 2")
        if self.against == "filter" and not self.compares:
            raise ValueError(f"against: got filter with kind {self.kind}, which compares with no model; remove it")

    @abc.abstractmethod
    def curve(self, model: PreTrainedModel, texts: Texts) -> Curve:
        """Measures ``model``, which is the same afterwards.

        Raises:
            ValueError: the models or the text do not suit the measure.
        """

    def number(self, curve: Curve, higher: bool) -> float | None:
        """A single number for the curve: by default the mean; ``higher`` is whether performance is an accuracy."""
        known = [value for _, value in curve if value is not None]
        return math.fsum(known) / len(known) if known else None

    @abc.abstractmethod
    def passes(self, layers: int) -> int:
        """How often the text runs through a model with so many layers, for ``undo plan``."""

    def held(self, model: PreTrainedModel) -> int:
        """Bytes that are held beside the models and the activations of an evaluation, for ``undo plan``."""
        return 0

    def read(self, texts: dict[str, Sequences]) -> Sequences:
        """The sequences of the chosen text, as many as are read."""
        return texts[self.text].take(slice(0, self.sequences))

    def settings(self) -> dict[str, Any]:
        """The settings as JSON values; they are part of the stage's key."""
        return dataclasses.asdict(self)
