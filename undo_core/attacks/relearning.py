"""Relearning attack: fine-tune on the forget text at each learning rate of a grid; the worst case counts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from undo_core.attacks.config import AttackConfig, Trial
from undo_core.attacks.grid import Curve, explore
from undo_core.attacks.lora import adapted
from undo_core.data.limits import limits_of
from undo_core.data.sequences import Sequences
from undo_core.models import head_of
from undo_core.models.adapters import has_adapters
from undo_core.training import Batch, Source, TrainResult, as_source, train
from undo_core.training.losses import cross_entropy
from undo_core.training.memory_savers import choose_kernels, kept_kernels
from undo_core.training.precision import convert_
from undo_core.training.together import train_together

Data = Sequences | Source | Iterable[Any]


def attack(
    model: PreTrainedModel,
    forget: Data | None,
    rate: float,
    config: AttackConfig,
    *,
    retain: Data | None = None,
    evaluate: Callable[[PreTrainedModel], dict[str, float]],
    folder: Path | None = None,
    title: str = "relearn",
    progress: bool = True,
    **train_options: Any,
) -> TrainResult:
    """Fine-tunes ``model`` in place with next-token cross-entropy at one rate; the result's history is the relearning curve.

    For the arguments see :func:`relearn` and, for ``folder`` and ``train_options``, :func:`undo_core.training.train`.
    """
    _check(config, forget, retain)
    head_of(model)  # raises before anything is changed
    adapters = contextlib.nullcontext()
    if config.kind == "lora":
        if not has_adapters(model):
            convert_(model, config.precision)  # must precede the adapters: with them, frozen parameters would keep their dtype
        adapters = adapted(model, config.lora, config.seed or 0)
    sources = _sources(model, config, forget, retain)
    with adapters as parameters:
        return train(
            model,
            mixed_cross_entropy,
            sources,
            config.training(rate),
            parameters=parameters,
            evaluate=evaluate,
            evaluate_at=config.evaluate_at,
            must_stay_finite=False,
            folder=folder,
            settings={"lora": config.lora.recorded()} if config.kind == "lora" else None,
            title=title,
            progress=progress,
            **train_options,
        )


def attack_together(
    model: PreTrainedModel,
    forget: Data | None,
    trials: Sequence[Trial],
    config: AttackConfig,
    *,
    retain: Data | None = None,
    evaluate: Callable[[PreTrainedModel], dict[str, float]],
    title: str = "relearn",
    progress: bool = True,
) -> dict[Trial, tuple[PreTrainedModel, TrainResult]]:
    """Attacks a copy of ``model`` for each trial, all as one batched run; returns the copies with their results.

    The trials differ in learning rate and data order. The result of each is that of :func:`attack` to rounding; see
    :mod:`undo_core.training.together` for what runs together and what does not. It keeps no checkpoints.

    Raises:
        ValueError: settings or a model that cannot run together; before any step.
    """
    _check(config, forget, retain)
    head_of(model)
    copies, trainings = [copy.deepcopy(model) for _ in trials], []
    with contextlib.ExitStack() as kernels:
        for copied in copies:
            kernels.enter_context(kept_kernels(copied))
        start = _at_start(copies[0], config, evaluate)  # the same for all copies
        for index, (trial, copied) in enumerate(zip(trials, copies, strict=True)):
            at = config.at(trial)
            shared = {"evaluate": evaluate, "evaluate_at": at.evaluate_at, "known_at_start": start, "must_stay_finite": False}
            shown = {"title": f"{title} {len(copies)} at once", "progress": progress and index == 0}
            sources = _sources(copied, at, forget, retain)
            trainings.append(train.steps(copied, mixed_cross_entropy, sources, at.training(trial.rate), **shared, **shown))
        results = train_together(copies, trainings)
    return {trial: pair for trial, *pair in zip(trials, copies, results, strict=True)}


@torch.no_grad()
def _at_start(
    model: PreTrainedModel, config: AttackConfig, evaluate: Callable[[PreTrainedModel], dict[str, float]]
) -> dict[str, float]:
    """Evaluates ``model`` before the first step as a training does: with its kernel, its precision and without dropout."""
    choose_kernels(model, config.training(config.rates[0]))
    convert_(model, config.precision)
    return evaluate(model.eval())


def _sources(model: PreTrainedModel, config: AttackConfig, forget: Data | None, retain: Data | None) -> dict[str, Source]:
    """The text of each share of the mix, checked against the model's limits."""
    data, given = {"forget": forget, "retain": retain}, {"seed": config.seed or 0, "limits": limits_of(model)}
    return {name: as_source(data[name], size=size, name=name, **given) for name, size in config.sequences().items()}


