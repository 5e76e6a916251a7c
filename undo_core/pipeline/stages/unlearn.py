"""Suppresses the capability shown by the forget data in a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from undo_core.models import forward_flops, load_tokenizer, tokens_of, vocabulary_of
from undo_core.pipeline.model_stage import TrainingStage, load_to_train, save, training_facts, validation
from undo_core.pipeline.needs import Memory, Scene
from undo_core.pipeline.prepared import train_sequences
from undo_core.pipeline.stage import Folder, Stage, Work
from undo_core.training import TrainConfig
from undo_core.unlearning import UnlearnConfig, method_of, unlearn, unlearn_flops

if TYPE_CHECKING:
    from undo_core.pipeline.memory.meta import Meta


@dataclass(frozen=True, kw_only=True)
class Unlearn(TrainingStage):
    """Unlearns the forget data.

    Attributes:
        config: method, weights of its terms, optimizer.
        model: the original model.
    """

    kind = "unlearn"
    time_from = "unlearn.train.steps and batch_size"
    config: UnlearnConfig
    model: Stage | Folder

    def _json(self) -> dict[str, Any]:
        return self.config.settings()

    @property
    def training(self) -> TrainConfig:
        return self.config.train

    def retrained(self, **settings: Any) -> Self:
        train = dataclasses.replace(self.config.train, **settings)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, train=train))

    @property
    def batches(self) -> int:
        return 2 if self.config.retain_weight else 1

    def possible(self, name: str, value: Any) -> bool:
        """Micro-batches are not possible for methods whose loss is not a sum over the batch."""
        sums = all(entry.sums for entry in self.config.entries())
        return (sums or name != "micro_batch_size") and super().possible(name, value)

    def run(self, work: Work) -> dict[str, Any]:
        config, data = self.config, work.inputs["prepared"]
        tokens = tokens_of(load_tokenizer(data))
        model = load_to_train(work.inputs["model"], config.train.precision)
        if config.vocab_size is None and tokens < vocabulary_of(model):
            config = dataclasses.replace(config, vocab_size=tokens)
        forget, retain = train_sequences(data, ["forget"]), train_sequences(data, ["retain"])
        if config.forget_rows is not None:
            if config.forget_rows > len(forget):
                raise ValueError(
                    f"forget_rows: got {config.forget_rows}, wanted at most {len(forget)}, the number of forget sequences"
                )
            forget = forget.take(slice(config.forget_rows))
        metrics = validation(data, "retain", "forget")
        result = unlearn(
            model, forget=forget, retain=retain, config=config, evaluate=metrics, folder=work.scratch, title=work.title
        )
        save(model, load_tokenizer(data), work.output, config.train)
        costs = unlearn_flops(model, config, forget.length)
        flops = sum(costs[name] * count for name, count in result.positions.items())
        read = {name: result.tokens.get(name, 0) for name in ("forget", "retain")}
        drawn = result.steps * config.train.batch_size
        seeds = {"forget": config.train.seed or 0, "retain": (config.train.seed or 0) + 1}
        distinct = {
            name: sequences.take(sequences.order(0, min(drawn, len(sequences)), seeds[name])).tokens() if read[name] else 0
            for name, sequences in {"forget": forget, "retain": retain}.items()
        }
        labelled = {f"labelled_{name}_tokens": count for name, count in read.items()}
        return {**labelled, "labelled_distinct_tokens": distinct, **training_facts(result, flops)}

    def memory(self, meta: Meta) -> list[Memory]:
        sources = ("forget", "retain")[: self.batches]
        return meta.training(self.config.train, sources, lambda model: method_of(model, self.config))

    def passes(self, scene: Scene) -> float:
        """Forward passes that a step costs, as a mean over the sources."""
        flops = unlearn_flops(scene.model, self.config, scene.length)
        return sum(flops.values()) / self.batches / forward_flops(scene.model, scene.length)
