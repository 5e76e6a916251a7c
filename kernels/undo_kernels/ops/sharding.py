"""Finds the elements of a full parameter that the shard on this rank holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from undo_kernels.ops import checks

Piece = tuple[torch.Tensor, int, int, int]
Intervals = list[tuple[int, int]]  # (start, length), in the order of the shard; no two of them adjacent


def local_pieces(name: str, tensor: torch.Tensor, memory: torch.Tensor | None = None) -> list[Piece]:
    """Returns ``(view, first, run, stride)`` for each piece of ``tensor`` that this process holds, as a segment of the noise takes it.

    The views share ``memory``, which is that of :func:`local_of` or a contiguous copy of it. A plain tensor is one piece. A shard of
    a ``DTensor`` is one piece if its rows lie at a regular distance in the full tensor (with one sharded dimension, or the first and
    another), else several. An empty shard, or a rank outside the mesh, has none. Uneven shards and ``_StridedShard`` (FSDP2 over
    tensor parallelism on the same dimension) are split as torch splits them, by ``torch.chunk``. Nothing is communicated.

    Raises:
        ValueError: a placement that does not determine the elements (``Partial``), shards in another order than their mesh
            dimensions, or a shard whose size differs from what its placements give.
    """
    local = local_of(tensor).detach() if memory is None else memory
    if not checks.is_dtensor(tensor):
        return [(local, 0, 0, 0)]
    dims = _intervals(name, tensor)
    shape = tuple(_length(held) for held in dims)
    if local.numel() != math.prod(shape):
        checks.fail(f"tensors[{name!r}]", f"a local shard {tuple(local.shape)}", f"{shape}, which {tensor.placements} give")
    return list(_pieces(local.view(-1), tuple(tensor.shape), dims)) if local.numel() else []


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the part of ``tensor`` that this process holds."""
    return tensor.detach().to_local() if checks.is_dtensor(tensor) else tensor


def add_over_shards(tensor: torch.Tensor, sums: torch.Tensor) -> None:
    """Adds ``sums`` of this rank's shard of ``tensor`` to those of the other ranks, in place; does nothing for a plain tensor."""
    if checks.is_dtensor(tensor):
        for dimension, placement in enumerate(tensor.placements):
            if not placement.is_replicate() and tensor.device_mesh.get_coordinate() is not None:
                torch.distributed.all_reduce(sums, group=tensor.device_mesh.get_group(dimension))


def _intervals(name: str, tensor: torch.Tensor) -> list[Intervals]:
    """Returns, for each dimension, the indices that this rank holds."""
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

    for entry in getattr(tensor._spec, "shard_order", None) or ():
        if list(entry.mesh_dims) != sorted(entry.mesh_dims):
            checks.fail(f"tensors[{name!r}]", f"a DTensor sharded in the order {entry}", "the order of the mesh dimensions")
    coordinate = tensor.device_mesh.get_coordinate()
    dims = [[(0, size)] for size in tensor.shape]
    for mesh_dim, placement in enumerate(tensor.placements):
        if not isinstance(placement, (Replicate, Shard, _StridedShard)):
            checks.fail(f"tensors[{name!r}]", f"a DTensor with placement {placement}", "Shard, _StridedShard or Replicate")
        if isinstance(placement, Replicate):
            continue
        held = dims[placement.dim]
        ranks = tensor.device_mesh.size(mesh_dim)
        strided = placement.split_factor if isinstance(placement, _StridedShard) else 1
        mine = []
        for part in range(strided):
            mine += _chunk(_chunk(held, strided, part), ranks, coordinate[mesh_dim]) if coordinate else []
        dims[placement.dim] = _joined(mine)
    return dims if coordinate else [[] for _ in dims]


def _length(held: Intervals) -> int:
    return sum(length for _, length in held)


def _chunk(held: Intervals, count: int, which: int) -> Intervals:
    """Returns one part as ``torch.chunk`` cuts it."""
    size = -(-_length(held) // count)
    return _cut(held, which * size, (which + 1) * size)


def _cut(held: Intervals, begin: int, end: int) -> Intervals:
    found, at = [], 0
    for start, length in held:
        low, high = max(begin - at, 0), min(end - at, length)
        if low < high:
            found.append((start + low, high - low))
        at += length
    return found


def _joined(held: Intervals) -> Intervals:
    found: Intervals = []
    for start, length in held:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return found


def _pieces(flat: torch.Tensor, shape: Sequence[int], dims: Sequence[Intervals]) -> Iterator[Piece]:
    cut = max((d for d, size in enumerate(shape) if dims[d] != [(0, size)]), default=None)
    if cut is None:
        yield flat, 0, 0, 0
        return
    within = math.prod(shape[cut + 1 :])
    stride = shape[cut] * within
    rows = _flat_ranges(shape[:cut], dims[:cut])
    if len(dims[cut]) > 1:  # a row holds several runs, so they do not lie at one regular distance
        rows = [(row, 1) for start, count in rows for row in range(start, start + count)]
    at = 0
    for row, count in rows:
        for start, length in dims[cut]:
            run = length * within
            yield flat[at : at + count * run], row * stride + start * within, run, stride
            at += count * run


def _flat_ranges(shape: Sequence[int], dims: Sequence[Intervals]) -> Intervals:
    """Returns the row-major flat indices of a product of intervals."""
    ranges = [(0, 1)]
    for size, held in zip(shape, dims, strict=True):
        if held == [(0, size)]:
            ranges = [(start * size, count * size) for start, count in ranges]
        else:
            rows = [row for start, count in ranges for row in range(start, start + count)]
            ranges = [(row * size + start, length) for row in rows for start, length in held]
    return ranges
