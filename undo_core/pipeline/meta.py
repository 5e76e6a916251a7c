"""The meta device for a stage: predicts its memory, by parts, before anything runs.

The stage's own loss runs forward and backward on the meta device while live storages are counted. What autograd saves, temporaries and
gradients are therefore those of the code that will run, for any architecture. Arithmetic adds what is no tensor there: the optimizer's
state, the files that weights are read from, and the process. A step's temporaries are counted in the optimizer's own code. The peak is
the largest of a few moments: loading; forward and backward of a micro-batch, with the head's gradient between them; the optimizer's
step; evaluation.

On a CPU the tests compare the prediction with the resident size of a process. For a GPU it uses the same arithmetic for what the
allocator hands out and has not been compared with measurements: it assumes fused attention for every kernel but eager, and no
fragmentation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from undo_core.evaluation.metrics import letter_logits, most_likely, token_nats
from undo_core.models import head_of, hidden_states, set_attention, skeleton
from undo_core.pipeline.needs import PARTS, Memory
from undo_core.pipeline.storages import FUSED, Storages
from undo_core.training import Batch, TrainConfig
from undo_core.training.embedding import TiedEmbedding
from undo_core.training.lean import lean
from undo_core.training.optimizers import BLOCK_CPU, QUANTISED, bytes_per_parameter, optimizer_of
from undo_core.training.precision import convert_, weight_dtype
from undo_core.unlearning import Method, referred
from undo_core.unlearning.activations import find_layers


def meta_model(config: PreTrainedConfig, attention: str = "auto") -> PreTrainedModel:
    """The model of a configuration without contents, float32, with an attention kernel as in :class:`TrainConfig`."""
    model = skeleton(config)
    if attention in ("eager", "sdpa"):
        set_attention(model, attention)  # refuses what the model cannot have
    if attention not in ("auto", "eager") or model.config._attn_implementation != "eager":
        model.set_attn_implementation(FUSED)
    return model


@dataclass(frozen=True)
class Scored:
    """The rows of an evaluation's forward pass, their length, and what of them is scored."""

    rows: int
    length: int
    answers: bool
    choices: int


