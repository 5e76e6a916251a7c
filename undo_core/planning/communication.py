"""Predicts the bytes that a training step sends between ranks.

``B`` is the size of a collective's whole tensor on one rank: the result of an all-gather, the input of a reduce-scatter, the tensor
of an all-reduce. With ``N`` ranks, ring algorithms send from each rank

    all-gather, reduce-scatter:      B * (N - 1) / N
    all-reduce:                  2 * B * (N - 1) / N

Each forward and backward pass of a model under FSDP2 (``fully_shard``) calls, for each unit of ``P`` elements, in which the first
dimension of each parameter is padded to a multiple of ``N``:

    forward:   all-gather of P elements in the dtype of the computation
    backward:  the same again, unless the unit stays gathered after the forward, as the root unit does by default;
               reduce-scatter of the gradients of the trained parameters in the dtype of the reduction

A frozen teacher pays for its forward alone; this assumes that its root unit is resharded after it. Activation checkpointing adds
nothing: the backward has gathered a unit before it computes the unit's forward again.

A call of a loss on a vocabulary-parallel head all-reduces what :func:`undo_kernels.vocabulary_shard.bytes_exchanged` lists: a maximum
and a few sums for each token, the loss, and the gradient of the hidden states; nothing whose size depends on the vocabulary. Scalars of
a step, such as the count of tokens and the norm of the gradient, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from undo_kernels.vocabulary_shard import bytes_exchanged

from undo_core.pipeline.memory.planned_sharing import Exchanges
from undo_core.pipeline.memory.shards import Traffic

REDUCED = 4  # bytes of an element of the gradients, which are reduced in float32
FACTORS = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}  # passes of a ring over its ranks


@dataclass(frozen=True)
class Collective:
    """Equal calls of a collective operation.

    Attributes:
        kind: all_gather, reduce_scatter or all_reduce.
        what: what travels.
        payload: bytes of the whole tensor, as one rank sees it.
        ranks: number of ranks that take part.
        calls: number of calls in a step.
    """

    kind: str
    what: str
    payload: int
    ranks: int
    calls: int = 1

    @property
    def wire(self) -> float:
        """Bytes that each rank sends in all calls."""
        return FACTORS[self.kind] * self.calls * self.payload * (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class Unit:
    """The parameters of one module to which ``fully_shard`` was applied.

    Attributes:
        name: name of the module; empty for the root.
        trained: shapes of the trained parameters, as one rank would hold them without sharding.
        frozen: shapes of the others.
        gathered: whether the unit stays gathered between forward and backward.
    """

    name: str
    trained: tuple[tuple[int, ...], ...]
    frozen: tuple[tuple[int, ...], ...] = ()
    gathered: bool = False


def units_of(model: nn.Module, names: Iterable[str]) -> list[Unit]:
    """Returns the units that ``fully_shard`` makes of the modules ``names``, in this order, and then of the model, the root unit.

    A parameter that several modules share belongs to the first of them.
    """
    units, seen = [], set[int]()
    for name in (*names, ""):
        own = {id(one): one for one in model.get_submodule(name).parameters() if id(one) not in seen}
        seen |= set(own)
        trained, frozen = (
            tuple(tuple(one.shape) for one in own.values() if one.requires_grad == kind) for kind in (True, False)
        )
        units.append(Unit(name, trained, frozen, gathered=not name))
    return units


def fsdp_collectives(
    units: Sequence[Unit], ranks: int, *, itemsize: int, reduce_itemsize: int = 4, passes: int = 1, trained: bool = True
) -> list[Collective]:
    """Returns the collectives of the passes of a model whose units are sharded over ``ranks``.

    Args:
        units: the units of the model.
        ranks: number of ranks over which each parameter is divided.
        itemsize: bytes of an element in the dtype of the computation, in which parameters are gathered.
        reduce_itemsize: bytes of an element of the gradients in the reduce-scatter.
        passes: number of forward passes; with ``trained``, each has a backward pass of its own.
        trained: whether the passes are backward too; without, as for a teacher, only parameters travel.
    """
    found = []
    for unit in units:
        elements = padded(unit.trained + unit.frozen, ranks)
        gathers = passes * (1 if unit.gathered or not trained else 2)
        found.append(Collective("all_gather", f"{unit.name or 'root'}: parameters", elements * itemsize, ranks, gathers))
        if trained and unit.trained:
            payload = padded(unit.trained, ranks) * reduce_itemsize
            found.append(Collective("reduce_scatter", f"{unit.name or 'root'}: gradients", payload, ranks, passes))
    return found


def head_collectives(target: str, tokens: int, width: int, ranks: int, *, calls: int = 1, **given: int) -> list[Collective]:
    """Returns the collectives of a loss on a head whose vocabulary is divided over ``ranks``.

    Args:
        target: forward, reverse, jsd, own, uniform or bucket, as :mod:`undo_kernels.problem` names the losses.
        tokens: counted tokens of a call; every rank has all of them.
        width: width of the student's hidden states.
        ranks: number of ranks that hold a slice of the vocabulary.
        calls: number of calls in a step.
        given: other arguments of :func:`undo_kernels.vocabulary_shard.bytes_exchanged`.
    """
    parts = bytes_exchanged(target, tokens, width, ranks, **given)
    return [Collective("all_reduce", f"head: {what}", payload, ranks, calls) for what, payload in parts.items()]


def stage_collectives(traffic: Iterable[Traffic], ranks: int) -> list[Collective]:
    """Returns the collectives of a step of a stage, as :class:`undo_core.pipeline.memory.predictor.Predictor` has counted its passes."""
    found = []
    for unit in traffic:
        over, gathers, reductions = ranks // unit.tensor, round(unit.gathers), round(unit.reductions)
        found.append(
            Collective("all_gather", f"{unit.name}: parameters", padded(unit.shapes, over) * unit.itemsize, over, gathers)
        )
        if reductions:
            payload = padded(unit.trained, over) * REDUCED
            found.append(Collective("reduce_scatter", f"{unit.name}: gradients", payload, over, reductions))
    return found


def exchange_collectives(exchanges: Exchanges, tensor: int) -> list[Collective]:
    """Returns the collectives of a step of a stage by which ``tensor`` ranks share heads, as
    :class:`undo_core.pipeline.memory.predictor.Predictor` has counted them."""
    return [Collective(kind, what, payload, tensor, round(calls)) for (kind, what, payload), calls in exchanges.items()]


def wire_bytes(collectives: Iterable[Collective]) -> float:
    """Bytes that each rank sends."""
    return sum(collective.wire for collective in collectives)


def padded(shapes: Iterable[tuple[int, ...]], ranks: int) -> int:
    """Number of elements of parameters whose first dimension is padded to a multiple of ``ranks``."""
    return sum(math.ceil(shape[0] / ranks) * ranks * math.prod(shape[1:]) for shape in shapes)
