"""Distillation: match the suppressed model's logits from the damaged one, on unlabeled text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from undo_core.data.rows import Rows
from undo_core.models import vocabulary_of
from undo_core.teacher import Teacher, as_teacher
from undo_core.training import Batch, Source, TrainConfig, TrainResult, as_source, train
from undo_core.training.losses import distillation


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Teacher,
    text: Rows | Source | Iterable[Any],
    config: TrainConfig | None = None,
    *,
    folder: Path | None = None,
    title: str = "distill",
    progress: bool = True,
    **train_options: Any,
) -> TrainResult:
    """Train ``student`` in place to match ``teacher``: forward KL(teacher || student) at temperature 1 on every token.

    Args:
        student: the damaged model; trained in place.
        teacher: the suppressed model; left as it is, in evaluation mode. Or a teacher that takes less memory: streamed from disk
            (:class:`undo_core.teacher.ModelTeacher`), or cached (:class:`undo_core.teacher_cache.CachedTeacher`).
        text: the whole mix, unlabeled, forget text included (arXiv 2506.06278): token rows, a function of the step, or an iterable;
            a cached teacher knows the rows that it was made from.
        config: optimizer, rates, batch sizes.
        folder: for checkpoints and the log, so that a killed run resumes.
        title: name on the progress bar.
        progress: show it.
        train_options: passed to :func:`undo_core.training.train` (``evaluate``, ``stop``).

    Raises:
        ValueError: different vocabularies, data of no known form, or data that a cached teacher does not know.
    """
    config = config or TrainConfig(steps=1000, batch_size=128, lr=7e-4, warmup=50)
    known = as_teacher(teacher)
    rows_t, rows_s = known.vocabulary, vocabulary_of(student)
    if rows_t != rows_s:
        raise ValueError(f"student: got a vocabulary of {rows_s}, wanted the teacher's {rows_t}; both must share one tokenizer")
    known.check(text)

    def loss(student: PreTrainedModel, batches: dict[str, Batch], counted: dict[str, int]) -> torch.Tensor:
        return distillation(student, known.targets(batches["text"]), batches["text"], counted["text"])

    source = as_source(text, size=config.batch_size, seed=config.seed or 0, name="text")
    return train(student, loss, {"text": source}, config, folder=folder, title=title, progress=progress, **train_options)
