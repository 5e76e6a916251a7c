"""Attacks copies of a model at several learning rates and data orders as one batched run; each trial's stage takes its result from here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from undo_core.attacks.config import AttackConfig, Trial
from undo_core.attacks.relearning import attack_together
from undo_core.attacks.text import AttackTextConfig
from undo_core.io.untrusted import Shape
from undo_core.models import load_tokenizer
from undo_core.pipeline.model_stage import TrainingStage, halves, load_to_train, save
from undo_core.pipeline.needs import Change, Cost, Memory, Scene
from undo_core.pipeline.stage import Folder, Stage, Work
from undo_core.pipeline.stages.relearn import Relearn, attacked_text, facts_of, metrics_on
from undo_core.training import TrainConfig

if TYPE_CHECKING:
    from undo_core.pipeline.memory.meta import Meta


@dataclass(frozen=True, kw_only=True)
class Grid(TrainingStage):
    """Trains copies of a model side by side; see :mod:`undo_core.training.together`.

    Its folder has a folder for each trial with the attacked model, if ``config.save`` keeps it, and its manifest the curves.

    Attributes:
        config: the attack, with a seed.
        trials: learning rates and data orders.
        model: the attacked model.
    """

    kind = "grid"
    entries: ClassVar[Shape] = {"trials": {str: dict}}
    config: AttackConfig
    trials: tuple[Trial, ...]
    model: Stage | Folder

    def trial(self, trial: Trial) -> Relearn:
        """The stage of one trial, as it would be alone."""
        return Relearn(config=self.config.at(trial), prepared=self.prepared, model=self.model)

    def _json(self) -> dict[str, Any]:
        return {"trials": [self.trial(trial).settings for trial in self.trials]}

    @property
    def training(self) -> TrainConfig:
        return self.config.training(self.config.rates[0])

    def retrained(self, **settings: Any) -> Self:
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **settings))

    def cheaper(self) -> list[Change]:
        """Only fewer trials at once: what makes a training smaller mostly makes it one that runs alone."""
        return [Change("together", tuple(halves(len(self.trials))))]

    def changed(self, changes: Mapping[str, Any]) -> Self:
        many = changes.get("together", len(self.trials))
        return dataclasses.replace(self, trials=self.trials[:many])

    def check_ranks(self, count: int) -> None:
        if count > 1:
            raise ValueError(f"together: got {self.config.together} on {count} ranks, wanted 1, or one rank")

    def run(self, work: Work) -> dict[str, Any]:
        config, data = self.config, work.inputs["prepared"]
        texts, tests, own = attacked_text(config, data)
        model = load_to_train(work.inputs["model"], config.precision)
        given = {"forget": None, **texts, "evaluate": metrics_on(tests), "title": work.title}
        trials: dict[str, Any] = {}
        given_text = dataclasses.replace(config, text=AttackTextConfig())
        for trial, (attacked, result) in attack_together(model, trials=self.trials, config=given_text, **given).items():
            alone = self.trial(trial)
            if config.save:
                save(attacked, load_tokenizer(data), work.output / alone.trial_name, alone.training)
            trials[alone.trial_name] = facts_of(attacked, result, texts, tests, config.passes) | own
        return {"trials": trials}

    def memory(self, meta: Meta) -> list[Memory]:
        many = len(self.trials)
        return [
            dataclasses.replace(
                phase,
                weights=(many + 1) * phase.weights,
                gradients=2 * many * phase.gradients,
                optimizer=many * phase.optimizer,
                activations=many * phase.activations,
            )
            for phase in self.trial(self.trials[0]).memory(meta)
        ]

    def cost(self, scene: Scene) -> Cost:
        one, many = self.trial(self.trials[0]).cost(scene), len(self.trials)
        return dataclasses.replace(
            one,
            disk=many * one.disk,
            sequences=many * one.sequences,
            positions=many * one.positions,
            flops=many * one.flops,
            checkpoint=0,
        )

    def passes(self, scene: Scene) -> float:
        return self.trial(self.trials[0]).passes(scene)
