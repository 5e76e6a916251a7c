"""Heads whose vocabulary entries are divided among a few ranks, each of which has tokens of its own.

For a loss the ranks of a group gather the tokens of all of them, padded to equal numbers; each computes its part of the vocabulary, and
gets back the gradient of its own tokens. A tied embedding is the same parameter: the ranks gather their token ids, look up the rows
that they hold, and a reduce-scatter gives each rank the rows of its own tokens. Nothing of the size ``[tokens, V]`` travels, and none
exists beyond the own entries.

The gradient of the part that a rank holds is complete for the tokens of its group; FSDP2 adds up those of the groups.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from undo_kernels.ops.checks import is_dtensor

from undo_core.distributed.ranks import Layout
from undo_core.models import Head
from undo_core.models.adapters import bare
from undo_core.models.vocabulary_parallel import check_divisible

# The names of torch 2.13, and those of 2.11.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Sharing(abc.ABC):
    """The ranks that share a head, and what they exchange.

    Attributes:
        ranks: their number.
        rank: number of this one.
    """

    ranks: int
    rank: int

    @abc.abstractmethod
    def largest(self, own: int) -> int:
        """Returns the largest number that a rank passes."""

    @abc.abstractmethod
    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """Returns the ranks' tensors ``[n, ...]`` of one shape, one after another."""

    @abc.abstractmethod
    def scatter_sum(self, parts: torch.Tensor) -> torch.Tensor:
        """Returns the ``[n, ...]`` of this rank of the sum of the ranks' tensors ``[ranks * n, ...]``."""

    @abc.abstractmethod
    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces a tensor by the sum of those of the ranks; returns it."""


class Group(Sharing):
    """The ranks of a mesh of one dimension; ``control`` is their process group on CPUs, for :meth:`largest`."""

    def __init__(self, mesh: DeviceMesh, control: dist.ProcessGroup | None = None) -> None:
        self.mesh, self.control = mesh, control
        self.group = self.mesh.get_group()
        self.ranks, self.rank = self.mesh.size(), self.mesh.get_local_rank()

    def largest(self, own: int) -> int:
        found = torch.tensor(own, device="cpu")  # between CPUs, so that no rank waits for its GPU
        dist.all_reduce(found, dist.ReduceOp.MAX, self.control)
        return int(found)

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        found = own.new_empty(self.ranks * len(own), *own.shape[1:])
        _all_gather(found, own.contiguous(), self.group)
        return found

    def scatter_sum(self, parts: torch.Tensor) -> torch.Tensor:
        found = parts.new_empty(len(parts) // self.ranks, *parts.shape[1:])
        _reduce_scatter(found, parts.contiguous(), group=self.group)
        return found

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor, group=self.group)
        return tensor


class Tokens:
    """This rank's tokens among those of the ranks that share a head; every rank of the group must make one.

    Args:
        head: the head that computes them. Without ``sharing``, all methods return their argument.
        shape: leading dimensions of the tensors with a row for each token.
    """

    def __init__(self, head: Head, shape: torch.Size) -> None:
        self.sharing: Sharing | None = head.sharing
        self.shape, self.own = shape, shape.numel()
        self.most = self.own if self.sharing is None else self.sharing.largest(self.own)

    def all(self, own: Any, fill: float = 0) -> Any:
        """Returns the rows of all ranks, ``[ranks * most, ...]``, with rows of ``fill`` behind those of each rank; None for None.

        The gradient of the rows of all ranks must be whole on each; it reaches this rank's own.
        """
        if self.sharing is None or own is None:
            return own
        return _All.apply(own.reshape(self.own, *own.shape[len(self.shape) :]), self.sharing, self.most, fill)

    def mine(self, value: torch.Tensor) -> torch.Tensor:
        """Returns this rank's rows of what was computed for all, or its equal share of a sum over all.

        The ranks' gradients of their rows reach all ranks. That of a sum must be the same on all of them.
        """
        if self.sharing is None:
            return value
        if value.ndim == 0:
            return value + value.detach() * (1 / self.sharing.ranks - 1)
        return _Mine.apply(value, self.sharing, self.most, self.own).view(*self.shape, *value.shape[1:])


class _All(torch.autograd.Function):
    """Gathers the rows of all ranks; the gradient is cut to this rank's rows."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, sharing: Sharing, most: int, fill: float) -> torch.Tensor:
        ctx.first, ctx.own = sharing.rank * most, len(own)
        padded = _padded(own, most, fill)
        return sharing.gather(padded.byte()).bool() if own.dtype == torch.bool else sharing.gather(padded)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient[ctx.first : ctx.first + ctx.own], None, None, None


