"""Settings of an attack and of its grid."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from undo_core.training.config import OptimizerName, TrainConfig
from undo_core.training.precision import Precision

HEADLINE = "relearn"  # name of the main attack in reports; further attacks have names of their own
KINDS = ("finetune", "lora", "fewshot", "quantise")
TRAINED = ("finetune", "lora")
NEEDS = {"lora": "peft", "quantise": "torchao"}  # packages installed by the extra "attacks"
SOURCES = ("forget", "retain")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: ``W + alpha / rank * B A``, where A and B are trained.

    Attributes:
        rank: rank of the product ``B A``.
        alpha: numerator of the factor on the product.
        targets: names of the adapted linear layers, such as q_proj; empty for all except the head.
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
        rate: learning rate; None for an attack that does not train.
        shots: number of solved examples before the prompt, for fewshot.
        bits: bits per weight, for quantise.
        order: index (from 0) of the data order, or of the draw of examples, among ``seeds`` of them.
    """

    rate: float | None = None
    shots: int | None = None
    bits: int | None = None
    order: int = 0

    @property
    def name(self) -> str:
        """Name such as rate-0.001, rate-0.001-seed-1, shots-4 or int4."""
        if self.bits is not None:
            return f"int{self.bits}"
        tried = f"rate-{self.rate:g}" if self.shots is None else f"shots-{self.shots}"
        return f"{tried}-seed-{self.order}" if self.order else tried


@dataclass(frozen=True)
class AttackConfig:
    """Settings of an attack and its grid. The result is the worst case over the grid.

    Attributes:
        kind: finetune trains all weights; lora trains adapters, which are then merged; fewshot puts solved forget examples
            before the prompt; quantise rounds the weights. The last two train nothing. lora and quantise need the extra
            ``attacks``.
        rates: learning rates of the grid, constant after one step of warm-up.
        evaluate_at: steps at which the attacked model is evaluated; the last is the length of the attack.
        headline_step: step whose worst case reports quote; one of ``evaluate_at``.
        extend: how many rates may be added, each by a factor of 2 beyond the end of the grid where the worst rate lies.
        mix: shares of the rows of a step that come from forget and from retain, rounded to whole rows; ``{retain: 1}`` is
            benign fine-tuning.
        batch_size: rows per step.
        micro_batch_size: as in :class:`~undo_core.training.TrainConfig`, for each source.
        clip: largest norm of the gradient.
        weight_decay: as in :class:`~undo_core.training.TrainConfig`.
        beta1: decay of the first moment of AdamW; the momentum of sgd.
        precision: as in :class:`~undo_core.training.TrainConfig`; the published attack uses bfloat16, rounded to nearest.
        optimizer: as in :class:`~undo_core.training.TrainConfig`.
        step_in_backward: as in :class:`~undo_core.training.TrainConfig`.
        activation_checkpointing: as in :class:`~undo_core.training.TrainConfig`.
        attention: as in :class:`~undo_core.training.TrainConfig`.
        lora: settings of lora alone.
        shots: grid of fewshot: numbers of examples.
        bits: grid of quantise: bits per weight, from 2 to 8. With 8 bits each row of a matrix has a scale, with fewer each
            group.
        group_size: number of columns that share a scale, with fewer than 8 bits.
        seeds: number of data orders to try at each rate, or of draws of the examples; the worst one counts, and all are
            recorded.
        seed: seed of the first data order, the examples and the adapters; None derives it from the run's seed.
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
        """Whether the attack trains weights by gradient descent."""
        return self.kind in TRAINED

    def rows(self) -> dict[str, int]:
        """Number of rows of a step from each source of the mix.

        Raises:
            ValueError: an unknown source, a share that is not a finite number > 0, or a share that rounds to no row.
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
        """Training settings of the attack at one learning rate."""
        shared = {field.name for field in dataclasses.fields(TrainConfig)} & {field.name for field in dataclasses.fields(self)}
        settings = {name: getattr(self, name) for name in shared}
        return TrainConfig(steps=self.evaluate_at[-1], lr=rate, warmup=1, **settings)

    def trials(self, rates: Sequence[float] | None = None) -> list[Trial]:
        """Trials of the grid, with the configured rates or with ``rates``."""
        if self.kind == "quantise":
            return [Trial(bits=bits) for bits in self.bits]
        orders = range(self.seeds)
        if self.kind == "fewshot":
            return [Trial(shots=shots, order=order) for shots in self.shots for order in orders]
        return [Trial(rate=rate, order=order) for rate in (self.rates if rates is None else rates) for order in orders]

    def at(self, trial: Trial) -> AttackConfig:
        """Settings of one trial: the seed of its data order and, if it has a rate, only that rate."""
        rates = self.rates if trial.rate is None else [trial.rate]
        return dataclasses.replace(self, seed=(self.seed or 0) + trial.order, rates=rates)


def with_seed(config: AttackConfig, seed: int) -> AttackConfig:
    """Returns ``config`` with the given seed if it has none."""
    return config if config.seed is not None else dataclasses.replace(config, seed=seed)


def check_installed(kind: str) -> None:
    """Raises a ModuleNotFoundError if a package that the attack needs is not installed."""
    package = NEEDS.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"kind: got {kind}, which needs {package}; pip install 'undo-core[attacks]', or leave it out")


def _different(name: str, values: list[int], low: int, high: int) -> None:
    if not values or len(set(values)) < len(values) or any(not low <= value <= high for value in values):
        wanted = f"from {low} to {high}" if name == "bits" else f">= {low}"
        raise ValueError(f"{name}: got {values}, wanted different integers {wanted}")
