"""Trains the prepared initialisation: on all data (the original model), or only on the retain data (data filtering)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from transformers import PreTrainedModel

from undo_core.models import forward_flops, load_model, load_tokenizer
from undo_core.pipeline.model_stage import Recovery, TrainingStage, load_to_train, save, training_facts, validation
from undo_core.pipeline.needs import Memory
from undo_core.pipeline.prepared import retain_performance, train_sequences
from undo_core.pipeline.stage import Folder, Stage, Work, optional
from undo_core.training import Batch, TrainConfig, sequence_source, train
from undo_core.training.losses import cross_entropy
from undo_core.unlearning import Method

if TYPE_CHECKING:
    from undo_core.pipeline.memory.meta import Meta


@dataclass(frozen=True, kw_only=True)
class Pretrain(TrainingStage):
    """Trains a model from scratch, until it performs as well as ``target`` or reaches fixed accuracies.

    Attributes:
        train: optimizer, learning rates, batch sizes.
        splits: data to train on: retain, forget or both.
        stop_retain: stop at the first evaluation with at least this retain accuracy and at least ``stop_forget``.
        stop_forget: forget accuracy that the stop rule requires as well.
        recover: distance to the target's retain performance at which training stops.
        target: model whose retain performance is the target.
    """

    kind = "pretrain"
    time_from = "pretrain.train.steps and batch_size, controls.filter"
    model_from = "prepared"
    late = ("target",)
    train: TrainConfig
    splits: tuple[str, ...]
    stop_retain: float | None = None
    stop_forget: float | None = None
    recover: float | None = None
    target: Stage | Folder | None = optional()

    def _json(self) -> dict[str, Any]:
        other = ("recover",) if self.target is None else ("stop_retain", "stop_forget")
        return {name: value for name, value in super()._json().items() if name not in other}

    @property
    def training(self) -> TrainConfig:
        return self.train

    def retrained(self, **settings: Any) -> Self:
        return dataclasses.replace(self, train=dataclasses.replace(self.train, **settings))

    @property
    def ruled(self) -> bool:
        return self.recover is not None or self.stop_retain is not None

    def run(self, work: Work) -> dict[str, Any]:
        data = work.inputs["prepared"]
        metrics, stop, known, rule = ("retain", "forget"), None, None, None
        if self.recover is not None:
            metrics = ("retain",)
            rule = Recovery(lambda: retain_performance(load_model(work.wait("target")), data), data, self.recover)
            stop, known = rule.stop, lambda: work.complete("target")
            if known():
                _ = rule.target  # now, while no other model takes memory
        elif self.stop_retain is not None:
            stop = self._accurate
        model, sequences = load_to_train(data, self.train.precision), train_sequences(data, self.splits)
        result = train(
            model,
            next_token_loss,
            {"text": sequence_source(sequences, self.train.batch_size, self.train.seed or 0)},
            self.train,
            evaluate=validation(data, *metrics),
            stop=stop,
            stop_known=known,
            folder=work.scratch,
            title=work.title,
        )
        save(model, load_tokenizer(data), work.output, self.train)
        flops = 3 * forward_flops(model, sequences.length) * result.positions["text"]
        facts = {} if rule is None else {"retain_target": rule.target}
        return {**facts, **training_facts(result, flops)}

    def _accurate(self, values: Mapping[str, float]) -> bool:
        wanted = {"retain": self.stop_retain, "forget": self.stop_forget}
        return all(values[name] >= value for name, value in wanted.items() if value is not None)

    def memory(self, meta: Meta) -> list[Memory]:
        return meta.training(self.train, ("text",), lambda model: Method(next_token_loss))


def next_token_loss(model: PreTrainedModel, batches: Mapping[str, Batch], counted: Mapping[str, int]) -> Any:
    """Returns the mean cross-entropy of the next token, a scalar."""
    return cross_entropy(model, batches["text"], counted["text"])
