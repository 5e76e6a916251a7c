"""Attacks a model by training it at one learning rate; the manifest holds the curve on the test sequences."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from transformers import PreTrainedModel

from undo_core.attacks.config import AttackConfig
from undo_core.attacks.lora import insert
from undo_core.attacks.relearning import attack, mixed_cross_entropy
from undo_core.attacks.text import AttackTextConfig, facts
from undo_core.data.sequences import Sequences
from undo_core.evaluation.metrics import evaluate
from undo_core.io.files import hash_json
from undo_core.io.untrusted import read_object
from undo_core.models import forward_flops, load_tokenizer
from undo_core.pipeline.model_stage import TrainingStage, load_to_train, save, training_facts
from undo_core.pipeline.needs import Cost, Memory, Scene
from undo_core.pipeline.prepared import tested_sequences, train_sequences
from undo_core.pipeline.stage import MANIFEST, Folder, Stage, Work
from undo_core.training import TrainConfig, TrainResult
from undo_core.unlearning import Method

if TYPE_CHECKING:
    from undo_core.pipeline.memory.meta import Meta

# Settings that are always part of the key; later ones are left out at their default, so that older stages keep their keys.
FIRST = ("evaluate_at", "headline_step", "batch_size", "clip", "precision", "optimizer", "step_in_backward", "seed")
OF_THE_GRID = ("rates", "extend", "seeds", "shots", "bits", "group_size", "ladder")
_AT_START: dict[str, dict[str, float]] = {}  # metrics before the first step, of the attacks that this process has run
INTERVAL = {"": "value", "_low": "low", "_high": "high"}


@dataclass(frozen=True, kw_only=True)
class Relearn(TrainingStage):
    """Trains a model to bring the capability back.

    Attributes:
        config: the attack, with a single learning rate and the seed of one data order.
        model: the attacked model.
        grid: the trials that trained together, this one among them; None if it trains alone.
    """

    kind = "relearn"
    time_from = "the number of relearn.rates, headline_step and batch_size, attacks"
    config: AttackConfig
    model: Stage | Folder
    grid: Stage | None = None

    def _json(self) -> dict[str, Any]:
        values, default = dataclasses.asdict(self.config), dataclasses.asdict(AttackConfig())
        values["lora"], default["lora"] = self.config.lora.recorded(), AttackConfig().lora.recorded()
        left_out = (*OF_THE_GRID, *(() if self.config.kind == "lora" else ("lora",)))
        kept = {name: value for name, value in values.items() if name in FIRST or value != default[name]}
        return {name: value for name, value in kept.items() if name not in left_out} | {"rate": self.rate}

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.config.rates[0]

    @property
    def training(self) -> TrainConfig:
        return self.config.training(self.rate)

    def retrained(self, **settings: Any) -> Self:
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **settings))

    @property
    def drawn(self) -> list[int]:
        return list(self.config.sequences().values())

    def flag(self, name: str) -> str:
        return name

    def run(self, work: Work) -> dict[str, Any]:
        if self.grid is not None:
            return self._from_grid(work)
        config, data = self.config, work.inputs["prepared"]
        texts, tests, own = attacked_text(config, data)
        model = load_to_train(work.inputs["model"], config.precision)
        # Attacks of one model at several rates begin with the same evaluation.
        begins_with = hash_json(
            [
                *(self.model.key, self.prepared.key, config.precision, config.kind),
                *(dataclasses.asdict(config.lora), dataclasses.asdict(config.text)),
            ]
        )
        given = {"forget": None, **texts, "known_at_start": _AT_START.get(begins_with), "evaluate": metrics_on(tests)}
        given_text = dataclasses.replace(config, text=AttackTextConfig())
        result = attack(model, rate=self.rate, config=given_text, **given, folder=work.scratch, title=work.title)
        _AT_START[begins_with] = {name: value for name, value in result.history[0].items() if name not in ("step", "loss")}
        if config.save:
            save(model, load_tokenizer(data), work.output, self.training)
        return facts_of(model, result, texts, tests, config.passes) | own

    def _from_grid(self, work: Work) -> dict[str, Any]:
        """Takes the result out of the folder of the trials that trained together."""
        source = work.inputs["grid"] / self.trial_name
        for file in sorted(source.rglob("*")) if self.config.save else ():
            copy = work.output / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if file.is_file():
                shutil.copyfile(file, copy)  # without times and permissions, which not every file system has
        path = work.inputs["grid"] / MANIFEST
        trials = read_object(path, self.grid.entries)["trials"]
        if self.trial_name not in trials:
            raise ValueError(f"{path}: got no trial {self.trial_name}, wanted one")
        return trials[self.trial_name]

    @property
    def trial_name(self) -> str:
        """Name of the trial among those that train together: its rate and the seed of its data order."""
        return f"rate-{self.rate!r}-seed-{self.config.seed}"  # all digits: a rounded rate could be that of another trial

    def memory(self, meta: Meta) -> list[Memory]:
        if self.grid is not None:
            return [Memory("loading")]
        return meta.training(self.config.training(1.0), self.config.sequences(), self._method)

    def _method(self, model: PreTrainedModel) -> Method:
        # The factors' first values do not matter here, and those of pissa cannot be computed without weights.
        adapters = (
            insert(model, dataclasses.replace(self.config.lora, initialisation="kaiming"), 0)[1]
            if self.config.kind == "lora"
            else None
        )
        return Method(mixed_cross_entropy, adapters)

    def cost(self, scene: Scene) -> Cost:
        if self.grid is not None:
            return Cost(disk=scene.parameters * self.stored().itemsize if self.config.save else 0)
        cost = super().cost(scene)
        return cost if self.config.save else dataclasses.replace(cost, disk=0)

    def passes(self, scene: Scene) -> float:
        return self.config.passes


def attacked_text(config: AttackConfig, data: Path) -> tuple[dict[str, Sequences], dict[str, Sequences], dict[str, Any]]:
    """Returns the attack's text by source and its test sequences, and facts about them if they are not those of every attack."""
    tests = tested_sequences(data)
    if not config.text:
        return {name: train_sequences(data, [name]) for name in config.sequences()}, tests, {}
    texts, tests = config.text.choose(train_sequences(data, ["forget"]), train_sequences(data, ["retain"]), tests)
    texts = {name: texts[name] for name in config.sequences()}
    return texts, tests, {"text": facts(texts, tests)}


def metrics_on(tests: dict[str, Sequences]) -> Callable[[PreTrainedModel], dict[str, float]]:
    """Returns a function that evaluates a model on test sequences, with the intervals."""

    def metrics(model: PreTrainedModel) -> dict[str, float]:
        scores = {name: evaluate(model, sequences) for name, sequences in tests.items()}
        return {f"{name}{suffix}": score[key] for name, score in scores.items() for suffix, key in INTERVAL.items()}

    return metrics


def facts_of(
    model: PreTrainedModel, result: TrainResult, texts: dict[str, Sequences], tests: dict[str, Sequences], passes: int
) -> dict[str, Any]:
    """The curve of an attack on the test sequences, and what it took."""
    curve = []
    for entry in result.history:
        scores = {
            name: {key: entry[f"{name}{suffix}"] for suffix, key in INTERVAL.items()} | {"n": len(sequences)}
            for name, sequences in tests.items()
        }
        curve.append({"step": int(entry["step"]), **scores})
    flops = sum(passes * forward_flops(model, sequences.length) * result.positions[name] for name, sequences in texts.items())
    return {"curve": curve, **training_facts(result, flops)}
