"""Predicts the memory of a stage, by parts, on the meta device before anything runs.

The stage's own loss runs forward and backward on the meta device while live storages are counted. Saved activations,
temporaries and gradients are therefore those of the code that will run, for any architecture. Memory that is not a tensor on
the meta device is calculated: the optimizer's states, the files that weights are read from, and the process. The temporaries of
a step are counted in the optimizer's own code. The peak is the largest of a few phases: loading; forward and backward of a
micro-batch, with the head's gradient between them; the optimizer's step; evaluation.

On a CPU the tests compare the prediction with the resident size of a process. For a GPU the same calculation predicts the
memory that the allocator hands out. That has not been compared with measurements; it assumes fused attention for every kernel
except eager, and no fragmentation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from undo_core.distributed.sharding import units_of
from undo_core.evaluation.metrics import letter_logits, most_likely, token_nats
from undo_core.models import head_of, hidden_states, set_attention, skeleton
from undo_core.models.layers import find_layers
from undo_core.pipeline.memory.live_tensors import FUSED, LiveTensors
from undo_core.pipeline.memory.planned_sharing import PlannedSharing
from undo_core.pipeline.memory.shards import Shards, Traffic, part, resident_share
from undo_core.pipeline.needs import PARTS, Memory
from undo_core.training import Batch, TrainConfig
from undo_core.training.embedding import TiedEmbedding
from undo_core.training.memory_savers import lean
from undo_core.training.optimizers import BLOCK_CPU, QUANTISED, bytes_per_parameter, optimizer_of
from undo_core.training.precision import convert_, weight_dtype
from undo_core.unlearning import Method, referred


def meta_model(config: PreTrainedConfig, attention: str = "auto") -> PreTrainedModel:
    """Returns a configuration's model on the meta device, in float32; ``attention`` is as in :class:`TrainConfig`."""
    model = skeleton(config)
    if attention in ("eager", "sdpa"):
        set_attention(model, attention)  # raises if the model does not support it
    if attention not in ("auto", "eager") or model.config._attn_implementation != "eager":
        model.set_attn_implementation(FUSED)
    return model


@dataclass(frozen=True)
class Scored:
    """The batch of an evaluation's forward pass and how it is scored.

    Attributes:
        sequences: sequences in the batch.
        length: tokens in a sequence.
        answers: whether answers are scored; otherwise cross-entropy is.
        choices: letters that are compared for a multiple-choice question; 0 if there are no questions.
    """

    sequences: int
    length: int
    answers: bool
    choices: int


