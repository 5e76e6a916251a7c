"""What a stage says about itself before it runs: its memory, its cost, and how it could take less memory."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Memory:
    """A stage's memory at the moment where it is largest, in bytes.

    Attributes:
        moment: loading, forward, backward, step or evaluation.
        weights: of the trained model, copies that a method keeps, and a file while it is read.
        gradients: those that exist at that moment.
        optimizer: masters, moments, and a step's temporaries.
        activations: what the backward pass will need, and the layers' temporaries; a teacher's too.
        workspace: of the fused losses.
        teacher: its weights.
        process: what is there anyway: libraries and token rows; 0 on a GPU.
    """

    moment: str
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    workspace: int = 0
    teacher: int = 0
    process: int = 0

    @property
    def total(self) -> int:
        """The peak."""
        return sum(getattr(self, part) for part in PARTS)


PARTS = tuple(field.name for field in dataclasses.fields(Memory))[1:]


@dataclass(frozen=True)
class Scene:
    """What a stage's cost depends on besides its own settings.

    Attributes:
        model: on the meta device.
        length: tokens in a row.
        rows: number of rows that students are distilled on, as far as it is known.
    """

    model: PreTrainedModel
    length: int
    rows: int

    @functools.cached_property
    def parameters(self) -> int:
        """Number of elements of the model's parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclass(frozen=True)
class Cost:
    """The work of a stage.

    Attributes:
        disk: bytes of what it leaves behind.
        steps: optimizer steps, at most.
        rows: rows that a step runs through the model, of all sources together.
        passes: forward passes that a step costs; a backward pass counts as two.
        positions: tokens that run through the model, padding included.
        flops: floating-point operations, at most.
        ruled: whether a stop rule may end it earlier.
    """

    disk: int
    steps: int = 0
    rows: int = 0
    passes: float = 0.0
    positions: int = 0
    flops: float = 0.0
    ruled: bool = False


@dataclass(frozen=True)
class Change:
    """A change of a stage's settings with which it needs less memory.

    Attributes:
        flag: path of the setting below the stage's section of the configuration, such as ``train.optimizer``.
        values: what to set it to; each one needs less memory and more time than the one before it.
    """

    flag: str
    values: tuple[Any, ...]
