"""Base classes and helpers of the stages that run or train a model."""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from undo_core import distributed
from undo_core.checkpoints.files import settled_configuration, stored_dtype
from undo_core.data.sequences import Sequences
from undo_core.data.splits import TRAIN_SPLITS
from undo_core.distributed.sharding import is_sharded, whole_state
from undo_core.evaluation.metrics import evaluate
from undo_core.io.progress import console
from undo_core.models import forward_flops, load_model
from undo_core.pipeline.needs import Change, Cost, Scene
from undo_core.pipeline.prepared import load_split
from undo_core.pipeline.stage import Folder, Stage, Work
from undo_core.training import TrainConfig, TrainResult
from undo_core.training.optimizers import bytes_per_parameter
from undo_core.training.precision import Precision, weight_dtype
from undo_core.training.sharded import check_ranks

if TYPE_CHECKING:
    from undo_core.pipeline.memory.predictor import Predictor

# Cheapest first: those that cost time, then those that may change the result. None: the configured size, halved repeatedly.
CHANGES: tuple[tuple[str, Any], ...] = (
    ("activation_checkpointing", True),
    ("micro_batch_size", None),
    ("teacher.kind", "cached"),
    ("step_in_backward", True),
    ("optimizer", "adamw-8bit"),
    ("optimizer", "adamw-4bit"),
    ("precision", "bfloat16-stochastic"),
    ("optimizer", "adamw-offload"),
)


@dataclass(frozen=True, kw_only=True)
class ModelStage(Stage):
    """A stage that runs a model over prepared data.

    Attributes:
        prepared: the prepared data.
    """

    prepared: Stage | Folder

    def expected(self, work: Work) -> dict[str, Any]:
        """The peak memory that ``undo plan`` predicts; None if the prediction fails, which must not stop the stage."""
        data, source = work.inputs["prepared"], work.inputs[self.model_from]
        sequences, scored = load_split(data, TRAIN_SPLITS["retain"]), load_split(data, "valid_retain")
        arguments = {**_scored(scored), "ranks": work.ranks, "tensor": work.tensor}
        config = settled_configuration(source)
        try:
            predicted = _predictor(config, length=sequences.length, **arguments)(self, stored_dtype(source)).total
        except Exception as error:
            console.print(f"{work.title}: peak memory not predicted: {type(error).__name__}: {error}")
            predicted = None
        return {"predicted_bytes": predicted}


@dataclass(frozen=True, kw_only=True)
class TrainingStage(ModelStage):
    """A stage that trains a model."""

    together = True

    @property
    @abc.abstractmethod
    def training(self) -> TrainConfig:
        """The training settings."""

    @abc.abstractmethod
    def retrained(self, **settings: Any) -> Self:
        """Returns the stage with some training settings replaced.

        Raises:
            ValueError: the settings exclude each other.
        """

    @property
    def batches(self) -> int:
        """Number of batches that a step reads: one from each source."""
        return 1

    @property
    def drawn(self) -> list[int]:
        """Number of sequences that a step draws from each source."""
        return [self.training.batch_size] * self.batches

    def check_ranks(self, count: int) -> None:
        try:
            check_ranks(self.training, self.drawn, count)
        except ValueError as error:
            raise ValueError(f"{error} (in the settings of {self.kind})") from None

    @property
    def ruled(self) -> bool:
        """Whether a stop rule may end the stage before its last step."""
        return False

    def passes(self, scene: Scene) -> float:
        """Forward passes that a step costs; a backward pass counts as two."""
        return 3

    def stored(self) -> torch.dtype:
        return weight_dtype(self.training.precision)

    def cost(self, scene: Scene) -> Cost:
        steps, sequences, passes = self.training.steps, self.training.batch_size * self.batches, self.passes(scene)
        positions = steps * sequences * scene.length
        flops = passes * forward_flops(scene.model, scene.length) * positions
        disk = scene.parameters * self.stored().itemsize
        states = bytes_per_parameter(self.training, "cpu")[
            "optimizer"
        ]  # a checkpoint also has those that a GPU leaves on the host
        checkpoint = disk + int(states * scene.parameters)
        return Cost(disk, steps, sequences, passes, positions, flops, self.ruled, checkpoint)

    def cheaper(self) -> list[Change]:
        return [Change(self.flag(name), self._values_of(name, value)) for name, value in CHANGES if self.possible(name, value)]

    def changed(self, changes: Mapping[str, Any]) -> Self:
        return self.retrained(**{flag.removeprefix(self.flag("")): value for flag, value in changes.items()})

    def flag(self, name: str) -> str:
        """Path of a training setting below the stage's section of the configuration."""
        return f"train.{name}"

    def possible(self, name: str, value: Any) -> bool:
        """Whether this change applies: the stage has the setting, allows the value, and does not have it already."""
        train = self.training
        if name not in {field.name for field in dataclasses.fields(TrainConfig)}:
            return False
        if name == "optimizer" and not train.optimizer.startswith("adamw"):
            return False
        if name == "precision" and train.precision == "bfloat16":
            return False
        if value == "adamw-offload" and not torch.cuda.is_available():
            return False
        values = self._values_of(name, value)
        return bool(values) and getattr(train, name) != values[-1] and self.accepts({self.flag(name): values[-1]})

    def _values_of(self, name: str, value: Any) -> tuple[Any, ...]:
        return (value,) if value is not None else tuple(halves(self.training.micro_batch_size or self.training.batch_size))


