"""Settings of a run: dataclasses that the command line fills from YAML files and flags.

A section that configures one package stands in that package's ``config.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from dataclasses import dataclass, field
from typing import Any

from undo_core.attacks.config import AttackConfig
from undo_core.attacks.named import AnyAttack, check_attacks, check_margin
from undo_core.data.config import DataConfig
from undo_core.distillation.config import DistillConfig
from undo_core.distillation.gate import GateConfig
from undo_core.distributed.config import ParallelConfig
from undo_core.evaluation.inside import AnyMeasurement
from undo_core.io.untrusted import LARGEST
from undo_core.models.config import ModelConfig
from undo_core.noise.config import NoiseConfig
from undo_core.noise.damage import DamageConfig
from undo_core.pipeline.student_config import StudentConfig
from undo_core.training.config import TrainConfig
from undo_core.unlearning.config import UnlearnConfig


@dataclass(frozen=True)
class PretrainConfig:
    """Pretraining of the original model and of the data-filtering control.

    Attributes:
        train: optimizer, learning rates, batch sizes; ``steps`` is the limit.
        stop_retain: stop at the first evaluation with at least this retain accuracy and at least ``stop_forget``; None trains
            for ``steps``.
        stop_forget: forget accuracy that the stop rule requires as well; None requires none.
        tokens: number of tokens on which a checkpoint (model.path) was pretrained elsewhere, used to report the labelled share;
            None if unknown.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    stop_retain: float | None = None
    stop_forget: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"pretrain.tokens: got {self.tokens}, wanted an integer >= 1")