class Meta:
    """The meta device for one stage: its model without contents, and a count of the storages that its computation makes.

    Attributes:
        device: that the prediction is for, ``"cuda"`` or ``"cpu"``.
        stored: dtype of the weights that the stage reads.
    """

    def __init__(
        self, config: PreTrainedConfig, length: int, scored: Scored, device: str, stored: torch.dtype = torch.float32
    ) -> None:
        self.device, self.stored = device, stored
        self._config, self._length, self._scored = config, length, scored
        self._storages = Storages(PARTS)

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Number of elements of each parameter."""
        return [parameter.numel() for parameter in self.model().parameters()]

    @property
    def elements(self) -> int:
        """Number of elements of all parameters."""
        return sum(self.sizes)

    @property
    def largest(self) -> int:
        """Number of elements of the largest parameter."""
        return max(self.sizes)

    @property
    def mapped(self) -> int:
        """Bytes of an element in the pages of a file that is read; 0 for a GPU, where those are the host's."""
        return 0 if self.device == "cuda" else self.stored.itemsize

    def reading(self, dtype: torch.dtype) -> int:
        """Bytes beside the weights while they are read in ``dtype``: the file, and a tensor that is converted."""
        return self.mapped * self.elements + (self.mapped and dtype != self.stored) * dtype.itemsize * self.largest

    def model(self, attention: str = "auto") -> PreTrainedModel:
        """The model, float32."""
        return meta_model(self._config, attention)

    def batch(self, rows: int) -> Batch:
        """Token rows."""
        ids = torch.empty(rows, self._length, dtype=torch.int64, device="meta")
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool))

    def hold(self, tensors: Iterable[torch.Tensor], part: str, share: float = 1.0) -> None:
        """Count tensors as a part of the memory from now on, or a share of their bytes."""
        self._storages.hold(tensors, part, share)

    def touch(self, part: str, size: float) -> None:
        """Count memory that is taken and given back at once."""
        self._storages.touch(part, size)

    @contextlib.contextmanager
    def counted(self, moment: str) -> Iterator[None]:
        """Count what the block makes as activations of ``moment``."""
        with self._storages:
            self._storages.kind, self._storages.moment = "activations", moment
            yield

    def peaks(self) -> list[Memory]:
        """The parts at the largest sum of each moment that was counted."""
        return [Memory(moment, **parts) for moment, parts in self._storages.peaks.items() if moment]

    def streamed_share(self, model: PreTrainedModel) -> float:
        """Share of a streamed model's weights that is there at once: one layer, on a GPU two, and what is in no layer."""
        layers = [_bytes(layer.parameters()) for layer in find_layers(model)]
        whole = _bytes(model.parameters())
        return (whole - sum(layers) + max(layers) * (2 if self.device == "cuda" else 1)) / whole

    def trained_dtype(self, train: TrainConfig) -> torch.dtype:
        """Dtype in which the weights are loaded to be trained."""
        keeps = train.precision == "bfloat16-master" and self.stored != torch.bfloat16
        return torch.float32 if keeps else weight_dtype(train.precision)

    def training(
        self, train: TrainConfig, sources: Iterable[str] | Mapping[str, int], method_of: Callable[[PreTrainedModel], Method]
    ) -> list[Memory]:
        """Loading, forward, backward, step and evaluation, from the second step on: the optimizer's state is there.

        Args:
            train: how the stage trains.
            sources: names of its sources, or their numbers of rows in a step; the batch size where there are none.
            method_of: gives the loss, and what is trained, for the model.
        """
        dtype = self.trained_dtype(train)
        loading = Memory("loading", weights=dtype.itemsize * self.elements + self.reading(dtype))
        storages = self._storages
        model = self.model(train.attention)
        convert_(model, train.precision)
        storages.hold(model.parameters(), "weights")
        storages.hold(model.buffers(), "weights")
        with storages:
            storages.kind = "weights"
            method = method_of(model)
            convert_(model, train.precision)  # what the method added
            storages.kind = "activations"
        trained = list(model.parameters()) if method.parameters is None else method.parameters
        steps = _Steps(storages, trained, train, self.device)
        with storages:
            micro = train.micro_batch_size or train.batch_size
            rows = sources if isinstance(sources, Mapping) else dict.fromkeys(sources, train.batch_size)
            batches = {name: self.batch(min(size, 2 * micro)) for name, size in rows.items()}  # a third changes nothing

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
                lean(model, dataclasses.replace(train, attention="auto")) as tied,
                steps.attached(tied),
            ):
                method.gradient(model, loss, batches, dict.fromkeys(rows, 1), train.micro_batch_size)
            batches.clear()
            storages.moment = "step"
            steps.step()
            self.evaluate(model)
        return [loading, *self.peaks()]

    @torch.no_grad()
    def evaluate(self, model: PreTrainedModel) -> None:
        """Count an evaluation of the model; inside :meth:`counted`."""
        self._storages.moment = "evaluation"
        model.eval()
        scored = self._scored
        ids = torch.empty(scored.rows, scored.length, dtype=torch.int64, device="meta")
        if scored.choices:
            letters = torch.empty(scored.rows, scored.choices, dtype=torch.int64, device="meta")
            letter_logits(model, ids, letters[:, 0], letters)
        elif scored.answers:  # at most every position is one of an answer
            most_likely(hidden_states(model, ids[:, :-1]).flatten(0, 1), head_of(model))
        else:
            token_nats(model, ids, None, torch.ones_like(ids, dtype=torch.bool))


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


def _state_bytes(parameter: nn.Parameter, settings: TrainConfig, device: str) -> int:
    """Of a parameter's master and moments, where they are on the device."""
    if settings.optimizer in QUANTISED:
        block = QUANTISED[settings.optimizer][1]
        if parameter.numel() < 4096 or parameter.numel() % block:
            settings = dataclasses.replace(settings, optimizer="adamw")
    return int(bytes_per_parameter(settings, device)["optimizer"] * parameter.numel())


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
