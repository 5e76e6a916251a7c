"""Teachers: sources of the targets of the distillation loss. A teacher is a model in memory, a model on disk, or a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import PreTrainedModel

from undo_core.distillation.streaming import stream_model
from undo_core.distributed.sharding import run
from undo_core.models import head_of, hidden_states, hidden_states_at, vocabulary_of
from undo_core.models.adapters import bare
from undo_core.training import Batch
from undo_core.training.identity import model_identity
from undo_core.training.losses import HiddenTargets, TopTargets

Kind = Literal["resident", "streamed", "cached", "topk"]


@dataclass(frozen=True)
class TeacherConfig:
    """Where the teacher is kept while a student learns from it.

    Attributes:
        kind: resident keeps a second model in memory; within a run it is in 16 bits if its checkpoint and the student's
            training are. streamed reads the layers from disk in each forward pass, in float32, and gives the same bits as a
            resident float32 teacher. cached computes and stores the final hidden states once; the loss is exact, and only the
            head stays in memory. topk stores only the most likely tokens; it is small, but approximate.
        dtype: dtype of the stored hidden states (cached): float32 gives the same bits as the resident teacher, bfloat16 takes
            half the disk space.
        k: number of tokens stored at each position (topk).
        vocab_size: number of real tokens if the head has more vocabulary entries (cached, topk); the others are never among the
            most likely tokens and have no probability. None for all entries.
        batch_size: sequences in a forward pass while the cache is made (cached, topk). None for the distillation's micro-batch
            size, which gives the same bits as the resident teacher.
    """

    kind: Kind = "resident"
    dtype: Literal["float32", "bfloat16"] = "float32"
    k: int = 64
    batch_size: int | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        kinds = ("resident", "streamed", "cached", "topk")
        if self.kind not in kinds:
            raise ValueError(f"teacher.kind: got {self.kind!r}, wanted {', '.join(kinds[:-1])} or {kinds[-1]}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"teacher.dtype: got {self.dtype!r}, wanted float32 or bfloat16")
        if self.dtype != "float32" and self.kind != "cached":
            raise ValueError(
                f"teacher.dtype: got {self.dtype!r} with kind {self.kind}, wanted float32: only cached hidden states have a "
                "dtype"
            )
        if self.k < 1:
            raise ValueError(f"teacher.k: got {self.k}, wanted an integer >= 1")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"teacher.vocab_size: got {self.vocab_size}, wanted an integer >= 1, or null")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"teacher.batch_size: got {self.batch_size}, wanted an integer >= 1")

    @property
    def stored(self) -> bool:
        """Whether the outputs are stored on disk, so that the model is needed only to make them."""
        return self.kind in ("cached", "topk")

    def settings(self) -> dict[str, Any]:
        """Settings that change the student, as JSON values; none for a resident teacher."""
        cached = ("batch_size", "vocab_size")
        used = {"resident": (), "streamed": ("kind",), "cached": ("kind", "dtype", *cached), "topk": ("kind", "k", *cached)}
        return {name: getattr(self, name) for name in used[self.kind] if getattr(self, name) is not None}


class Teacher(Protocol):
    """Protocol of the teachers of :func:`undo_core.distill`.

    Attributes:
        vocabulary: number of vocabulary entries of the head.
    """

    vocabulary: int

    def check(self, text: Any) -> None:
        """Raises a ValueError if the teacher has no targets for this data; called once, before training."""

    def targets(self, batch: Batch) -> HiddenTargets | TopTargets:
        """Returns the targets of a batch, on the batch's device."""


def teacher_identity(teacher: Teacher) -> dict[str, Any]:
    """What decides a teacher's targets, as JSON values: its ``identity()`` if it has that method, otherwise its type."""
    own = getattr(teacher, "identity", None)
    return {"kind": f"{type(teacher).__module__}.{type(teacher).__qualname__}"} if own is None else own()


class ModelTeacher:
    """A teacher that is a model: resident, or streamed by :func:`undo_core.distillation.streaming.stream_model`.

    Args:
        model: put in evaluation mode and otherwise unchanged.
        inner: hidden states to return as well, each given as a number of layers.
    """

    def __init__(self, model: PreTrainedModel, inner: Sequence[int] = ()) -> None:
        self.model, self.vocabulary, self.inner = bare(model.eval()), vocabulary_of(model), tuple(inner)

    @classmethod
    def streamed(cls, folder: str | Path) -> ModelTeacher:
        """Opens a checkpoint folder as a teacher whose layers stay on disk between forward passes."""
        return cls(stream_model(folder))

    def check(self, text: Any) -> None:
        """Accepts any data, as a model can compute targets for every batch."""

    def identity(self) -> dict[str, Any]:
        """Digests of the weights and the configuration, and the dtype; takes one pass over the weights."""
        return {"kind": "model", **model_identity(self.model), "dtype": str(self.model.get_output_embeddings().weight.dtype)}

    @torch.no_grad()
    def targets(self, batch: Batch) -> HiddenTargets:
        return run(self.model, self._targets, batch)

    def _targets(self, model: PreTrainedModel, batch: Batch) -> HiddenTargets:
        inputs = batch.shifted()[0]
        if not self.inner:
            return HiddenTargets(hidden_states(model, *inputs), head_of(model))
        hidden, inner = hidden_states_at(model, self.inner, *inputs)
        return HiddenTargets(hidden, head_of(model), inner=inner)


def as_teacher(teacher: PreTrainedModel | Teacher) -> Teacher:
    """Wraps a model as a teacher; returns a teacher unchanged."""
    return ModelTeacher(teacher) if isinstance(bare(teacher), PreTrainedModel) else teacher