class Meta:
    """Runs a stage's computation on the meta device and counts the tensors that it allocates.

    Attributes:
        device: device that the prediction is for, ``"cuda"`` or ``"cpu"``.
        stored: dtype of the weights that the stage reads.
        ranks: number of ranks that run the stage together; the memory is that of one of them.
        traffic: what travels between the ranks in a step of training.
        sharing: stands for the ranks that share a head, and counts what they exchange in a step of training.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        length: int,
        scored: Scored,
        device: str,
        stored: torch.dtype = torch.float32,
        ranks: int = 1,
        tensor: int = 1,
    ) -> None:
        self.device, self.stored, self.ranks = device, stored, ranks
        self.sharing = PlannedSharing(tensor)
        self.traffic: list[Traffic] = []
        self._unsharded: set[int] = set()
        self._config, self.length, self._scored = config, length, scored
        self._live = LiveTensors(PARTS, self.sharing.called)

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Number of elements of each parameter."""
        return [parameter.numel() for parameter in meta_model(self._config).parameters()]

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
        """Bytes per element of a file that is mapped into memory; 0 for a GPU, because its pages are in host memory."""
        return 0 if self.device == "cuda" else self.stored.itemsize

    def reading(self, dtype: torch.dtype) -> int:
        """Bytes in addition to the weights while they are read as ``dtype``: the file, and one tensor during conversion."""
        return self.mapped * self.elements + (self.mapped and dtype != self.stored) * dtype.itemsize * self.largest

    def model(self, attention: str = "auto") -> PreTrainedModel:
        """The model on the meta device, in float32; where ranks share heads, with the part of its head that one of them holds."""
        return self.sharing.divided(meta_model(self._config, attention))

    def batch(self, sequences: int) -> Batch:
        """A batch of ``sequences`` sequences on the meta device."""
        ids = torch.empty(sequences, self.length, dtype=torch.int64, device="meta")
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool))

    def hold(self, tensors: Iterable[torch.Tensor], part: str, share: float = 1.0) -> None:
        """Counts tensors, or a share of their bytes, as ``part`` of the memory as long as they live."""
        self._live.hold(tensors, part, share)

    def touch(self, part: str, size: float) -> None:
        """Counts memory that is allocated and freed again at once."""
        self._live.touch(part, size)

    @contextlib.contextmanager
    def counted(self, phase: str) -> Iterator[None]:
        """Counts tensors that the block allocates as activations of ``phase``."""
        with self._live:
            self._live.part, self._live.phase = "activations", phase
            yield

    def peaks(self) -> list[Memory]:
        """The memory by parts at the peak of each phase that was counted."""
        return [Memory(phase, **parts) for phase, parts in self._live.peaks.items() if phase]

    def hold_teacher(self, model: PreTrainedModel, share: float | None = None) -> None:
        """Counts a teacher's weights: a ``share`` of them, or those of a resident teacher, which is sharded over the ranks."""
        if share is not None:
            self._unsharded |= {id(layer) for layer in units_of(model)}
        self.hold(
            model.parameters(), "teacher", resident_share(model, self.ranks, self.sharing.ranks) if share is None else share
        )

    def streamed_share(self, model: PreTrainedModel) -> float:
        """Share of a streamed model's weights in memory at once: all outside the layers, and one layer (two on a GPU)."""
        layers = [_bytes(layer.parameters()) for layer in find_layers(model)]
        whole = _bytes(model.parameters())
        return (whole - sum(layers) + max(layers) * (2 if self.device == "cuda" else 1)) / whole

    def trained_dtype(self, train: TrainConfig) -> torch.dtype:
        """Dtype in which the weights are loaded for training."""
        keeps = train.precision == "bfloat16-master" and self.stored != torch.bfloat16
        return torch.float32 if keeps else weight_dtype(train.precision)

    def training(
        self, train: TrainConfig, sources: Iterable[str] | Mapping[str, int], method_of: Callable[[PreTrainedModel], Method]
    ) -> list[Memory]:
        """Memory of loading, forward, backward, step and evaluation, as from the second step on, when optimizer states exist.

        Args:
            train: training settings of the stage.
            sources: names of its sources, each with ``train.batch_size`` sequences in a step; or a mapping from names to
                numbers of sequences.
            method_of: returns the loss and the trained parameters for a model.
        """
        dtype = self.trained_dtype(train)
        loading = Memory("loading", weights=dtype.itemsize * self.elements + self.reading(dtype))
        live = self._live
        model = self.model(train.attention)
        convert_(model, train.precision)
        if self.ranks == 1:
            live.hold(model.parameters(), "weights")
        live.hold(model.buffers(), "weights")
        with live:
            live.part = "weights"
            method = method_of(model)
            convert_(model, train.precision)  # the method may have added parameters
            live.part = "activations"
        trained = list(model.parameters()) if method.parameters is None else method.parameters
        sequences = sources if isinstance(sources, Mapping) else dict.fromkeys(sources, train.batch_size)
        micro, shards, more = train.micro_batch_size or max(sequences.values()), None, 1.0
        if self.ranks > 1:
            shards = Shards(live, model, trained, self.ranks, train.precision == "bfloat16-master", self.sharing.ranks)
            shards.apart = self._unsharded
            more = max(math.ceil(size / micro) / math.ceil(min(size, 2 * micro) / micro) for size in sequences.values())
            sequences = {name: _shared(size, micro, self.ranks) for name, size in sequences.items()}
            micro = part(micro, self.ranks)
        steps = _Steps(live, trained, train, self.device, shards)
        with live:
            # Two micro-batches are enough: a third does not raise the peak.
            batches = {name: self.batch(min(size, 2 * micro)) for name, size in sequences.items()}

            def loss(*arguments: Any) -> torch.Tensor:
                live.phase = "forward"
                if shards is not None:
                    shards.forward(more)
                value = method.loss(*arguments)
                live.phase = "backward"
                return value

            if method.reference is not None:
                live.phase = "forward"
                batches["forget"] = referred(model, batches["forget"], method)
            model.train()
            with (
                method.alone(model),
                lean(model, dataclasses.replace(train, attention="auto"), self.ranks) as tied,
                steps.attached(tied),
                contextlib.nullcontext() if shards is None else shards.counting(more),
                self.sharing.counting(more),
            ):
                size = train.micro_batch_size if shards is None else micro
                method.gradient(model, loss, batches, dict.fromkeys(sequences, 1), size)
            batches.clear()
            live.phase = "step"
            steps.step()
            self.evaluate(model)
        if shards is not None:
            self.traffic = [unit for unit in shards.traffic.values() if unit.gathers]
        return [loading, *self.peaks()]

    @torch.no_grad()
    def evaluate(self, model: PreTrainedModel) -> None:
        """Counts an evaluation of the model; call it inside :meth:`counted`."""
        self._live.phase = "evaluation"
        model.eval()
        scored = self._scored
        ids = torch.empty(scored.sequences, scored.length, dtype=torch.int64, device="meta")
        if scored.choices:
            letters = torch.empty(scored.sequences, scored.choices, dtype=torch.int64, device="meta")
            letter_logits(model, ids, letters[:, 0], letters)
        elif scored.answers:  # an upper bound: every position belongs to an answer
            most_likely(hidden_states(model, ids[:, :-1]).flatten(0, 1), head_of(model))
        else:
            token_nats(model, ids, None, torch.ones_like(ids, dtype=torch.bool))


