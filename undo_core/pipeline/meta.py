"""Peak memory of a stage, by parts, before anything runs.

The stage's own loss runs forward and backward on the meta device while the storages that live are counted: what autograd keeps,
temporaries and gradients are those of the code that will run, for any architecture. Arithmetic adds what is no tensor there: the
optimizer's state, the files that weights are read from, and the process; a step's temporaries are counted in the optimizer's own
code. The peak is the largest of a few moments: loading; forward and backward of a micro-batch, with the head's gradient between
them; the optimizer's step; evaluation.

On a CPU the tests compare this with the resident size of a process. On a GPU it is what the allocator hands out, by the same arithmetic,
and was compared with nothing: fused attention is assumed for every kernel but eager, and fragmentation is left out.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import undo_kernels
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from undo_kernels.library import choose

from undo_core import ops
from undo_core.attacks.config import AttackConfig, attack_config
from undo_core.attacks.lora import insert
from undo_core.damage import ELEMENT_BYTES as DAMAGE_BYTES
from undo_core.distillation import matching
from undo_core.evaluation import letter_logits, most_likely, rows_at_once, token_nats
from undo_core.files import hash_json
from undo_core.gate import ROWS_AT_ONCE
from undo_core.models import head_of, hidden_states, make, set_attention
from undo_core.pipeline.storages import FUSED, Storages
from undo_core.relearning import mixed_cross_entropy
from undo_core.teacher import ModelTeacher, TeacherConfig
from undo_core.teacher_cache import BATCH_SIZE, LOGIT_BYTES
from undo_core.training import Batch, TrainConfig
from undo_core.training.embedding import TiedEmbedding
from undo_core.training.lean import lean
from undo_core.training.losses import HiddenTargets, TopTargets, cross_entropy, distillation
from undo_core.training.optimizers import BLOCK_CPU, QUANTISED, bytes_per_parameter, optimizer_of
from undo_core.training.precision import convert_, weight_dtype
from undo_core.unlearning import Method, method_of, referred, unlearn_config
from undo_core.unlearning.activations import find_layers

PROCESS_BYTES = 550 << 20  # resident, of Python with torch and transformers, measured; a GPU's allocator knows nothing of it


@dataclass(frozen=True)
class Memory:
    """A stage's memory at the moment where it is largest, in bytes.

    Attributes:
        moment: loading, forward, backward, step or evaluation.
        weights: of the trained model, copies that a method keeps, and a file while it is read.
        gradients: those that exist at that moment.
        optimizer: masters, moments, and a step's temporaries.
        activations: what the backward pass will need, and the layers' temporaries; a teacher's too.
        workspace: of the fused losses.
        teacher: its weights.
        process: what is there anyway: libraries and token rows; 0 on a GPU.
    """

    moment: str
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    workspace: int = 0
    teacher: int = 0
    process: int = 0

    @property
    def total(self) -> int:
        """The peak."""
        return sum(getattr(self, part) for part in PARTS)


PARTS = tuple(field.name for field in dataclasses.fields(Memory))[1:]


def meta_model(config: PreTrainedConfig, attention: str = "auto") -> PreTrainedModel:
    """The model of a configuration without contents, float32, with an attention kernel as in :class:`TrainConfig`."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = make(copy.deepcopy(config))
    if attention in ("eager", "sdpa"):
        set_attention(model, attention)  # refuses what the model cannot have
    if attention not in ("auto", "eager") or model.config._attn_implementation != "eager":
        model.set_attn_implementation(FUSED)
    return model


