"""Distillation: match the suppressed model's logits from the damaged one, on unlabeled text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from undo_core.data.rows import Rows
from undo_core.models import same_vocabulary
from undo_core.training import Batch, Source, TrainConfig, TrainResult, as_source, train
from undo_core.training.losses import distillation


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
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
        teacher: the suppressed model; left as it is, in evaluation mode.
        text: the whole mix, unlabeled, forget text included (arXiv 2506.06278): token rows, a function of the step, or an iterable.
        config: optimizer, rates, batch sizes.
        folder: for checkpoints and the log, so that a killed run resumes.
        title: name on the progress bar.
        progress: show it.
        train_options: passed to :func:`undo_core.training.train` (``evaluate``, ``stop``).

    Raises:
        ValueError: different vocabularies, or data of no known form.
    """
    config = config or TrainConfig(steps=1000, batch_size=128, lr=7e-4, warmup=50)
    same_vocabulary(teacher, student)
    teacher.eval()

    def loss(student: PreTrainedModel, batches: dict[str, Batch], counted: dict[str, int]) -> torch.Tensor:
        return distillation(student, teacher, batches["text"], counted["text"])

    source = as_source(text, size=config.batch_size, seed=config.seed or 0, name="text")
    return train(student, loss, {"text": source}, config, folder=folder, title=title, progress=progress, **train_options)