class _Steps:
    """Counts the memory of :class:`undo_core.training.optimizers.Updater`: states, gradients, masters and temporaries."""

    def __init__(
        self,
        live: LiveTensors,
        parameters: list[nn.Parameter],
        settings: TrainConfig,
        device: str,
        shards: Shards | None = None,
    ) -> None:
        self.live, self.parameters, self.settings, self.shards = live, parameters, settings, shards
        self.part_of = (lambda _: 1) if shards is None else shards.divisor
        self.remote = settings.optimizer == "adamw-offload" and device == "cuda"
        self.mastered = settings.precision == "bfloat16-master"
        self.masters: dict[int, torch.Tensor] = {}  # float32 gradients of the masters, by the parameter's id
        self.temporaries = {}  # bytes of an update by a parameter's elements and parts; computed here, outside any other count
        for p in parameters:
            dtype = torch.float32 if self.mastered else p.dtype
            own = math.ceil(p.numel() / self.part_of(p))
            self.temporaries[p.numel(), self.part_of(p)] = _update_bytes(
                own, dtype, settings.optimizer, settings.precision, device
            )
        live.now["optimizer"] += sum(_state_bytes(p, settings, device) // self.part_of(p) for p in parameters)

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
        """Counts the optimizer's step over all gradients, then frees them."""
        if not self.settings.step_in_backward and not self.remote:
            self.live.touch("optimizer", max(map(self._temporary, self.parameters)))
        if self.shards is not None:
            self.shards.stepped()
        self.masters.clear()
        for parameter in self.parameters:
            parameter.grad = None

    def _receive(self, parameter: nn.Parameter) -> None:
        if self.shards is not None:
            self.shards.receive(parameter)
            return
        gradient = parameter.grad
        if self.mastered or self.remote:
            parameter.grad = None
        if self.mastered and not self.remote and id(parameter) not in self.masters:
            self.masters[id(parameter)] = torch.empty_like(gradient, dtype=torch.float32)
            gradient = self.masters[id(parameter)]
        if not self.remote:
            self.live.hold([gradient], "gradients")
        if self.settings.step_in_backward:
            self.live.touch("optimizer", 0 if self.remote else self._temporary(parameter))
            self.masters.clear()
            parameter.grad = None

    def _temporary(self, parameter: nn.Parameter) -> int:
        return self.temporaries[parameter.numel(), self.part_of(parameter)]


@functools.cache
def _update_bytes(count: int, dtype: torch.dtype, optimizer: str, precision: str, device: str) -> int:
    """Bytes of temporaries that an optimizer's update of a tensor of ``count`` elements allocates."""
    if optimizer in QUANTISED:
        if device == "cuda":  # compiled: the update stays in registers
            return 0
    elif optimizer in ("sgd", "adafactor"):  # sgd: the gradient plus weight decay; adafactor: the update
        return count * dtype.itemsize
    elif precision != "bfloat16-stochastic":  # fused
        return 0
    # On a CPU the update runs in slices, so that a tensor of a few slices has the same peak as a larger one.
    target = nn.Parameter(torch.empty(count if device == "cuda" else min(count, 4 * BLOCK_CPU), dtype=dtype, device="meta"))
    target.grad = torch.empty_like(target)
    live = LiveTensors(("optimizer",))
    live.part = "optimizer"
    updater = optimizer_of([target], TrainConfig(optimizer=optimizer, precision=precision), device)
    for live.phase in ("first", "second"):
        before = live.now["optimizer"]  # the first step creates the states; the second is measured
        with live:
            updater.step()
    return live.peaks["second"]["optimizer"] - before


def _state_bytes(parameter: nn.Parameter, settings: TrainConfig, device: str) -> int:
    """Bytes of a parameter's master and moments that are kept on the device."""
    if settings.optimizer in QUANTISED:
        block = QUANTISED[settings.optimizer][1]
        if parameter.numel() < 4096 or parameter.numel() % block:
            settings = dataclasses.replace(settings, optimizer="adamw")
    return int(bytes_per_parameter(settings, device)["optimizer"] * parameter.numel())


def _shared(size: int, micro: int, ranks: int) -> int:
    """Sequences that a rank takes of a batch that is split into micro-batches."""
    return sum(part(min(micro, size - start), ranks) for start in range(0, size, micro))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
