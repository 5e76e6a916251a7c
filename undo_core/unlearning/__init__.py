"""Unlearning: suppress a capability of a model. One file per method; a method is a loss and the parameters that it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from undo_core import distributed
from undo_core.data.limits import limits_of
from undo_core.data.sequences import Sequences
from undo_core.models import check_vocab_size, evaluating, forward_flops, vocabulary_of
from undo_core.models.adapters import bare, check_adapters
from undo_core.training import Source, TrainConfig, TrainResult, as_source, train
from undo_core.training.batches import Batch, ReadSource
from undo_core.training.memory_savers import choose_kernels, keeps_kernels
from undo_core.training.precision import converted, weight_dtype
from undo_core.unlearning.config import UnlearnConfig
from undo_core.unlearning.method import METHODS, ROBUST, Method, register, register_robust
from undo_core.unlearning.rmu import RMUConfig


def unlearn(
    model: PreTrainedModel,
    *,
    forget: Sequences | Source | Iterable[Any],
    retain: Sequences | Source | Iterable[Any],
    config: UnlearnConfig | None = None,
    folder: Path | None = None,
    title: str = "unlearn",
    progress: bool = True,
    **train_options: Any,
) -> TrainResult:
    """Trains ``model`` in place to suppress the capability shown in ``forget`` and to keep what ``retain`` shows.

    Args:
        model: any Hugging Face causal language model; trained in place. Of a ``PeftModel`` only the adapters are trained. While
            a method that trains only some parameters runs, the others do not require gradients.
        forget: labelled text to forget: token sequences, a function of the step, or an iterable of batches.
        retain: text to keep, in the same forms; not read if ``config.retain_weight`` is 0.
        config: method, weights, optimizer; the default is MaxEnt as published for arithmetic.
        folder: for checkpoints and the log, so that a killed run resumes. A different model, text or ``config`` raises an error
            that names it; the comparison computes one digest of the weights, about a second per gigabyte in float32.
        title: label of the progress bar.
        progress: whether to show the progress bar.
        train_options: passed to :func:`undo_core.training.train` (``evaluate``, ``stop``).

    Returns:
        Steps, tokens and history.

    Raises:
        ValueError: invalid settings for this model, or data of an unknown form.
    """
    config = config or UnlearnConfig()
    if config.vocab_size is not None:  # checked only if given, as RMU also works without a head
        check_vocab_size(config.vocab_size, model=vocabulary_of(model))
    size, seed = config.train.batch_size, config.train.seed or 0
    limits = limits_of(model, whole=METHODS[config.method].whole_sequences)
    sources = {
        "forget": as_source(forget, size=size, seed=seed, name="forget", limits=limits),
        "retain": as_source(retain, size=size, seed=seed + 1, name="retain", limits=limits),
    }
    if not config.retain_weight:
        del sources["retain"]
    inner = bare(model)
    check_adapters(inner, weight_dtype(config.train.precision))
    method = method_of(inner, config)
    if method.reference is not None:
        sources["forget"] = _with_reference(inner, sources["forget"], method, config.train)
    with method.alone(inner):
        if method.prepare is not None:
            sources["forget"] = _prepared(inner, sources["forget"], method, config.train)
        return train(
            model,
            method.loss,
            sources,
            config.train,
            parameters=method.parameters,
            gradient=method.gradient,
            folder=folder,
            settings={"unlearn": {name: value for name, value in config.settings().items() if name != "train"}},
            title=title,
            progress=progress,
            **train_options,
        )


def method_of(model: PreTrainedModel, config: UnlearnConfig) -> Method:
    """Returns the method of ``config`` with its wrapper, if any; ``model`` must still be the original model."""
    method = METHODS[config.method](model, config)
    return method if config.robust == "none" else ROBUST[config.robust](method, model, config)


def unlearn_flops(model: PreTrainedModel, config: UnlearnConfig, length: int) -> dict[str, float]:
    """FLOPs of a training step per position of each source, for sequences of ``length`` tokens."""
    entry = METHODS[config.method]
    passes = 3 * forward_flops(model, length)
    costs = {"forget": passes, "retain": passes if config.retain_weight else 0.0}
    costs = costs if entry.flops is None else entry.flops(model, config, length)
    if config.retain_loss != "cross-entropy":
        costs = _sum(costs, {"forget": 0.0, "retain": forward_flops(model, length)})
    if config.robust != "none":
        costs = _sum(costs, ROBUST[config.robust].flops(costs, model, config, length))  # pyrefly: ignore[not-callable]
    return costs if entry.reference_flops is None else _sum(costs, entry.reference_flops(model, config, length))


def _sum(*costs: dict[str, float]) -> dict[str, float]:
    return {name: sum(part[name] for part in costs) for name in costs[0]}


@keeps_kernels
def _prepared(model: PreTrainedModel, source: Source, method: Method, config: TrainConfig) -> Source:
    """Reads the batches of all steps once and runs the method's preparation with the model as it will be trained."""
    read = ReadSource(source, [source(step) for step in range(config.steps)])
    choose_kernels(model, config)
    with converted(model, config.precision):
        method.prepare(model, read)  # pyrefly: ignore[not-callable]
    return read


@keeps_kernels
def _with_reference(model: PreTrainedModel, source: Source, method: Method, config: TrainConfig) -> Source:
    """Reads the batches of all steps once and adds the reference values of the original model to each.

    The original runs in the precision and with the attention kernel of the training, so that at the first step the trained
    model equals the reference exactly.
    """
    choose_kernels(model, config)
    device, batches = next(model.parameters()).device, []
    with converted(model, config.precision):
        for step in range(config.steps):
            batch = source(step)
            parts = batch.to(device).split(config.micro_batch_size or len(batch.input_ids))
            references = [_own_reference(model, part, method) for part in parts]
            batches.append(dataclasses.replace(batch, reference=torch.cat(references).cpu()))
    return ReadSource(source, batches)


def _own_reference(model: PreTrainedModel, part: Batch, method: Method) -> torch.Tensor:
    """Reference values of a micro-batch; on several ranks 0 for the sequences of the other ranks, which are not read here."""
    start, end = distributed.share(len(part.input_ids))
    own = referred(model, part.share(), method).reference
    reference = own.new_zeros(len(part.input_ids), *own.shape[1:])
    reference[start:end] = own
    return reference


@torch.no_grad()
def referred(model: PreTrainedModel, batch: Batch, method: Method) -> Batch:
    """Returns the batch with its reference values; ``model`` is the original model."""
    with evaluating(model):
        return dataclasses.replace(batch, reference=method.reference(model, batch))  # pyrefly: ignore[not-callable]


__all__ = [
    "METHODS",
    "ROBUST",
    "Method",
    "RMUConfig",
    "TrainConfig",
    "UnlearnConfig",
    "method_of",
    "referred",
    "register",
    "register_robust",
    "unlearn",
    "unlearn_flops",
]
