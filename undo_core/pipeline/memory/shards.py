"""What FSDP2 holds and moves on one rank while a stage trains, counted while the stage's loss runs on the meta device.

Units are those of :func:`undo_core.distributed.sharding.units_of`. In the course of a micro-batch,

- the root unit is gathered once and stays whole until its gradients are reduced at the end of the backward pass;
- a layer is gathered at each of its forward calls and again in the backward pass of each call that has one; its gradients are reduced
  once. Up to three copies of a layer exist: the one that computes, the next one, and the buffer from which it is filled;
- the gradients of a unit are whole until all have come; they are then copied into a float32 buffer and reduced to a shard. The
  gathered weights of the unit are freed before that.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from undo_core.distributed.sharding import units_of
from undo_core.pipeline.memory.live_tensors import LiveTensors

LAYERS_AT_ONCE = 3


@dataclass
class Traffic:
    """How often a unit's parameters and gradients travel in a step.

    Attributes:
        name: name of the unit.
        shapes: shapes of its parameters.
        trained: shapes of the trained ones.
        itemsize: bytes of a gathered element.
        gathers: all-gathers of the parameters.
        reductions: reduce-scatters of the gradients.
        tensor: number of ranks among which the unit is divided before it is sharded over those with the same part; 1 except for heads
            that ranks share.
    """

    name: str
    shapes: list[tuple[int, ...]]
    trained: list[tuple[int, ...]]
    itemsize: int
    gathers: float = 0
    reductions: float = 0
    tensor: int = 1


class Shards:
    """Memory and traffic of a model that is sharded over ``ranks`` ranks.

    Args:
        live: what counts the memory.
        model: the trained model, on the meta device and in the dtype of the computation.
        trained: its trained parameters.
        ranks: number of ranks.
        mastered: whether the shards of trained parameters are float32 masters, which are counted with the optimizer.
        tensor: number of ranks that share a head, of which the model has one part.
    """

    def __init__(
        self, live: LiveTensors, model: nn.Module, trained: list[nn.Parameter], ranks: int, mastered: bool, tensor: int = 1
    ) -> None:
        self.live, self.ranks, self.tensor = live, ranks, tensor
        layers = units_of(model)
        self.head = _shared(model, tensor)
        self._of_head = {id(p) for p in self.head}
        inside = {id(p) for layer in layers for p in layer.parameters()} | self._of_head
        self.root = [p for p in model.parameters() if id(p) not in inside]
        chosen = {id(p) for p in trained}
        self.model, self.kind = model, type(layers[0]) if layers else None
        self.apart: set[int] = set()  # layers that are not sharded, by id
        self.traffic: dict[int, Traffic] = {}
        self._backward: set[int] = set()  # layers that the backward pass of this micro-batch reaches
        self._add(id(model), "root", self.root, chosen)
        self.whole = [self.traffic[id(model)]]  # units that are gathered once in a micro-batch
        if self.head:
            self._add(id(self.head), "head", self.head, chosen)
            self.whole.append(self.traffic[id(self.head)])
            self.whole[1].tensor = tensor
        for index, layer in enumerate(layers):
            self._add(id(layer), f"layer {index}", list(layer.parameters()), chosen)
        for parameter in model.parameters():
            live.hold([parameter], "weights", 0.0 if mastered and id(parameter) in chosen else 1 / self.divisor(parameter))
        live.now["weights"] += _bytes(self.root + self.head) + LAYERS_AT_ONCE * max(
            (_bytes(layer.parameters()) for layer in layers), default=0
        )
        units = [self.root, self.head, *(list(layer.parameters()) for layer in layers)]
        self._unit_of = {id(p): number for number, unit in enumerate(units) for p in unit}
        # Weights that are freed when a unit's gradients are reduced. The next layers stay gathered while one is reduced.
        self._freed = [_bytes(self.root), _bytes(self.head), *(0 for _ in layers)]
        self._missing = [{id(p) for p in unit} & chosen for unit in units]
        self._came = [list[nn.Parameter]() for _ in units]
        self._reduced: set[int] = set()
        self._shard = 4 if mastered else None

    @contextlib.contextmanager
    def counting(self, micro_batches: float) -> Iterator[None]:
        """Counts the calls of layers inside the block as those of a step; ``micro_batches`` is by how many more a step has."""
        layers = {id(layer): self.traffic.get(id(layer)) for layer in units_of(self.model)}

        def count(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if type(layer) is not self.kind or id(layer) in self.apart or self.live.phase == "backward":
                return  # in the backward pass a checkpointed layer runs again, which moves nothing
            if id(layer) not in layers:  # of a copy of the model
                own = list(layer.parameters())
                self._add(id(layer), "original", own, set())
                layers[id(layer)] = self.traffic[id(layer)]
            unit, first = self.traffic[id(layer)], output[0] if isinstance(output, tuple) else output
            unit.gathers += micro_batches
            if not first.requires_grad:
                return
            again = id(layer) in self._backward
            # A layer whose input needs no gradient stays whole until the backward pass ends.
            reached = any(isinstance(one, torch.Tensor) and one.requires_grad for one in inputs)
            unit.gathers += micro_batches * (reached or not again)
            unit.reductions += micro_batches * (bool(unit.trained) and not again)
            self._backward.add(id(layer))

        hook = register_module_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()

    def forward(self, micro_batches: float) -> None:
        """Counts the gather of the root unit and the head at the start of a micro-batch, and the reduction at its end."""
        self._backward.clear()
        for unit in self.whole:
            unit.gathers += micro_batches
            unit.reductions += micro_batches * bool(unit.trained)
        self.live.touch("weights", max(_bytes(self.root), _bytes(self.head)))  # the buffer from which a unit is filled

    def receive(self, parameter: nn.Parameter) -> None:
        """Counts a gradient that the backward pass has completed; the last one of a unit has all of them reduced."""
        number = self._unit_of[id(parameter)]
        if id(parameter) not in self._reduced:
            self.live.hold([parameter.grad], "gradients")
        self._came[number].append(parameter)
        if len(self._came[number]) < len(self._missing[number]):
            return
        came, self._came[number] = self._came[number], []
        elements, again = sum(p.numel() for p in came), sum(p.nbytes for p in came if id(p) in self._reduced)
        share = self.divisor(parameter)
        self.live.touch("gradients", again + 4 * elements + 4 * elements // share - self._freed[number])
        for own in came:  # the meta device keeps them whole; only their shards count from here on
            self.live.hold([own.grad], "gradients", (self._shard or own.itemsize) / own.itemsize / share)
            self._reduced.add(id(own))

    def divisor(self, parameter: torch.Tensor) -> int:
        """Number of ranks over which a parameter, as it is in the model, is sharded."""
        return self.ranks // self.tensor if id(parameter) in self._of_head else self.ranks

    def stepped(self) -> None:
        """Forgets the gradients, which the optimizer's step has used."""
        self._reduced.clear()

    def _add(self, key: int, name: str, parameters: list[nn.Parameter], trained: set[int]) -> None:
        shapes = [tuple(p.shape) for p in parameters]
        own = [tuple(p.shape) for p in parameters if id(p) in trained]
        itemsize = max((p.itemsize for p in parameters), default=4)
        self.traffic[key] = Traffic(name, shapes, own, itemsize)


def resident_share(model: nn.Module, ranks: int, tensor: int = 1) -> float:
    """Share of a frozen, sharded model that a rank holds: its shards, and the root unit and the head, which stay whole.

    ``tensor`` is the number of ranks that share the head; the model has the part of one of them.
    """
    if ranks == 1:
        return 1.0
    whole, layers = _bytes(model.parameters()), _bytes(p for layer in units_of(model) for p in layer.parameters())
    head = _bytes(_shared(model, tensor))
    return (layers / ranks + (whole - layers - head) * (1 + 1 / ranks) + head * (1 + tensor / ranks)) / whole


def _shared(model: Any, tensor: int) -> list[nn.Parameter]:
    """The parameters of the head, of which a rank has a part where ``tensor`` ranks share it; none if it has a whole one."""
    return list(model.get_output_embeddings().parameters()) if tensor > 1 else []


def part(size: int, ranks: int) -> int:
    """Largest part of ``size`` sequences that a rank takes."""
    return math.ceil(size / ranks)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