def mixed_cross_entropy(model: PreTrainedModel, batches: dict[str, Batch], counted: dict[str, int]) -> torch.Tensor:
    """Mean over the labels of all sources together; a scalar."""
    total = sum(counted.values())
    return sum(cross_entropy(model, batch, total) for batch in batches.values())


def relearn(
    model: PreTrainedModel,
    forget: Data | None,
    config: AttackConfig | None = None,
    *,
    retain: Data | None = None,
    evaluate: Callable[[PreTrainedModel], dict[str, float]],
    higher_is_better: bool = True,
    folder: Path | None = None,
    progress: bool = True,
) -> dict[Trial, TrainResult]:
    """Attacks copies of ``model`` at every rate of the grid, and extends the grid while the worst rate is at its end.

    The grid grows because a worst rate at its end says that a stronger attack may lie beyond it. After the configured rates, if
    the worst rate at ``config.headline_step`` is the largest, twice that rate is tried; if it is the smallest, half of it. This
    repeats until the worst rate lies inside the grid, at most ``config.extend`` times (by default 3, so that 2 rates may become
    5). ``AttackConfig(extend=0)`` tries only the rates that are given.

    Args:
        model: not changed; each trial works on a copy.
        forget: text of the forgotten capability: token sequences, a function of the step, or an iterable of batches that can be
            iterated again. The shares of ``config.mix`` apply to token sequences; other sources give batches of their own size.
        config: the grid and the evaluations.
        retain: other text, in the same forms; needed if ``config.mix`` has a share for it.
        evaluate: function that returns the metrics of a model; the entry ``forget`` decides which rate is worst.
        higher_is_better: True for an accuracy, False for a loss.
        folder: for checkpoints and logs, one subfolder per trial, so that a killed attack resumes. A different model, text or
            ``config`` raises an error that names it; the comparison computes one digest of the weights per trial, about a
            second per gigabyte in float32. Trials that run together keep no checkpoints.
        progress: whether to show progress bars.

    Returns:
        The result of each trial, ``{trial: result}``, in the order in which they ran. A key is a :class:`Trial`: ``trial.rate``
        is the learning rate, and ``trial.order`` counts the data orders of that rate from 0 (always 0 unless ``config.seeds`` is
        above 1). A value's ``history`` is the relearning curve, a list with ``step`` and the metrics of each evaluation::

            for trial, result in relearn(model, forget, config, evaluate=metrics).items():
                print(trial.rate, {point["step"]: point["forget"] for point in result.history})

    Memory: one copy of the model with its optimizer state at a time, or ``config.together`` of them.

    Raises:
        ValueError: an attack that does not train, a share of the mix without text, or metrics without ``forget``; before any
            step.
        ModuleNotFoundError: ``config.kind`` is lora and peft is not installed.
    """
    config = config or AttackConfig()
    _check(config, forget, retain)
    results: dict[Trial, TrainResult] = {}

    def measured(model: PreTrainedModel) -> dict[str, float]:
        metrics = evaluate(model)
        if "forget" not in metrics:
            raise ValueError(f"evaluate: got metrics {', '.join(metrics) or 'none'}, wanted an entry forget among them")
        return metrics

    def curves_of(trials: list[Trial]) -> dict[Trial, Curve]:
        given = {"retain": retain, "evaluate": measured, "progress": progress}
        for group in config.groups(trials):
            if len(group) > 1:
                found = attack_together(model, forget, group, config, **given)
                results.update({trial: result for trial, (_, result) in found.items()})
                continue
            (trial,) = group
            own = None if folder is None else Path(folder) / trial.name
            named = {"folder": own, "title": f"relearn {trial.name}"}
            results[trial] = attack(copy.deepcopy(model), forget, trial.rate, config.at(trial), **given, **named)
        return {trial: results[trial].history for trial in trials}

    explore(config, curves_of, higher_is_better)
    return results


def _check(config: AttackConfig, forget: Data | None, retain: Data | None) -> None:
    if not config.trains:
        raise ValueError(f"kind: got {config.kind}, which trains nothing; wanted finetune or lora (see few_shot and quantise_)")
    if config.text:
        raise ValueError(f"text: got {config.text}, wanted none: it is trained on as it is given; see AttackTextConfig.choose")
    for name, data in (("forget", forget), ("retain", retain)):
        if name in config.mix and data is None:
            raise ValueError(f"{name}: got None, wanted text for its share of the mix, {config.mix[name]:g}")