class Predictor:
    """Peaks of the stages of one run, each kind of step computed once.

    Args:
        config: of the models, teachers included.
        length: tokens in a row.
        answers: whether evaluation scores answers; else it is cross-entropy.
        choices: letters of a question, where evaluation compares those; 0 where it does not.
        evaluated: rows that an evaluation has; None where nobody knows, for as many as it takes at once.
        evaluated_length: tokens in the longest of them; None for ``length``.
        data_bytes: token rows that a stage holds.
        device: ``"cuda"`` or ``"cpu"``; None for the GPU where there is one.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        length: int,
        *,
        answers: bool = False,
        choices: int = 0,
        evaluated: int | None = None,
        evaluated_length: int | None = None,
        data_bytes: int = 0,
        device: str | None = None,
    ) -> None:
        self.config, self.length, self.data_bytes = config, length, data_bytes
        columns = evaluated_length or length
        most = rows_at_once(columns)
        self.scored = _Scored(min(most, evaluated or most), columns, answers, choices)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._known: dict[str, Memory] = {}

    def __call__(self, kind: str, settings: dict[str, Any], stored: torch.dtype = torch.float32) -> Memory:
        """Peak of a stage, whose kind and settings are those of a :class:`undo_core.pipeline.store.Stage`.

        Args:
            kind: of the stage.
            settings: of the stage.
            stored: dtype of the weights in the folders that it reads.

        Raises:
            ValueError: settings that the model cannot have.
        """
        key = hash_json([kind, _that_matter(settings), str(stored)])
        if key not in self._known:
            self._known[key] = max(self.moments(kind, settings, stored), key=lambda memory: memory.total)
        return self._known[key]

    def moments(self, kind: str, settings: dict[str, Any], stored: torch.dtype = torch.float32) -> list[Memory]:
        """The parts at the largest sum of each moment."""
        with undo_kernels.backend(choose("vocab_loss", torch.device(self.device))):
            stage = _Stage(self.config, self.length, self.scored, self.device)
            moments = stage.moments(kind, settings, stored)
        process = 0 if self.device == "cuda" else PROCESS_BYTES + self.data_bytes
        return [dataclasses.replace(memory, process=process) for memory in moments]


_NO_MATTER = (
    "steps",
    "lr",
    "min_lr",
    "schedule",
    "warmup",
    "weight_decay",
    "beta1",
    "beta2",
    "eps",
    "clip",
    "eval_every",
    "seed",
    "rate",
)


def _that_matter(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that memory depends on."""
    return {k: _that_matter(v) if isinstance(v, dict) else v for k, v in settings.items() if k not in _NO_MATTER}


@dataclass(frozen=True)
class _Scored:
    """The rows of an evaluation's forward pass, their length, and what of them is scored."""

    rows: int
    length: int
    answers: bool
    choices: int


