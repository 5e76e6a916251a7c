"""An attacker that searches: Optuna chooses the settings of each trial from the results of those before, under a budget of compute.

The objective is the best forget performance at any evaluation of a trial whose retain performance is within a margin of the
model's before the attack, so that a trial that destroys the model scores no more than doing nothing. Trials are proposed by a
tree-structured Parzen estimator (Bergstra et al. 2011, "Algorithms for hyper-parameter optimization"; Akiba et al. 2019,
arXiv 1907.10902) with a seed: the same finished trials lead to the same next one, so that a search that was interrupted goes on
as if it had not been.

Compute is counted in sequences times forward passes (a backward pass counts as two), which is proportional to FLOPs as all
sequences of a run have the same length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from undo_core.attacks.config import HEADLINE, AttackConfig, Trial, check_installed, ladder_of
from undo_core.attacks.grid import harm, is_useful
from undo_core.attacks.intervention import check_numbers
from undo_core.evaluation.metrics import SCORE
from undo_core.io.untrusted import NUMBER, OPTIONAL, Shape
from undo_core.training.config import OptimizerName

Point = dict[str, Any]  # the searched settings of one trial
TRIAL: Shape = {  # a trial in a file
    **{"forget": [SCORE], "retain": [SCORE], "steps": [int], "flops": [NUMBER], "best": int},
    "point": {
        **{"rate": NUMBER, "batch_size": int, "optimizer": str, "warmup": NUMBER, "retain_share": NUMBER},
        **{"rank": int, "scaling": OPTIONAL},
    },
}
# Settings of ``like`` that change the result of a trial; the others are searched, derived from what is, or without effect on it.
HELD = (
    *("micro_batch_size", "clip", "weight_decay", "beta1", "precision"),
    *("step_in_backward", "activation_checkpointing", "attention"),
)


@dataclass(frozen=True)
class SearchConfig:
    """A search over the settings of the attacks that train.

    Attributes:
        kind: search (extra ``optuna``).
        budget: compute of all trials together, as a multiple of that of the whole grid of ``like``, without its extensions. The
            last trial is shortened to what is left.
        rates: lowest and highest learning rate; drawn on a log scale.
        steps: fewest and most steps of a trial; drawn on a log scale. It is evaluated on the rungs of a ladder, and at its end.
        batch_sizes: numbers of sequences in a step.
        warmups: shares of the steps in which the learning rate rises.
        optimizers: optimizers.
        ranks: ranks of LoRA adapters; 0 trains all weights.
        scalings: factors alpha / rank on the product of the adapters.
        retain_shares: shares of retain text among the sequences of a step.
        retain_margin: how much worse the retain performance may be than before the attack for an evaluation to count: absolute
            for an accuracy, relative for a cross-entropy.
        startup: trials drawn at random before earlier results decide.
        like: the attack whose other settings hold, and whose compute the budget multiplies; null for the headline attack.
        seed: seed of the proposals, the data orders and the adapters; None derives it from the run's seed.
    """

    kind: Literal["search"] = "search"
    budget: float = 4.0
    rates: list[float] = field(default_factory=lambda: [1e-5, 1e-2])
    steps: list[int] = field(default_factory=lambda: [10, 200])
    batch_sizes: list[int] = field(default_factory=lambda: [8, 16, 32, 64])
    warmups: list[float] = field(default_factory=lambda: [0.0, 0.1])
    optimizers: list[OptimizerName] = field(default_factory=lambda: ["adamw", "sgd", "adafactor"])
    ranks: list[int] = field(default_factory=lambda: [0, 4, 16, 64])
    scalings: list[float] = field(default_factory=lambda: [0.5, 2.0, 8.0])
    retain_shares: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5])
    retain_margin: float = 0.05
    startup: int = 10
    like: AttackConfig | None = None
    seed: int | None = None
    trains: ClassVar[bool] = False  # its trials do, but it has no learning rate of a grid and no curve over steps
    seeds: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_numbers("budget", [self.budget], 0, math.inf, above=True)
        for name, low in (("batch_sizes", 1), ("ranks", 0)):
            check_numbers(name, getattr(self, name), low, math.inf)
        for name in ("rates", "steps"):  # equal ends hold the setting
            ends = getattr(self, name)
            if len(ends) != 2 or ends[0] > ends[1]:
                raise ValueError(f"{name}: got {ends}, wanted the lowest and the highest")
            check_numbers(name, sorted(set(ends)), 0, math.inf, above=True)
        check_numbers("warmups", self.warmups, 0, 1)
        check_numbers("scalings", self.scalings, 0, math.inf, above=True)
        check_numbers("retain_shares", self.retain_shares, 0, 1)
        check_numbers("retain_margin", [self.retain_margin], 0, math.inf)
        if not self.optimizers or self.startup < 1:
            name = "optimizers" if not self.optimizers else "startup"
            raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least one")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of attacks that it tries, itself first."""
        return (self.kind, *(("finetune",) if 0 in self.ranks else ()), *(("lora",) if any(self.ranks) else ()))

    @property
    def evaluations(self) -> list[int]:
        """The step at which its result counts beside other attacks: the longest that a trial may be."""
        return [self.steps[1]]

    def trials(self, rates: list[float] | None = None) -> list[Trial]:
        """The whole search, which is one stage."""
        return [Trial(setting=self.kind)]

    def along(self, headline: AttackConfig) -> SearchConfig:
        """This search with ``like``, which is the headline attack if it has none.

        Raises:
            ValueError: a setting that no trial could have, or a budget that does not allow the shortest trial of any size.
        """
        settled = dataclasses.replace(self, like=self.like or headline)
        if not settled.held.trains:
            raise ValueError(f"like.kind: got {settled.held.kind}, which trains nothing; wanted finetune or lora")
        if not settled.held.evaluate_at[-1]:
            raise ValueError("like.evaluate_at: got [0], wanted at least one step, which the budget multiplies")
        for point in settled.corners():
            for size, share in itertools.product(self.batch_sizes, self.retain_shares):
                settled.attack({**point, "batch_size": size, "retain_share": share})
        least = self.steps[0] * max(settled.cost(point) // point["steps"] for point in settled.corners())
        if settled.compute < least:
            wanted = least / settled.compute * self.budget
            raise ValueError(
                f"budget: got {self.budget:g}, wanted at least {wanted:.3g}, which allows one trial of {self.steps[0]} steps"
            )
        return settled

    def corners(self) -> list[Point]:
        """Points with every optimizer and rank, at the largest batch and the most steps."""
        largest = {
            "rate": self.rates[0],
            "steps": self.steps[1],
            "batch_size": max(self.batch_sizes),
            "warmup": max(self.warmups),
        }
        shared = {**largest, "scaling": self.scalings[0], "retain_share": max(self.retain_shares)}
        return [{**shared, "optimizer": optimizer, "rank": rank} for optimizer in self.optimizers for rank in self.ranks]

    @property
    def compute(self) -> int:
        """The budget in sequences times forward passes."""
        like = self.held
        grid = len(like.rates) * like.seeds * like.evaluate_at[-1] * like.batch_size
        return int(self.budget * grid * like.passes)

    def cost(self, point: Point) -> int:
        """Compute of a trial, in the unit of :attr:`compute`."""
        return point["steps"] * point["batch_size"] * self.attack(point).passes

    def attack(self, point: Point) -> AttackConfig:
        """The attack with the settings of ``point``."""
        like, size, steps, rank = self.held, point["batch_size"], point["steps"], point["rank"]
        retain = round(size * point["retain_share"])
        shares = {name: float(share) for name, share in (("forget", size - retain), ("retain", retain)) if share}
        own: dict[str, Any] = {"kind": "finetune"}
        if rank:
            adapters = dataclasses.replace(like.lora, rank=rank, alpha=point["scaling"] * rank)
            own = {"kind": "lora", "lora": adapters, "step_in_backward": False}
        return dataclasses.replace(
            like,
            **own,
            rates=[point["rate"]],
            evaluate_at=[step for step in ladder_of(max(10, steps)) if step < steps] + [steps],
            ladder=None,
            headline_step=steps,
            extend=0,
            mix=shares,
            batch_size=size,
            warmup=max(1, round(steps * point["warmup"])),
            optimizer=point["optimizer"],
            save=False,
            together=1,
            seeds=1,
            seed=self.seed or 0,
        )

    def settings(self) -> dict[str, Any]:
        """The settings that change the result, as JSON values; they are part of the stage's key."""
        own = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("kind", "budget", "like")}
        adapters = {name: value for name, value in self.held.lora.recorded().items() if name not in ("rank", "alpha")}
        held = {name: getattr(self.held, name) for name in HELD}
        if self.held.text:  # left out without, as in the attacks that train
            held["text"] = dataclasses.asdict(self.held.text)
        return {**own, "compute": self.compute, "like": {**held, "lora": adapters}}

    @property
    def held(self) -> AttackConfig:
        """The attack whose other settings hold."""
        if self.like is None:
            raise ValueError("like: got None, wanted an attack: see SearchConfig.along")
        return self.like


