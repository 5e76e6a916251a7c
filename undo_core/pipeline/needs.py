"""What a stage states before it runs: its predicted memory, its cost, and changes with which it needs less memory."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Memory:
    """Memory of a stage in bytes, by parts, at the peak of one phase.

    Attributes:
        phase: loading, drawing (of text, by a student), forward, backward, step or evaluation.
        weights: weights of the trained model, copies that a method keeps, and a file while it is read.
        gradients: gradients that exist in that phase.
        optimizer: masters, moments of the gradients, and the temporaries of a step.
        activations: tensors saved for the backward pass and temporaries of the layers, including the teacher's.
        workspace: workspace of the fused losses.
        teacher: the teacher's weights.
        process: memory of the process itself: libraries and token ids; 0 on a GPU.
    """

    phase: str
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    workspace: int = 0
    teacher: int = 0
    process: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, part) for part in PARTS)


PARTS = tuple(field.name for field in dataclasses.fields(Memory))[1:]


@dataclass(frozen=True)
class Scene:
    """The model and data on which a stage's cost depends, besides the stage's own settings.

    Attributes:
        model: the model, on the meta device.
        length: tokens in a sequence.
        sequences: number of sequences that students are distilled on, as far as it is known.
    """

    model: PreTrainedModel
    length: int
    sequences: int

    @functools.cached_property
    def parameters(self) -> int:
        """Number of elements of the model's parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclass(frozen=True)
class Cost:
    """The predicted work of a stage; upper bounds where a stop rule may end it earlier.

    Attributes:
        disk: bytes that its folder takes on disk.
        steps: optimizer steps.
        sequences: sequences that a step runs through the model, all sources together.
        passes: forward passes that a step costs; a backward pass counts as two.
        positions: tokens that run through the model in all steps, padding included.
        flops: floating-point operations.
        ruled: whether a stop rule may end the stage earlier.
        checkpoint: bytes of a checkpoint within the stage; 0 if it writes none.
    """

    disk: int
    steps: int = 0
    sequences: int = 0
    passes: float = 0.0
    positions: int = 0
    flops: float = 0.0
    ruled: bool = False
    checkpoint: int = 0

    @property
    def scratch(self) -> int:
        """Bytes on disk that the stage needs for a while beyond its folder: the newest checkpoint is kept until the next is complete."""
        return max(0, 2 * self.checkpoint - self.disk)


@dataclass(frozen=True)
class Change:
    """A change of one of a stage's settings that reduces its memory.

    Attributes:
        flag: path of the setting below the stage's section of the configuration, such as ``train.optimizer``.
        values: values to try; each one needs less memory and more time than the one before it.
    """

    flag: str
    values: tuple[Any, ...]