class _Stage:
    """One stage on the meta device."""

    def __init__(self, config: PreTrainedConfig, length: int, scored: _Scored, device: str) -> None:
        self.config, self.length, self.scored, self.device = config, length, scored, device
        self.storages = Storages(PARTS)

    def moments(self, kind: str, settings: dict[str, Any], stored: torch.dtype) -> list[Memory]:
        """The parts at the largest sum of each moment."""
        sizes = [parameter.numel() for parameter in meta_model(self.config).parameters()]
        mapped = 0 if self.device == "cuda" else stored.itemsize  # a file's pages, on a CPU, until everything is read

        def reading(dtype: torch.dtype) -> int:
            """What is there beside the weights while they are read: the file, and one that is cloned."""
            return mapped * sum(sizes) + (mapped and dtype != stored) * dtype.itemsize * max(sizes)

        if kind == "gate":  # features of as many rows as are scored at once; the labelled ones are few
            return [Memory("forward", activations=8 * settings["buckets"] * ROWS_AT_ONCE)]
        if kind == "noise":  # in the file's pages, tensor by tensor
            return [Memory("loading", weights=mapped * max(sizes))]
        if kind == "damage":
            return [Memory("forward", weights=mapped * max(sizes), activations=DAMAGE_BYTES * max(sizes))]
        if kind in ("prepare", "initialise", "replay"):
            read = kind == "prepare" and settings["model"]["path"]
            return [Memory("loading", weights=stored.itemsize * sum(sizes) + reading(stored) if read else 4 * sum(sizes))]
        loaded = []
        if kind == "cache":
            model = meta_model(self.config)
            share = self._streamed(model) if settings.get("streamed") else 1.0
            file = mapped * max(sizes) if settings.get("streamed") else reading(torch.float32)
            loaded.append(Memory("loading", weights=file, teacher=int(share * 4 * sum(sizes))))
            how = TeacherConfig(**{name: value for name, value in settings.items() if name != "streamed"})
            self._cache(how, model, share)
        elif kind == "probe":  # a prompt's examples stand in its row
            self.length *= 1 + settings.get("shots", 0)
            loaded.append(Memory("loading", weights=4 * sum(sizes) + reading(torch.float32)))
            self._probe()
        else:
            train, sources, method_of = self._training(kind, settings, stored)
            keeps = train.precision == "bfloat16-master" and stored != torch.bfloat16
            dtype = torch.float32 if keeps else weight_dtype(train.precision)
            loaded.append(Memory("loading", weights=dtype.itemsize * sum(sizes) + reading(dtype)))
            if settings.get("teacher", {}).get("kind", "resident") == "resident" and kind == "distill":
                own, teacher = dtype.itemsize * sum(sizes), _teacher_dtype(train, stored)
                file = reading(teacher)
                loaded.append(Memory("loading", weights=own + file, teacher=teacher.itemsize * sum(sizes)))
            self._train(train, sources, method_of)
        return loaded + [Memory(moment, **parts) for moment, parts in self.storages.peaks.items() if moment]

    def _training(
        self, kind: str, settings: dict[str, Any], stored: torch.dtype
    ) -> tuple[TrainConfig, Iterable[str], Callable[[PreTrainedModel], Method]]:
        """How a stage trains, on which sources, which may have rows of their own number, and its method."""
        if kind == "relearn":
            attack = attack_config(settings)
            return attack.training(1.0), attack.rows(), lambda model: _attack(model, attack)
        if kind == "pretrain":
            return TrainConfig(**settings["train"]), ("text",), _pretraining
        if kind == "unlearn":
            config = unlearn_config(settings)
            return config.train, ("forget", "retain")[: 1 + bool(config.retain_weight)], lambda model: method_of(model, config)
        if kind == "distill":
            how, train = TeacherConfig(**settings.get("teacher", {})), TrainConfig(**settings["train"])
            dtype, matched = _teacher_dtype(train, stored), settings.get("hidden")
            return train, ("text",), lambda model: self._distillation(model, how, dtype, matched)
        raise ValueError(f"kind: got {kind!r}, wanted a kind of stage")

    def _probe(self) -> None:
        model = meta_model(self.config)
        self.storages.hold(model.parameters(), "weights")
        self.storages.hold(model.buffers(), "weights")
        with self.storages:
            self.storages.kind, self.storages.moment = "activations", "evaluation"
            self._evaluate(model)

    def _train(self, settings: TrainConfig, sources: Iterable[str], method_of: Callable[[PreTrainedModel], Method]) -> None:
        """Forward, backward, step and evaluation, from the second step on: the optimizer's state is there."""
        storages = self.storages
        model = meta_model(self.config, settings.attention)
        convert_(model, settings.precision)
        storages.hold(model.parameters(), "weights")
        storages.hold(model.buffers(), "weights")
        with storages:
            storages.kind = "weights"
            method = method_of(model)
            convert_(model, settings.precision)  # what the method added
            storages.kind = "activations"
        trained = list(model.parameters()) if method.parameters is None else method.parameters
        steps = _Steps(storages, trained, settings, self.device)
        with storages:
            micro = settings.micro_batch_size or settings.batch_size
            rows = sources if isinstance(sources, dict) else dict.fromkeys(sources, settings.batch_size)
            batches = {name: self._batch(min(size, 2 * micro)) for name, size in rows.items()}  # a third changes nothing

            def loss(*arguments: Any) -> torch.Tensor:
                storages.moment = "forward"
                value = method.loss(*arguments)
                storages.moment = "backward"
                return value

            if method.reference is not None:
                storages.moment = "forward"
                batches["forget"] = referred(model, batches["forget"], method)
            model.train()
            with (
                method.alone(model),
                lean(model, dataclasses.replace(settings, attention="auto")) as tied,
                steps.attached(tied),
            ):
                method.gradient(model, loss, batches, dict.fromkeys(rows, 1), settings.micro_batch_size)
            batches.clear()
            storages.moment = "step"
            steps.step()
            storages.moment = "evaluation"
            self._evaluate(model)

    def _distillation(
        self, student: PreTrainedModel, how: TeacherConfig, dtype: torch.dtype, matched: dict[str, Any] | None
    ) -> Method:
        model = meta_model(self.config).eval()
        if how.kind == "resident":
            model.to(dtype)
        share = {"resident": 1.0, "streamed": self._streamed(model)}.get(how.kind, 0.0)
        self.storages.hold(model.parameters(), "teacher", share)
        head = head_of(model)
        if how.kind == "cached":
            self.storages.hold([head.weight], "teacher")
        known, match = ModelTeacher(model), None
        if matched:
            match = matching(student, known, matched["hidden_weight"], matched["hidden_layers"])
            known = ModelTeacher(model, match.layers)

        def targets(batch: Batch) -> HiddenTargets | TopTargets:
            shape = (len(batch.input_ids), batch.input_ids.shape[1] - 1)
            if how.kind == "cached":
                packed = torch.empty(*shape, head.weight.shape[1], dtype=getattr(torch, how.dtype), device="meta")
                return HiddenTargets(packed.clone().to(head.weight.dtype), head)
            if how.kind == "topk":
                packed = [torch.empty(*shape, how.k, dtype=dtype, device="meta") for dtype in (torch.int32, torch.float32)]
                return TopTargets(*(tensor.clone() for tensor in packed))
            return known.targets(batch)

        return Method(
            lambda student, batches, counted: distillation(
                student, targets(batches["text"]), batches["text"], counted["text"], match
            )
        )

    def _streamed(self, model: PreTrainedModel) -> float:
        """The share of a streamed teacher's weights that is there at once: one layer, on a GPU two, and what is in no layer."""
        layers = [_bytes(layer.parameters()) for layer in find_layers(model)]
        whole = _bytes(model.parameters())
        return (whole - sum(layers) + max(layers) * (2 if self.device == "cuda" else 1)) / whole

    def _cache(self, how: TeacherConfig, model: PreTrainedModel, share: float) -> None:
        storages = self.storages
        storages.hold(model.eval().parameters(), "teacher", share)
        with storages, torch.no_grad():
            storages.moment = "forward"
            inputs, _, _ = self._batch(how.batch_size or BATCH_SIZE).shifted()
            hidden, head = hidden_states(model, *inputs).flatten(0, 1), head_of(model)
            if how.kind == "topk":
                storages.touch("workspace", min(LOGIT_BYTES, 4 * len(hidden) * head.weight.shape[0]) * 3)
            else:
                ops.linear_lse(hidden, head.weight, **head.options())
            del hidden
            storages.moment = "evaluation"
            self._evaluate(model)

    @torch.no_grad()
    def _evaluate(self, model: PreTrainedModel) -> None:
        model.eval()
        scored = self.scored
        ids = torch.empty(scored.rows, scored.length, dtype=torch.int64, device="meta")
        if scored.choices:
            letters = torch.empty(scored.rows, scored.choices, dtype=torch.int64, device="meta")
            letter_logits(model, ids, letters[:, 0], letters)
        elif scored.answers:  # at most every position is one of an answer
            most_likely(hidden_states(model, ids[:, :-1]).flatten(0, 1), head_of(model))
        else:
            token_nats(model, ids, None, torch.ones_like(ids, dtype=torch.bool))

    def _batch(self, rows: int) -> Batch:
        ids = torch.empty(rows, self.length, dtype=torch.int64, device="meta")
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool))