@dataclass(frozen=True)
class Tried:
    """A finished trial.

    Attributes:
        point: its searched settings.
        curve: its evaluations, each with ``step``, ``forget`` and ``retain``.
        best: index of the evaluation that counts.
        spent: compute of all trials up to and including this one, in the unit of :attr:`SearchConfig.compute`.
    """

    point: Point
    curve: list[dict[str, Any]]
    best: int
    spent: int

    def score(self, higher_is_better: bool) -> float:
        """The objective, of which more is better."""
        return harm(self.curve[self.best]["forget"]["value"], higher_is_better)


def search(
    config: SearchConfig, attempt: Callable[[int, AttackConfig], list[dict[str, Any]]], higher_is_better: bool
) -> list[Tried]:
    """Tries settings until the budget is spent.

    Args:
        config: the search, after :meth:`SearchConfig.along`.
        attempt: function of the trial's number, from 0, and its attack; returns its curve, computed or from an earlier try.
        higher_is_better: True for an accuracy, False for a loss.

    Raises:
        ModuleNotFoundError: optuna is not installed.
    """
    check_installed(config.kind)
    import optuna

    tried: list[Tried] = []
    spent = 0
    with _quiet(optuna):
        sampler = optuna.samplers.TPESampler(seed=config.seed, n_startup_trials=config.startup)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        while True:
            trial = study.ask()
            point = _drawn(trial, config)
            left = (config.compute - spent) // (config.cost(point) // point["steps"])
            point["steps"] = min(point["steps"], left)
            if point["steps"] < config.steps[0]:
                return tried
            curve = attempt(len(tried), config.attack(point))
            spent += config.cost(point)
            tried.append(Tried(point, curve, best_useful(curve, config.retain_margin, higher_is_better), spent))
            study.tell(trial, tried[-1].score(higher_is_better))


