"""The relearning attack: fine-tune on the forget text, over a grid of learning rates; the worst case counts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from undo_core.data.rows import Rows
from undo_core.training import Batch, Source, TrainConfig, TrainResult, as_source, train
from undo_core.training.config import OptimizerName, check_mode
from undo_core.training.losses import cross_entropy
from undo_core.training.precision import Precision


@dataclass(frozen=True)
class AttackConfig:
    """The attack.

    Attributes:
        rates: learning rates of the grid, constant after one step of warm-up.
        evaluate_at: steps at which the attacked model is evaluated; the last is the attack's length.
        headline_step: the step whose worst case is quoted; one of ``evaluate_at``.
        extend: how often the grid may grow by a factor 2 at the end where the worst rate lies.
        batch_size: rows in a step.
        clip: largest norm of the gradient.
        precision: of the weights, as in :class:`~undo_core.training.TrainConfig`; the published attack is bfloat16, rounded to nearest.
        optimizer: as in :class:`~undo_core.training.TrainConfig`.
        step_in_backward: as in :class:`~undo_core.training.TrainConfig`.
        seed: of the data order; None derives it from the run's seed.
    """

    rates: list[float] = field(default_factory=lambda: [5e-4, 1e-3, 2e-3, 4e-3, 8e-3])
    evaluate_at: list[int] = field(default_factory=lambda: [0, 20, 40, 100, 200])
    headline_step: int = 100
    extend: int = 3
    batch_size: int = 64
    clip: float = 1.0
    precision: Precision = "float32"
    optimizer: OptimizerName = "adamw"
    step_in_backward: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.rates or any(not rate > 0 for rate in self.rates) or len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates: got {self.rates}, wanted different numbers > 0")
        if self.evaluate_at != sorted(set(self.evaluate_at)) or not self.evaluate_at or self.evaluate_at[0] != 0:
            raise ValueError(f"evaluate_at: got {self.evaluate_at}, wanted increasing steps that begin with 0")
        if self.headline_step not in self.evaluate_at:
            raise ValueError(f"headline_step: got {self.headline_step}, wanted one of evaluate_at, {self.evaluate_at}")
        if self.extend < 0 or self.batch_size < 1:
            raise ValueError(f"extend, batch_size: got {self.extend}, {self.batch_size}, wanted >= 0 and >= 1")
        check_mode(self.precision, self.optimizer)

    def training(self, rate: float) -> TrainConfig:
        """The training settings of one rate of the grid."""
        return TrainConfig(
            steps=self.evaluate_at[-1],
            batch_size=self.batch_size,
            lr=rate,
            warmup=1,
            clip=self.clip,
            precision=self.precision,
            optimizer=self.optimizer,
            step_in_backward=self.step_in_backward,
            seed=self.seed,
        )


def attack(
    model: PreTrainedModel,
    forget: Rows | Source | Iterable[Any],
    rate: float,
    config: AttackConfig,
    *,
    evaluate: Callable[[PreTrainedModel], dict[str, float]],
    folder: Path | None = None,
    title: str = "relearn",
    progress: bool = True,
) -> TrainResult:
    """Fine-tune ``model`` in place with next-token cross-entropy at one rate; its history is the relearning curve."""

    def loss(model: PreTrainedModel, batches: dict[str, Batch], counted: dict[str, int]) -> torch.Tensor:
        return cross_entropy(model, batches["forget"], counted["forget"])

    training = config.training(rate)
    source = as_source(forget, size=config.batch_size, seed=config.seed or 0, name="forget")
    return train(
        model,
        loss,
        {"forget": source},
        training,
        evaluate=evaluate,
        evaluate_at=config.evaluate_at,
        must_stay_finite=False,
        folder=folder,
        title=title,
        progress=progress,
    )


def relearn(
    model: PreTrainedModel,
    forget: Rows | Source | Iterable[Any],
    config: AttackConfig | None = None,
    *,
    evaluate: Callable[[PreTrainedModel], dict[str, float]],
    higher_is_better: bool = True,
    progress: bool = True,
) -> dict[float, TrainResult]:
    """Attack copies of ``model`` at every rate of the grid and extend the grid where the worst rate is its end.

    Args:
        model: left as it is; each rate works on a copy.
        forget: text of the forgotten capability: token rows, a function of the step, or an iterable of batches that can be
            started again.
        config: the grid and the evaluations.
        evaluate: metrics of a model; the entry ``forget`` decides which rate is worst.
        higher_is_better: True for an accuracy, False for a loss.
        progress: show bars.

    Returns:
        The curve of each rate, as ``{rate: result}``; ``result.history`` has the metrics at each evaluated step.

    Memory: one copy of the model with its optimizer state at a time.
    """
    config = config or AttackConfig()
    curves: dict[float, TrainResult] = {}
    rates = list(config.rates)
    while rates:
        rate = rates.pop(0)
        copied = copy.deepcopy(model)
        curves[rate] = attack(copied, forget, rate, config, evaluate=evaluate, title=f"relearn {rate:g}", progress=progress)
        if not rates and len(curves) < len(config.rates) + config.extend:
            headline = {r: next(e["forget"] for e in c.history if e["step"] == config.headline_step) for r, c in curves.items()}
            beyond = extension_of(headline, higher_is_better)
            rates = [] if beyond is None else [beyond]
    return curves


def extension_of(headline: dict[float, float], higher_is_better: bool) -> float | None:
    """The rate to add when the worst of ``{rate: forget performance}`` is an end of the grid; None when it is inside."""
    ordered = sorted(headline)
    worst = (max if higher_is_better else min)(headline.values())
    worst_rates = [rate for rate in ordered if headline[rate] == worst]
    if any(rate not in (ordered[0], ordered[-1]) for rate in worst_rates):
        return None
    return ordered[-1] * 2 if ordered[-1] in worst_rates else ordered[0] / 2


def with_seed(config: AttackConfig, seed: int) -> AttackConfig:
    """``config`` with its seed set, where it has none."""
    return config if config.seed is not None else dataclasses.replace(config, seed=seed)
