"""Where tensors lie in memory: whether writing to one would change another, or another element of itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn


def check_separate(model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
    """Refuse to train a parameter whose memory is also that of another parameter, or twice its own (``Tensor.expand``).

    An update of such a parameter would be applied more than once. A parameter that is tied, one object under two names, is fine.

    Raises:
        ValueError: the names of the parameters that overlap.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    chosen = {id(parameter): parameter for parameter in trained}
    known = {names.get(key, f"parameter {index}"): parameter for index, (key, parameter) in enumerate(chosen.items())}
    others = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in chosen}
    for first, second in overlaps({**known, **others}):
        if first not in known and second not in known:
            continue
        got = f"{first}, whose elements share memory" if first == second else f"{first} and {second}, which share memory"
        raise ValueError(
            f"parameters: got {got}, wanted each element in memory of its own; clone them, or tie them by giving both names one "
            f"Parameter"
        )


def overlaps(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
    """Pairs of names whose tensors have an element in common; a name with itself where two of its own elements are one.

    Memory: 4 bytes for each element of the memory from the first to the last of tensors whose ranges meet, or of one with gaps.
    """
    found: list[tuple[str, str]] = []
    for group in _meeting(tensors):
        if len(group) == 1 and _dense(tensors[group[0]]):
            continue
        found += _shared(group, tensors)
    return found


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte, and the byte after the last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.itemsize


def _dense(tensor: torch.Tensor) -> bool:
    """Whether each element has a place of its own and none is left free between them."""
    begin, end = _span(tensor)
    dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    expected = 1
    for stride, size in dims:
        if stride != expected:
            return False
        expected *= size
    return end - begin == tensor.numel() * tensor.itemsize


def _meeting(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names in groups whose byte ranges meet; tensors without memory of an address (meta, sharded, quantised) are in none."""
    plain = {name: t for name, t in tensors.items() if type(t) in (torch.Tensor, nn.Parameter) and not t.is_meta and t.numel()}
    spans = sorted((str(t.device), *_span(t), name) for name, t in plain.items() if t.layout is torch.strided)
    groups: list[list[str]] = []
    last: tuple[str, int] = ("", 0)
    for device, begin, end, name in spans:
        if groups and device == last[0] and begin < last[1]:
            groups[-1].append(name)
            last = device, max(end, last[1])
        else:
            groups.append([name])
            last = device, end
    return groups


def _shared(group: list[str], tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
    """The overlaps in one group, by writing down who owns each place."""
    unit = min(tensors[name].itemsize for name in group)
    begin = min(_span(tensors[name])[0] for name in group)
    size = max(_span(tensors[name])[1] for name in group) - begin
    owner, found = torch.full((size // unit,), -1, dtype=torch.int32), []
    for index, name in enumerate(group):
        tensor = tensors[name]
        dims = [(n, stride * tensor.itemsize // unit) for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        once = [(1, stride) if stride == 0 else (n, stride) for n, stride in dims]  # torch refuses to write along a stride of 0
        mine = owner.as_strided(*zip(*once, strict=True) if once else ((), ()), (tensor.data_ptr() - begin) // unit)
        found += [(group[other], name) for other in mine.unique().tolist() if other >= 0]
        mine.fill_(index)
        if int((owner == index).sum()) < tensor.numel():
            found.append((name, name))
    return found