def best_useful(curve: list[dict[str, Any]], margin: float, higher_is_better: bool) -> int:
    """Index of the evaluation with the highest forget performance among those that leave the model useful.

    The first, before any step, is always among them.
    """
    kept = curve[0]["retain"]["value"]
    useful = [
        index
        for index, point in enumerate(curve)
        if not index or is_useful(point["retain"]["value"], kept, margin, higher_is_better)
    ]
    return max(useful, key=lambda index: harm(curve[index]["forget"]["value"], higher_is_better))


def _drawn(trial: Any, config: SearchConfig) -> Point:
    """The settings that Optuna proposes."""
    optimizer = trial.suggest_categorical("optimizer", config.optimizers)
    point: Point = {
        "optimizer": optimizer,
        "rate": trial.suggest_float(f"rate of {optimizer}", *config.rates, log=True),  # optimizers need different ones
        "steps": trial.suggest_int("steps", *config.steps, log=True),
        "batch_size": trial.suggest_categorical("batch_size", config.batch_sizes),
        "warmup": trial.suggest_categorical("warmup", config.warmups),
        "rank": trial.suggest_categorical("rank", config.ranks),
        "retain_share": trial.suggest_categorical("retain_share", config.retain_shares),
        "scaling": None,
    }
    if point["rank"]:
        point["scaling"] = trial.suggest_categorical("scaling", config.scalings)
    return point


def settled_attacks(headline: AttackConfig, attacks: Mapping[str, Any]) -> dict[str, Any]:
    """Every attack by name, the headline attack first; a search has the attack that it is like."""
    further = {name: own.along(headline) if isinstance(own, SearchConfig) else own for name, own in attacks.items()}
    return {HEADLINE: headline, **further}


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Context in which Optuna prints only warnings."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