@dataclass(frozen=True)
class ControlsConfig:
    """The models to compare with; the original and the one that is only unlearned are always included.

    Attributes:
        filter: data filtering: a model trained from scratch without the forget set.
        random: the teacher distilled into a fresh initialisation from another seed.
        oracle_steps: steps of distilling the data-filtered model into the original one (the paper's oracle matching); 0 leaves
            it out.
        oracle_random_steps: steps of distilling the data-filtered model into random weights; 0 leaves it out.
        gate: filter-then-distill: no unlearning, but distillation on data from which a cheap classifier has dropped sequences.
    """

    filter: bool = True
    random: bool = True
    oracle_steps: int = 0
    oracle_random_steps: int = 0
    gate: GateConfig = field(default_factory=GateConfig)


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Attributes:
        name: name of the run and of its report.
        output: folder of the stages, results and report.
        model: the model that is trained.
        seed: seed from which all other seeds derive, unless a stage sets its own.
        workers: number of stages that run in parallel, each with its share of the CPU threads. Continue a run with the number
            that it was started with: the order of a sum, and so its last bit, can depend on the number of threads.
        parallel: how the ranks of torchrun work together.
        data: what is retained and what is forgotten.
        pretrain: pretraining of the original and of the data-filtering control.
        unlearn: how the capability is suppressed.
        noise: how the students are damaged.
        distill: how the students are repaired.
        relearn: how the models are attacked.
        controls: the models to compare with.
        damage: students damaged as much as by the noise, by other means.
        students: further students by name, such as those whose vocabulary matrices have noise of their own.
        attacks: further attacks, by name; also interventions, whose ``kind`` is the name of a file in
            undo_core/attacks/interventions, and a search over the settings of attacks, whose ``kind`` is search.
        retain_margin: margin of a second worst case beside the headline's, over the trials that leave the model useful: those
            whose retain performance is at most this much worse than before the attack. An absolute difference of accuracy or
            a relative one of cross-entropy; null for none.
        measures: measures of what the models still hold inside, by name; the ``kind`` of each is the name of a file in
            undo_core/evaluation/inside.
        target_robustness: R for which the cheapest alpha is searched, beginning with noise.alphas; null searches none. R is
            measured against data filtering, or without it against the random student.
        alpha_resolution: distance of neighbouring alphas at which the search ends; it tries multiples of it.
        alpha_tries: largest number of alphas that the search adds to noise.alphas.
        alpha_max: alpha that the search tries if none of noise.alphas reaches the target.
    """

    name: str
    output: str
    model: ModelConfig
    seed: int = 0
    workers: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    unlearn: UnlearnConfig = field(default_factory=UnlearnConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    relearn: AttackConfig = field(default_factory=AttackConfig)
    controls: ControlsConfig = field(default_factory=ControlsConfig)
    damage: DamageConfig = field(default_factory=DamageConfig)
    students: dict[str, StudentConfig] = field(default_factory=dict)
    attacks: dict[str, AnyAttack] = field(default_factory=dict)
    retain_margin: float | None = None
    measures: dict[str, AnyMeasurement] = field(default_factory=dict)
    target_robustness: float | None = None
    alpha_resolution: float = 0.02
    alpha_tries: int = 8
    alpha_max: float = 0.9

    def __post_init__(self) -> None:
        for key in ("name", "output"):  # both are printed
            if not getattr(self, key).isprintable():
                raise ValueError(f"{key}: got {getattr(self, key)!r}, wanted a text without control characters")
        check_seed(self.seed)
        if self.workers < 1:
            raise ValueError(f"workers: got {self.workers}, wanted an integer >= 1")
        if self.model.path and self.controls.filter:
            raise ValueError(
                "controls.filter: got true, wanted false with model.path: data filtering means pretraining from scratch"
            )
        for name in ("oracle_steps", "oracle_random_steps"):
            if getattr(self.controls, name) and not self.controls.filter:
                raise ValueError(
                    f"controls.{name}: wanted 0 without controls.filter, because the data-filtered model is the oracle"
                )
        if self.data.metric == "loss" and self.pretrain.stop_retain is not None:
            raise ValueError(
                f"pretrain.stop_retain: got {self.pretrain.stop_retain} with text that is scored by its cross-entropy, wanted "
                "null: it is an accuracy, for arithmetic or data.questions"
            )
        check_attacks(self.relearn, self.attacks)
        check_margin(self.retain_margin)
        for section, names in (("measures", self.measures), ("students", self.students)):
            for name in names:
                if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
                    raise ValueError(f"{section}: got the name {name!r}, wanted letters, digits, - and _")
        for name, student in self.students.items():
            if student.model in ("random", "filter") and not getattr(self.controls, student.model):
                raise ValueError(
                    f"students.{name}.model: got {student.model}, wanted controls.{student.model} true, or another model"
                )
        self._check_search()

    def _check_search(self) -> None:
        target = self.target_robustness
        if target is not None and not 0 < target < math.inf:
            raise ValueError(f"target_robustness: got {target}, wanted a finite number > 0, or null")
        if target is not None and not (self.controls.filter or self.controls.random):
            raise ValueError(
                f"target_robustness: got {target} without a control that R is measured against; wanted controls.filter or "
                "controls.random"
            )
        if not 0.001 <= self.alpha_resolution <= 0.5:
            raise ValueError(f"alpha_resolution: got {self.alpha_resolution}, wanted a number in [0.001, 0.5]")
        if self.alpha_tries < 1:
            raise ValueError(f"alpha_tries: got {self.alpha_tries}, wanted an integer >= 1")
        if not 0 < self.alpha_max <= 1:
            raise ValueError(f"alpha_max: got {self.alpha_max}, wanted a number in (0, 1]")


def check_seed(seed: int) -> None:
    """Raises a ValueError if a run's seed is one that results cannot hold."""
    if abs(seed) >= LARGEST:
        raise ValueError(f"seed: got {seed}, wanted an integer of at most 64 bits")


def derive_seed(seed: int, name: str) -> int:
    """Derives a stage's seed from the run's seed: 31 bits of a hash, so that stages and runs draw independently."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little") >> 1


def seeded(settings: Any, seed: int, name: str) -> Any:
    """Returns the settings with a seed: their own, or one derived from the run's seed and the stage's name."""
    return settings if settings.seed is not None else dataclasses.replace(settings, seed=derive_seed(seed, name))
