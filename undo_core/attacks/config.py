"""Settings of an attack, and the grid that it tries."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from undo_core.training.config import OptimizerName, TrainConfig
from undo_core.training.precision import Precision

HEADLINE = "relearn"  # name of the attack that reports quote; further ones have names of their own
KINDS = ("finetune", "lora", "fewshot", "quantise")
TRAINED = ("finetune", "lora")
NEEDS = {"lora": "peft", "quantise": "torchao"}  # packages of the extra "attacks"
SOURCES = ("forget", "retain")


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of low rank: ``W + alpha / rank * B A``, of which A and B are trained.

    Attributes:
        rank: of the product.
        alpha: factor on it, over the rank.
        targets: names of the adapted linear layers, such as q_proj; empty for all but the head.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not (isinstance(self.rank, int) and self.rank >= 1):
            raise ValueError(f"lora.rank: got {self.rank}, wanted an integer >= 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha: got {self.alpha}, wanted a finite number > 0")


@dataclass(frozen=True)
class Trial:
    """One point of an attack's grid.

    Attributes:
        rate: learning rate, of an attack that trains.
        shots: solved examples before the prompt, of fewshot.
        bits: of a weight, of quantise.
        order: which of the ``seeds`` orders of the data (from 0).
    """

    rate: float | None = None
    shots: int | None = None
    bits: int | None = None
    order: int = 0

    @property
    def name(self) -> str:
        """Such as rate-0.001, rate-0.001-seed-1, shots-4 or int4."""
        if self.bits is not None:
            return f"int{self.bits}"
        tried = f"rate-{self.rate:g}" if self.shots is None else f"shots-{self.shots}"
        return f"{tried}-seed-{self.order}" if self.order else tried


@dataclass(frozen=True)
class AttackConfig:
    """An attack and its grid; the worst case over the grid counts.

    Attributes:
        kind: finetune trains all weights, lora adapters (the extra ``attacks``), which are then merged; fewshot puts solved forget
            examples before the prompt; quantise rounds the weights (the extra ``attacks``). The last two train nothing.
        rates: learning rates of the grid, constant after one step of warm-up.
        evaluate_at: steps at which the attacked model is evaluated; the last is the attack's length.
        headline_step: the step whose worst case is quoted; one of ``evaluate_at``.
        extend: how often the grid may grow by a factor 2 at the end where the worst rate lies.
        mix: shares of a step's rows from forget and retain, in whole rows; ``{retain: 1}`` is benign fine-tuning.
        batch_size: rows in a step.
        micro_batch_size: as in :class:`~undo_core.training.TrainConfig`, for each source.
        clip: largest norm of the gradient.
        weight_decay: as in :class:`~undo_core.training.TrainConfig`.
        beta1: of AdamW; the momentum of sgd.
        precision: of the weights, as in :class:`~undo_core.training.TrainConfig`; the published attack is bfloat16, rounded to nearest.
        optimizer: as in :class:`~undo_core.training.TrainConfig`.
        step_in_backward: as in :class:`~undo_core.training.TrainConfig`.
        activation_checkpointing: as in :class:`~undo_core.training.TrainConfig`.
        attention: as in :class:`~undo_core.training.TrainConfig`.
        lora: settings of lora alone.
        shots: numbers of examples of the grid of fewshot.
        bits: of a weight, the grid of quantise, from 2 to 8; 8 has one scale for each row of a matrix, fewer one for each group.
        group_size: columns that share a scale, with fewer than 8 bits.
        seeds: how many data orders are tried at each rate, or draws of the examples; the worst one counts, all are kept.
        seed: of the first data order, the examples and the adapters; None derives it from the run's seed.
    """

    kind: Literal["finetune", "lora", "fewshot", "quantise"] = "finetune"
    rates: list[float] = field(default_factory=lambda: [5e-4, 1e-3, 2e-3, 4e-3, 8e-3])
    evaluate_at: list[int] = field(default_factory=lambda: [0, 20, 40, 100, 200])
    headline_step: int = 100
    extend: int = 3
    mix: dict[str, float] = field(default_factory=lambda: {"forget": 1.0})
    batch_size: int = 64
    micro_batch_size: int | None = None
    clip: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    precision: Precision = "float32"
    optimizer: OptimizerName = "adamw"
    step_in_backward: bool = False
    activation_checkpointing: bool = False
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    lora: LoraConfig = field(default_factory=LoraConfig)
    shots: list[int] = field(default_factory=lambda: [1, 2, 4])
    bits: list[int] = field(default_factory=lambda: [8, 4])
    group_size: int = 32
    seeds: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: got {self.kind!r}, wanted one of {', '.join(KINDS)}")
        if not self.rates or any(not rate > 0 for rate in self.rates) or len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates: got {self.rates}, wanted different numbers > 0")
        if self.evaluate_at != sorted(set(self.evaluate_at)) or not self.evaluate_at or self.evaluate_at[0] != 0:
            raise ValueError(f"evaluate_at: got {self.evaluate_at}, wanted increasing steps that begin with 0")
        if self.headline_step not in self.evaluate_at:
            raise ValueError(f"headline_step: got {self.headline_step}, wanted one of evaluate_at, {self.evaluate_at}")
        for name, low in (("extend", 0), ("batch_size", 1), ("seeds", 1), ("group_size", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted an integer >= {low}")
        _different("shots", self.shots, 1, 1 << 20)
        _different("bits", self.bits, 2, 8)
        self.rows()
        self.training(self.rates[0])

    @property
    def trains(self) -> bool:
        """Whether it changes weights by gradient descent."""
        return self.kind in TRAINED

    def rows(self) -> dict[str, int]:
        """Rows of a step from each source of the mix.

        Raises:
            ValueError: an unknown source, a share that is no number > 0, or so small a one that it is no row.
        """
        if not self.mix or set(self.mix) - set(SOURCES) or not all(0 < share < math.inf for share in self.mix.values()):
            raise ValueError(
                f"mix: got {self.mix}, wanted shares > 0 of forget and retain, such as {{forget: 0.5, retain: 0.5}}"
            )
        forget = round(self.batch_size * self.mix.get("forget", 0.0) / sum(self.mix.values()))
        rows = {"forget": forget, "retain": self.batch_size - forget}
        if any(not rows[name] for name in self.mix):
            raise ValueError(
                f"mix: got {self.mix}, wanted shares of at least one of the batch_size {self.batch_size} rows each"
            )
        return {name: rows[name] for name in SOURCES if name in self.mix}

    def training(self, rate: float) -> TrainConfig:
        """The training settings of one rate of the grid."""
        shared = {field.name for field in dataclasses.fields(TrainConfig)} & {field.name for field in dataclasses.fields(self)}
        settings = {name: getattr(self, name) for name in shared}
        return TrainConfig(steps=self.evaluate_at[-1], lr=rate, warmup=1, **settings)

    def trials(self, rates: Sequence[float] | None = None) -> list[Trial]:
        """The grid: as configured, or with other rates."""
        if self.kind == "quantise":
            return [Trial(bits=bits) for bits in self.bits]
        orders = range(self.seeds)
        if self.kind == "fewshot":
            return [Trial(shots=shots, order=order) for shots in self.shots for order in orders]
        return [Trial(rate=rate, order=order) for rate in (self.rates if rates is None else rates) for order in orders]

    def at(self, trial: Trial) -> AttackConfig:
        """This attack with the seed of the trial's data order, and its rate alone where it has one."""
        rates = self.rates if trial.rate is None else [trial.rate]
        return dataclasses.replace(self, seed=(self.seed or 0) + trial.order, rates=rates)


def with_seed(config: AttackConfig, seed: int) -> AttackConfig:
    """``config`` with its seed set, where it has none."""
    return config if config.seed is not None else dataclasses.replace(config, seed=seed)


def check_installed(kind: str) -> None:
    """Raise a ModuleNotFoundError where the package that an attack needs is missing."""
    package = NEEDS.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"kind: got {kind}, which needs {package}; pip install 'undo-core[attacks]', or leave it out")


def _different(name: str, values: list[int], low: int, high: int) -> None:
    if not values or len(set(values)) < len(values) or any(not low <= value <= high for value in values):
        wanted = f"from {low} to {high}" if name == "bits" else f">= {low}"
        raise ValueError(f"{name}: got {values}, wanted different integers {wanted}")
