"""Unlearning: suppress a capability. One file per method; a method is a loss and the parameters it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from undo_core.data.rows import Rows
from undo_core.models import forward_flops
from undo_core.training import Source, TrainConfig, TrainResult, as_source, train
from undo_core.unlearn.config import RMUConfig, UnlearnConfig
from undo_core.unlearn.graddiff import graddiff
from undo_core.unlearn.maxent import maxent
from undo_core.unlearn.method import Method
from undo_core.unlearn.rmu import rmu, rmu_flops

METHODS: dict[str, Callable[[PreTrainedModel, UnlearnConfig], Method]] = {"maxent": maxent, "graddiff": graddiff, "rmu": rmu}


def unlearn(
    model: PreTrainedModel,
    *,
    forget: Rows | Source | Iterable[Any],
    retain: Rows | Source | Iterable[Any],
    config: UnlearnConfig | None = None,
    folder: Path | None = None,
    title: str = "unlearn",
    progress: bool = True,
    **train_options: Any,
) -> TrainResult:
    """Suppress what ``forget`` shows and keep what ``retain`` shows, by training ``model`` in place.

    Args:
        model: any Hugging Face causal language model; trained in place. A method that trains some parameters leaves the others without
            gradients meanwhile.
        forget: labelled text to forget: token rows, a function of the step, or an iterable of batches.
        retain: text to keep, in the same forms.
        config: method, weights, optimizer; the default is MaxEnt as published for arithmetic.
        folder: for checkpoints and the log, so that a killed run resumes.
        title: name on the progress bar.
        progress: show it.
        train_options: passed to :func:`undo_core.training.train` (``evaluate``, ``stop``).

    Returns:
        Steps, tokens and history.

    Raises:
        ValueError: an unknown method, or data of no known form.
    """
    config = config or UnlearnConfig()
    size, seed = config.train.batch_size, config.train.seed or 0
    sources = {
        "forget": as_source(forget, size=size, seed=seed, name="forget"),
        "retain": as_source(retain, size=size, seed=seed + 1, name="retain"),
    }
    method = METHODS[config.method](model, config)
    with method.alone(model):
        return train(
            model,
            method.loss,
            sources,
            config.train,
            parameters=method.parameters,
            folder=folder,
            settings={"unlearn": {name: value for name, value in asdict(config).items() if name != "train"}},
            title=title,
            progress=progress,
            **train_options,
        )


def unlearn_flops(model: PreTrainedModel, config: UnlearnConfig, length: int) -> dict[str, float]:
    """FLOPs of a training step for one position of each source, in rows of ``length`` tokens."""
    if config.method == "rmu":
        return rmu_flops(model, config, length)
    return dict.fromkeys(("forget", "retain"), 3 * forward_flops(model, length))


__all__ = ["METHODS", "Method", "RMUConfig", "TrainConfig", "UnlearnConfig", "unlearn", "unlearn_flops"]