class _Mine(torch.autograd.Function):
    """Cuts out this rank's rows; the gradient is gathered, because every rank computes its entries for the rows of all."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sharing: Sharing, most: int, own: int) -> torch.Tensor:
        ctx.sharing, ctx.most = sharing, most
        return rows[sharing.rank * most : sharing.rank * most + own].clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.sharing.gather(_padded(gradient, ctx.most)), None, None, None


class _ScatterSum(torch.autograd.Function):
    """Adds up the ranks' rows and returns this rank's; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sharing: Sharing) -> torch.Tensor:
        ctx.sharing = sharing
        return sharing.scatter_sum(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.sharing.gather(gradient), None


def _padded(rows: torch.Tensor, most: int, fill: float = 0) -> torch.Tensor:
    if len(rows) == most:
        return rows
    return torch.cat([rows, rows.new_full((most - len(rows), *rows.shape[1:]), fill)])


def local_part(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Returns the rows of a weight or bias that are on this rank, and the index of the first; a whole tensor as it is."""
    if not is_dtensor(weight):
        return weight, 0
    mesh, rows = weight.device_mesh, weight.shape[0]
    size = -(-rows // mesh.size())  # Shard cuts like torch.chunk
    return weight.to_local(grad_placements=[Shard(0)]), min(mesh.get_local_rank() * size, rows)


def divide(model: PreTrainedModel, layout: Layout) -> list[nn.Module]:
    """Divides the head of a whole ``model``, and the embedding tied to it, among the ranks of this rank's group, in place.

    Weight and bias become ``DTensor`` parameters with placement ``Shard(0)`` over the group. The model's own forward pass up to the head
    works as before, if all ranks of the group run it; its logits are no longer available.

    Returns:
        The modules whose parameters were divided.

    Raises:
        ValueError: as :func:`undo_core.parallelize_head`, or a tied embedding with options that are not supported.
    """
    model, group = bare(model), Group(layout.mesh["tensor"], layout.control)
    output, embedding = check_shareable(model)
    whole = output.weight
    output.weight = nn.Parameter(_part(whole.data, group.mesh), whole.requires_grad)
    whole.data = whole.data.new_empty(0)
    if output.bias is not None:
        output.bias = nn.Parameter(_part(output.bias.data, group.mesh), output.bias.requires_grad)
    model._undo_head_mesh, model._undo_sharing = group.mesh, group
    if embedding is None:
        return [output]
    embedding.weight = output.weight
    look_up_in_parts(embedding, group)
    return [embedding, output]


def check_shareable(model: PreTrainedModel) -> tuple[nn.Linear, nn.Embedding | None]:
    """Checks that ranks with tokens of their own can share the head of a whole model; returns it, and the embedding tied to it, if any.

    Raises:
        ValueError: as :func:`divide`.
    """
    output, embedding = check_divisible(model)
    if embedding is not None and (embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse):
        raise ValueError(
            "model: got a tied embedding with max_norm, scale_grad_by_freq or sparse, wanted one without for parallel.tensor"
        )
    return output, embedding


def divided(head: Head, layout: Layout) -> Head:
    """Returns a whole head with this rank's part of the entries; the whole one is not kept."""
    group = Group(layout.mesh["tensor"], layout.control)
    weight, bias = (None if tensor is None else _part(tensor.detach(), group.mesh) for tensor in (head.weight, head.bias))
    return Head(weight, bias, head.scale, head.softcap, group)


def _part(whole: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    size = -(-len(whole) // mesh.size())  # Shard cuts like torch.chunk
    own = whole[mesh.get_local_rank() * size :][:size].clone()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def look_up_in_parts(embedding: nn.Embedding, sharing: Sharing) -> None:
    """Makes an embedding whose entries are divided look up its tokens in the parts of all ranks."""
    plain, padding = embedding.forward, embedding.padding_idx

    def forward(ids: torch.Tensor) -> torch.Tensor:
        own = ids.flatten()
        own = torch.where(own < 0, embedding.num_embeddings, own)  # -1 stands for no token
        every = sharing.gather(_padded(own, sharing.largest(len(own)), -1))
        local, first = local_part(embedding.weight)
        if every.device.type == "cpu" and bool((every >= embedding.num_embeddings).any()):  # the same on all ranks, as in torch
            raise IndexError(f"input_ids: got an index outside the embedding of {embedding.num_embeddings} entries")
        held = (every >= first) & (every < first + len(local))
        rows = local.new_zeros(len(every), local.shape[1])
        if len(local):
            inside = padding is not None and first <= padding < first + len(local)
            places = torch.where(held, every - first, 0)
            rows = nn.functional.embedding(places, local, padding - first if inside else None)
            rows = rows.masked_fill(~held[:, None], 0)
        rows = _ScatterSum.apply(rows, sharing)[: len(own)]
        # The module's own forward, which may scale its output, runs with these rows as its weight, and without hooks, which run outside.
        order, weight = torch.arange(len(own), device=ids.device).view(ids.shape), embedding._parameters["weight"]
        embedding.padding_idx, embedding._parameters["weight"] = None, rows
        try:
            return plain(order)
        finally:
            embedding.padding_idx, embedding._parameters["weight"] = padding, weight

    embedding.forward = forward