def halves(size: int) -> list[int]:
    """Returns ``size`` halved repeatedly, rounded up, down to 1."""
    found = []
    while size > 1:
        size = -(-size // 2)
        found.append(size)
    return found


def load_to_train(folder: Path, precision: Precision) -> PreTrainedModel:
    """Loads a model for training, in the dtype of the trained weights.

    With bfloat16-master and a checkpoint that is not bfloat16 it loads float32, so that the masters keep the stored values.
    """
    keeps = precision == "bfloat16-master" and stored_dtype(folder) != torch.bfloat16
    return load_model(folder, torch.float32 if keeps else weight_dtype(precision))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, train: TrainConfig | None = None) -> None:
    """Writes model and tokenizer as a Hugging Face checkpoint folder; ``train`` is how a model was trained on several ranks."""
    state = whole_state(model, weight_dtype(train.precision)) if train is not None and is_sharded(model) else None

    def write() -> None:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)

    distributed.on_first(write)


def validation(data: Path, *names: str) -> Callable[[PreTrainedModel], dict[str, float]]:
    """Returns a function that evaluates a model on the validation data of ``names``, for training curves and stop rules."""
    sequences = {name: load_split(data, f"valid_{name}") for name in names}
    return lambda model: {name: evaluate(model, part)["value"] for name, part in sequences.items()}


class Recovery:
    """The published stop rule: stop within ``recover`` of the teacher's retain performance.

    Args:
        reached: returns the teacher's retain performance; called when the rule is first asked.
        data: prepared folder.
        recover: absolute distance for accuracies, relative for cross-entropies; published: 0.05 for both.
    """

    def __init__(self, reached: Callable[[], float], data: Path, recover: float) -> None:
        self.reached, self.recover = reached, recover
        self.higher_is_better = load_split(data, "valid_retain").answer_mask is not None

    @functools.cached_property
    def target(self) -> float:
        """The retain performance at which training stops."""
        reached = self.reached()
        return reached - self.recover if self.higher_is_better else reached * (1 + self.recover)

    def stop(self, metrics: Mapping[str, float]) -> bool:
        """Whether training stops at an evaluation with these metrics."""
        return metrics["retain"] >= self.target if self.higher_is_better else metrics["retain"] <= self.target


def training_facts(result: TrainResult, flops: float) -> dict[str, Any]:
    """Facts about a training run for the manifest."""
    facts = dataclasses.asdict(result)
    facts["tokens_by_source"] = facts.pop("tokens")
    facts["positions_by_source"] = facts.pop("positions")
    facts["tokens"] = sum(result.tokens.values())
    facts["limit_reached"] = result.limit_reached
    facts["flops"] = flops
    return facts


def _predictor(config: PreTrainedConfig, **arguments: Any) -> Predictor:
    """Returns the predictor of these arguments, the same one again: it remembers what it has computed for similar stages."""
    from undo_core.pipeline.memory.predictor import Predictor  # imports the whole training code

    key = json.dumps([config.to_dict(), arguments], sort_keys=True, default=str)
    if key not in _PREDICTORS:
        _PREDICTORS[key] = Predictor(config, **arguments)
    return _PREDICTORS[key]


_PREDICTORS: dict[str, Predictor] = {}


def _scored(sequences: Sequences) -> dict[str, Any]:
    """Arguments of :class:`Predictor` that describe the evaluated sequences."""
    asked = {} if sequences.choices is None else {"choices": sequences.choices.shape[1], "evaluated_length": sequences.length}
    return {"answers": sequences.answer_mask is not None, "evaluated": len(sequences), **asked}
