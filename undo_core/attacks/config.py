"""Settings of an attack, and the grid that it tries."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from undo_core.attacks.text import AttackTextConfig
from undo_core.training.config import OptimizerName, TrainConfig
from undo_core.training.precision import Precision

HEADLINE = "relearn"  # name of the attack whose result the reports quote; the user names the further ones
KINDS = ("finetune", "lora", "fewshot", "quantise")
TRAINED = ("finetune", "lora")
NEEDS = {"lora": "peft", "quantise": "torchao", "search": "optuna"}  # required packages
EXTRAS = {"search": "optuna"}  # the extra that installs them, if it is not "attacks"
MOST_SEEDS = 1000  # of an attack: the plan has a trial for each
SOURCES = ("forget", "retain")
INITIALISATIONS = ("kaiming", "gaussian", "orthogonal", "pissa")
Settings = TypeVar("Settings", bound="Seeded")


class Seeded(Protocol):
    """Settings with a seed: of an attack that trains, or of an intervention."""

    @property
    def seed(self) -> int | None: ...


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: ``W + alpha / rank * B A``, where only A and B are trained (Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        rank: rank of the product B A.
        alpha: numerator of the factor ``alpha / rank`` on the product.
        targets: names of the adapted linear layers, such as q_proj; empty for all except the head.
        rank_stabilised: whether the factor is ``alpha / sqrt(rank)``, with which the gradient does not shrink as the rank grows
            (Kalajdzievski 2023, arXiv 2312.03732).
        initialisation: kaiming and gaussian draw A and start with B at 0; orthogonal draws both so
            that their product is 0; pissa starts with the principal singular vectors of W and subtracts them
            from it (Meng et al. 2024, arXiv 2404.02948).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: list[str] = field(default_factory=list)
    rank_stabilised: bool = False
    initialisation: Literal["kaiming", "gaussian", "orthogonal", "pissa"] = "kaiming"

    def recorded(self) -> dict[str, Any]:
        """The settings as JSON values, without later ones at their default, so that older stages keep their keys."""
        default = LoraConfig()
        later = ("rank_stabilised", "initialisation")
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in later or value != getattr(default, name)
        }

    def __post_init__(self) -> None:
        if not (isinstance(self.rank, int) and self.rank >= 1):
            raise ValueError(f"lora.rank: got {self.rank}, wanted an integer >= 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha: got {self.alpha}, wanted a finite number > 0")
        if self.initialisation not in INITIALISATIONS:
            raise ValueError(f"lora.initialisation: got {self.initialisation!r}, wanted one of {', '.join(INITIALISATIONS)}")
        if self.initialisation == "orthogonal" and self.rank % 2:
            raise ValueError(f"lora.rank: got {self.rank} with the orthogonal initialisation, wanted an even number")


@dataclass(frozen=True)
class Trial:
    """One point of an attack's grid.

    Attributes:
        rate: learning rate of an attack that trains; None for the others.
        shots: number of solved examples before the prompt (fewshot).
        bits: bits of a weight (quantise).
        order: index of the data order among the ``seeds`` tried, from 0.
        setting: name of the point of an intervention's grid, such as weight-0.5.
    """

    rate: float | None = None
    shots: int | None = None
    bits: int | None = None
    order: int = 0
    setting: str | None = None

    @property
    def name(self) -> str:
        """Name of the trial, such as rate-0.001, rate-0.001-seed-1, shots-4 or int4."""
        if self.setting is not None:
            return self.setting
        if self.bits is not None:
            return f"int{self.bits}"
        tried = f"rate-{self.rate:g}" if self.shots is None else f"shots-{self.shots}"
        return f"{tried}-seed-{self.order}" if self.order else tried


@dataclass(frozen=True)
class AttackConfig:
    """An attack and its grid; the worst case over the grid counts.

    Attributes:
        kind: finetune trains all weights; lora trains adapters and merges them (extra ``attacks``); fewshot puts solved forget
            examples before the prompt; quantise rounds the weights (extra ``attacks``). The last two train nothing.
        rates: learning rates of the grid, each constant after the warm-up.
        evaluate_at: steps at which the attacked model is evaluated; the last one is the length of the attack.
        ladder: length of the attack with three evaluations in each decade, which replace ``evaluate_at``: 10000 is 0, 10, 22, 46,
            100, 215, 464, 1000, 2154, 4642, 10000, and the headline step. null for ``evaluate_at``.
        headline_step: step at which reports quote the worst case; one of ``evaluate_at``.
        extend: how many times the grid may grow by a factor of 2, at the end where the worst rate lies; 0 for never.
        mix: shares of forget and retain among the sequences of a step, rounded to whole sequences; ``{retain: 1}`` is benign
            fine-tuning.
        text: which of the forget and retain text is trained on; of a part of the forget set, the other part is scored.
        batch_size: sequences in a step.
        warmup: steps in which the learning rate rises linearly.
        micro_batch_size: as in the training of other stages, for each source.
        clip: largest norm of the gradient.
        weight_decay: as in the training of other stages.
        beta1: decay of AdamW's first moment; the momentum of sgd.
        precision: as in the training of other stages; the published attack uses bfloat16, rounded to nearest.
        optimizer: as in the training of other stages.
        step_in_backward: as in the training of other stages.
        activation_checkpointing: as in the training of other stages.
        attention: as in the training of other stages.
        lora: settings of lora.
        shots: grid of fewshot: numbers of examples.
        bits: grid of quantise: bits of a weight, from 2 to 8. With 8 each row of a matrix has one scale, with fewer each group
            of columns.
        group_size: columns that share a scale when a weight has fewer than 8 bits.
        save: whether to keep the weights of the attacked models. Their curves, which is all that a report reads, are always kept.
        together: how many trials of the grid train as one batched run, which on a GPU takes a small model little longer than one;
            see :mod:`undo_core.training.together`. 1 trains them one by one.
        seeds: number of data orders, or of draws of the examples, tried for each rate or number of shots; the worst one counts,
            all are kept.
        seed: seed of the first data order, of the examples and of the adapters; None derives it from the run's seed.
    """

    kind: Literal["finetune", "lora", "fewshot", "quantise"] = "finetune"
    rates: list[float] = field(default_factory=lambda: [5e-4, 1e-3, 2e-3, 4e-3, 8e-3])
    evaluate_at: list[int] = field(default_factory=lambda: [0, 20, 40, 100, 200])
    ladder: int | None = None
    headline_step: int = 100
    extend: int = 3
    mix: dict[str, float] = field(default_factory=lambda: {"forget": 1.0})
    text: AttackTextConfig = field(default_factory=AttackTextConfig)
    batch_size: int = 64
    warmup: int = 1
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
    save: bool = True
    together: int = 1
    seeds: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: got {self.kind!r}, wanted one of {', '.join(KINDS)}")
        if not self.rates or any(not rate > 0 for rate in self.rates) or len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates: got {self.rates}, wanted different numbers > 0")
        if self.ladder is not None:
            own = [step for step in (self.headline_step,) if step < self.ladder]
            object.__setattr__(self, "evaluate_at", sorted({*ladder_of(self.ladder), *own}))
        if self.evaluate_at != sorted(set(self.evaluate_at)) or not self.evaluate_at or self.evaluate_at[0] != 0:
            raise ValueError(f"evaluate_at: got {self.evaluate_at}, wanted increasing steps that begin with 0")
        if self.headline_step not in self.evaluate_at:
            raise ValueError(f"headline_step: got {self.headline_step}, wanted one of evaluate_at, {self.evaluate_at}")
        for name, low in (("extend", 0), ("batch_size", 1), ("seeds", 1), ("group_size", 1), ("together", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted an integer >= {low}")
        if self.seeds > MOST_SEEDS:
            raise ValueError(f"seeds: got {self.seeds}, wanted an integer <= {MOST_SEEDS}")
        _different("shots", self.shots, 1, 1 << 20)
        _different("bits", self.bits, 2, 8)
        self.sequences()
        self.text.check_mix(self.mix)
        if self.text and not self.trains:
            raise ValueError(f"text: got {self.text} with kind {self.kind}, which trains nothing; wanted none")
        self.training(self.rates[0])
        self._check_together()

    def _check_together(self) -> None:
        alone = {
            "kind": self.kind != "finetune",
            "precision": self.precision == "bfloat16-master",
            "optimizer": self.optimizer == "adamw-offload",
            "step_in_backward": self.step_in_backward,
            "activation_checkpointing": self.activation_checkpointing,
            "micro_batch_size": self.micro_batch_size is not None,
        }
        for name in (name for name, apart in alone.items() if apart and self.together > 1):
            raise ValueError(f"together: got {self.together} with {name}: {getattr(self, name)}, wanted 1, or another {name}")

    @property
    def trains(self) -> bool:
        """Whether the attack changes weights by gradient descent."""
        return self.kind in TRAINED

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of attacks that it tries: its own."""
        return (self.kind,)

    @property
    def evaluations(self) -> list[int]:
        """Steps at which the attacked model is evaluated: only 0 if nothing is trained."""
        return self.evaluate_at if self.trains else [0]

    @property
    def passes(self) -> int:
        """Forward passes that a step costs: 3, or 2 with LoRA, because frozen weights need no gradient."""
        return 2 if self.kind == "lora" else 3

    def sequences(self) -> dict[str, int]:
        """Number of sequences of a step from each source of the mix.

        Raises:
            ValueError: a source is unknown, or a share is not a finite number > 0 or is too small for one sequence.
        """
        if not self.mix or set(self.mix) - set(SOURCES) or not all(0 < share < math.inf for share in self.mix.values()):
            raise ValueError(
                f"mix: got {self.mix}, wanted shares > 0 of forget and retain, such as {{forget: 0.5, retain: 0.5}}"
            )
        forget = round(self.batch_size * self.mix.get("forget", 0.0) / sum(self.mix.values()))
        sequences = {"forget": forget, "retain": self.batch_size - forget}
        if any(not sequences[name] for name in self.mix):
            raise ValueError(
                f"mix: got {self.mix}, wanted shares of at least one of the batch_size {self.batch_size} sequences each"
            )
        return {name: sequences[name] for name in SOURCES if name in self.mix}

    def training(self, rate: float) -> TrainConfig:
        """Training settings for one learning rate of the grid."""
        shared = {field.name for field in dataclasses.fields(TrainConfig)} & {field.name for field in dataclasses.fields(self)}
        settings = {name: getattr(self, name) for name in shared}
        return TrainConfig(steps=self.evaluate_at[-1], lr=rate, **settings)

    def trials(self, rates: Sequence[float] | None = None) -> list[Trial]:
        """The trials of the grid, with the configured learning rates or with ``rates``."""
        if self.kind == "quantise":
            return [Trial(bits=bits) for bits in self.bits]
        orders = range(self.seeds)
        if self.kind == "fewshot":
            return [Trial(shots=shots, order=order) for shots in self.shots for order in orders]
        return [Trial(rate=rate, order=order) for rate in (self.rates if rates is None else rates) for order in orders]

    def groups(self, trials: Sequence[Trial]) -> list[list[Trial]]:
        """``trials`` in groups of at most ``together``, which train as one batched run."""
        return [list(trials[start : start + self.together]) for start in range(0, len(trials), self.together)]

    def at(self, trial: Trial) -> AttackConfig:
        """This attack for one trial: with the seed of the trial's data order and, if it trains, only the trial's rate."""
        rates = self.rates if trial.rate is None else [trial.rate]
        return dataclasses.replace(self, seed=(self.seed or 0) + trial.order, rates=rates)


