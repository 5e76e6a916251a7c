"""Finds tensors that share memory, so that a write to one would change another, or another element of itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from undo_kernels.ops import checks
from undo_kernels.ops.sharding import local_of


def check_apart(argument: str, tensors: Mapping[str, torch.Tensor], changed: Collection[str] | None = None) -> None:
    """Refuses tensors that share memory with another one, or with themselves (``Tensor.expand``), and views of negated memory.

    A write to them would be applied more than once, or with the wrong sign. The caller removes second names of the same tensor first.

    Args:
        argument: name of the caller's argument, for the error.
        tensors: tensors by name.
        changed: names of the tensors that will be written; None for all.

    Raises:
        ValueError: two tensors overlap, or one is negated; it names them.
    """
    for name, tensor in tensors.items():
        if (changed is None or name in changed) and local_of(tensor).is_neg():  # the imaginary part of a conjugate is
            checks.fail(argument, f"{name!r}, a view of negated memory", "a tensor as resolve_neg() makes it")
    for first, second in overlaps(tensors):
        if changed is not None and first not in changed and second not in changed:
            continue
        got = f"{first!r}, whose elements share memory" if first == second else f"{first!r} and {second!r}, which share memory"
        checks.fail(
            argument, got, "each element in memory of its own; clone them, or tie parameters by giving both names one Parameter"
        )


def check_trained(model: nn.Module, trained: Collection[nn.Parameter]) -> None:
    """Applies :func:`check_apart` to the parameters of ``model`` that will be trained; tied parameters are allowed."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    chosen = {names.get(id(parameter), f"parameter {index}"): parameter for index, parameter in enumerate(trained)}
    check_apart("parameters", {**chosen, **dict(model.named_parameters())}, chosen.keys())


def overlaps(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
    """Returns pairs of names whose tensors share an element, and a name twice if its tensor holds an element twice.

    Only the local shard of a ``DTensor`` counts. Tensors without addressable memory (meta, quantised) overlap nothing.

    Memory: one byte per element of the range that overlapping tensors span, or four if more than 127 of them overlap. Nothing for
    tensors whose ranges are disjoint and whose strides show that no element repeats.
    """
    held = {name: local_of(tensor) for name, tensor in tensors.items()}
    held = {name: t for name, t in held.items() if type(t) in (torch.Tensor, nn.Parameter) and not t.is_meta and t.numel()}
    held = {name: t for name, t in held.items() if t.layout is torch.strided}
    found: list[tuple[str, str]] = []
    for group in _meeting(held):
        if len(group) > 1 or not _apart_by_strides(held[group[0]]):
            found += _shared({name: held[name] for name in group})
    return found


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns the address of the first byte and of the byte after the last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.itemsize


def _apart_by_strides(tensor: torch.Tensor) -> bool:
    """Returns whether each stride exceeds the reach of all smaller ones, so that no two elements coincide."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def _meeting(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Groups the names whose byte ranges overlap."""
    groups: list[list[str]] = []
    last: tuple[str, int] = ("", 0)
    for device, begin, end, name in sorted((str(t.device), *_span(t), name) for name, t in tensors.items()):
        if groups and device == last[0] and begin < last[1]:
            groups[-1].append(name)
            last = device, max(end, last[1])
        else:
            groups.append([name])
            last = device, end
    return groups


def _shared(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
    """Finds the overlaps among tensors whose ranges overlap, by marking the owner of each address."""
    names, found = list(tensors), []
    begin = min(_span(t)[0] for t in tensors.values())
    unit = min(t.itemsize for t in tensors.values())
    if any((t.data_ptr() - begin) % unit for t in tensors.values()):  # a view may begin at any byte
        unit = 1
    size = max(_span(t)[1] for t in tensors.values()) - begin
    owner = torch.full((size // unit,), -1, dtype=torch.int8 if len(names) < 128 else torch.int32)
    for index, (name, tensor) in enumerate(tensors.items()):
        # Torch refuses writes along a stride of 0. The last dimension is the bytes of one element.
        dims = [
            (1 if stride == 0 else n, stride * tensor.itemsize // unit)
            for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ]
        dims.append((tensor.itemsize // unit, 1))
        sizes, strides = zip(*dims, strict=True)
        mine = owner.as_strided(sizes, strides, (tensor.data_ptr() - begin) // unit)
        found += [(names[other], name) for other in mine.unique().tolist() if other >= 0]
        mine.fill_(index)
        if int((owner == index).sum()) < tensor.numel() * (tensor.itemsize // unit):
            found.append((name, name))
    return found