class _Steps:
    """What :class:`undo_core.training.optimizers.Updater` holds and takes, without contents."""

    def __init__(self, storages: Storages, parameters: list[nn.Parameter], settings: TrainConfig, device: str) -> None:
        self.storages, self.parameters, self.settings = storages, parameters, settings
        self.remote = settings.optimizer == "adamw-offload" and device == "cuda"
        self.mastered = settings.precision == "bfloat16-master"
        self.masters: dict[int, torch.Tensor] = {}  # gradients of masters
        self.temporaries = {}  # of an update, by the number of elements; here, where nothing else counts them
        for p in parameters:
            dtype = torch.float32 if self.mastered else p.dtype
            self.temporaries[p.numel()] = _update_bytes(p.numel(), dtype, settings.optimizer, settings.precision, device)
        storages.now["optimizer"] += sum(_state_bytes(p, settings, device) for p in parameters)

    @contextlib.contextmanager
    def attached(self, tied: TiedEmbedding | None) -> Iterator[None]:
        hooks = []
        for parameter in self.parameters:
            late = tied is not None and parameter is tied.weight
            register = tied.on_gradient if late else parameter.register_post_accumulate_grad_hook
            hooks.append(register(self._receive))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def step(self) -> None:
        """The optimizer's step over all gradients, which are then freed."""
        if not self.settings.step_in_backward and not self.remote:
            self.storages.touch("optimizer", max(map(self._temporary, self.parameters)))
        self.masters.clear()
        for parameter in self.parameters:
            parameter.grad = None

    def _receive(self, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        if self.mastered or self.remote:
            parameter.grad = None
        if self.mastered and not self.remote and id(parameter) not in self.masters:
            self.masters[id(parameter)] = torch.empty_like(gradient, dtype=torch.float32)
            gradient = self.masters[id(parameter)]
        if not self.remote:
            self.storages.hold([gradient], "gradients")
        if self.settings.step_in_backward:
            self.storages.touch("optimizer", 0 if self.remote else self._temporary(parameter))
            self.masters.clear()
            parameter.grad = None

    def _temporary(self, parameter: nn.Parameter) -> int:
        return self.temporaries[parameter.numel()]


@functools.cache
def _update_bytes(count: int, dtype: torch.dtype, optimizer: str, precision: str, device: str) -> int:
    """What an optimizer's update of a tensor of ``count`` elements takes beside weight, gradient and state."""
    if optimizer in QUANTISED:
        if device == "cuda":  # compiled: the update stays in registers
            return 0
    elif optimizer in ("sgd", "adafactor"):  # a gradient with the weight's decay, or the update
        return count * dtype.itemsize
    elif precision != "bfloat16-stochastic":  # fused
        return 0
    # In slices on a CPU: a few of them take what all do.
    target = nn.Parameter(torch.empty(count if device == "cuda" else min(count, 4 * BLOCK_CPU), dtype=dtype, device="meta"))
    target.grad = torch.empty_like(target)
    storages = Storages(("optimizer",))
    storages.kind = "optimizer"
    updater = optimizer_of([target], TrainConfig(optimizer=optimizer, precision=precision), device)
    for storages.moment in ("first", "second"):
        before = storages.now["optimizer"]  # its state is there before the second
        with storages:
            updater.step()
    return storages.peaks["second"]["optimizer"] - before


def _teacher_dtype(settings: TrainConfig, stored: torch.dtype) -> torch.dtype:
    """Of a resident teacher: a student in 16 bits learns from one in 16 bits, where its folder has it so."""
    return torch.float32 if settings.precision == "float32" else stored


def _state_bytes(parameter: nn.Parameter, settings: TrainConfig, device: str) -> int:
    """Of a parameter's master and moments, where they are on the device."""
    if settings.optimizer in QUANTISED:
        block = QUANTISED[settings.optimizer][1]
        if parameter.numel() < 4096 or parameter.numel() % block:
            settings = dataclasses.replace(settings, optimizer="adamw")
    return int(bytes_per_parameter(settings, device)["optimizer"] * parameter.numel())


def _pretraining(model: PreTrainedModel) -> Method:
    return Method(lambda model, batches, counted: cross_entropy(model, batches["text"], counted["text"]))


def _attack(model: PreTrainedModel, config: AttackConfig) -> Method:
    return Method(mixed_cross_entropy, insert(model, config.lora, 0)[1] if config.kind == "lora" else None)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