def ladder_of(longest: int) -> list[int]:
    """Steps from 0 up to ``longest``, three in each decade from 10 on at equal ratios.

    Raises:
        ValueError: ``longest`` is less than 10.
    """
    if longest < 10:
        raise ValueError(f"ladder: got {longest}, wanted an integer >= 10")
    rungs = itertools.takewhile(lambda step: step < longest, (round(10 ** (1 + third / 3)) for third in itertools.count()))
    return [0, *rungs, longest]


def with_seed(config: Settings, seed: int) -> Settings:
    """``config`` with ``seed`` unless it has a seed of its own."""
    return config if config.seed is not None else dataclasses.replace(config, seed=seed)  # pyrefly: ignore[bad-specialization]


def check_installed(kind: str) -> None:
    """Raises a ModuleNotFoundError if the package that an attack of this kind needs is not installed."""
    package = NEEDS.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        extra = EXTRAS.get(kind, "attacks")
        raise ModuleNotFoundError(f"kind: got {kind}, which needs {package}; pip install 'undo-core[{extra}]', or remove it")


def _different(name: str, values: list[int], low: int, high: int) -> None:
    if not values or len(set(values)) < len(values) or any(not low <= value <= high for value in values):
        wanted = f"from {low} to {high}" if name == "bits" else f">= {low}"
        raise ValueError(f"{name}: got {values}, wanted different integers {wanted}")
