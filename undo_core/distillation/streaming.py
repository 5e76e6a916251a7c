"""Checkpoints whose weights stay on disk and are read when needed, one layer or the head at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from undo_core.checkpoints.files import Group, MappedFile, checkpoint_skeleton, groups, read_header, to_memory
from undo_core.models import Head, head_of
from undo_core.models.folder import weight_files
from undo_core.training.identity import digest_of, weights_digest

__all__ = ["WeightReader", "load_head", "stream_model", "weights_digest"]


class WeightReader:
    """Reads the parameters of a checkpoint folder in float32, as :func:`undo_core.models.load_model` would load them.

    Attributes:
        model: the folder's model, with parameters on the meta device and real buffers.

    Memory: only address space; what is read is copied, and the pages of the file are released.

    Raises:
        FileNotFoundError: the folder has no safetensors file.
        ValueError: a tensor in the files has no parameter, or a parameter has no tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.model = checkpoint_skeleton(folder, buffers=True).eval()
        headers = {path: read_header(path) for path in weight_files(folder)}
        self._files = {path: MappedFile(path, read_only=True) for path in headers}
        self._groups = {name: group for group in groups(self.model, headers) for name in group.parameters}
        named = list(self.model.named_parameters(remove_duplicate=False))
        filled = {id(parameter): name for name, parameter in named if name in self._groups}
        # The file may hold a tied parameter under any of its names.
        self._source = {name: filled[id(parameter)] for name, parameter in named}
        self._tensors = self.model.state_dict()
        self._source |= {name: name for name, _ in self.model.named_buffers() if name in self._groups}

    def read(self, names: Iterable[str], into: Mapping[str, torch.Tensor] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the named parameters in float32 on the CPU, in new memory or in the tensors of ``into``.

        Parameters that are stored together are read once.
        """
        wanted: dict[int, tuple[Group, list[str]]] = {}
        for name in names:
            group = self._groups[self._source[name]]
            wanted.setdefault(id(group), (group, []))[1].append(name)
        for group, members in wanted.values():
            own = self._tensors[group.parameters[0]].dtype  # the dtype that the integers in a file stand for
            tensors = {
                name: self._files[path].tensor(name, self._files[path].entries[name].dtype or own)
                for name, path in group.files.items()
            }
            made = to_memory(self.model, group, tensors)
            for name in members:
                value = made[self._source[name]]
                dtype = torch.float32 if value.is_floating_point() else value.dtype
                yield name, value.to(dtype, copy=True) if into is None else into[name].copy_(value)
            for name, path in group.files.items():
                self._files[path].let_go(name)

    def digest(self) -> str:
        """:func:`weights_digest` of the checkpoint."""
        return digest_of(self.read(name for name, _ in self.model.named_parameters()))


def load_head(reader: WeightReader) -> Head:
    """Loads the head of a checkpoint in float32, on the GPU if there is one; loads nothing else."""
    output = reader.model.get_output_embeddings()
    names = {id(parameter): name for name, parameter in reader.model.named_parameters(remove_duplicate=False)}
    parts = [names[id(p)] for p in (output.weight, output.bias) if p is not None]
    read = dict(reader.read(parts))
    head = head_of(reader.model)  # on the meta device: gives shape, scale and softcap
    weight, *bias = (read[name].to(_device())[: len(head.weight)] for name in parts)
    return dataclasses.replace(head, weight=weight, bias=bias[0] if bias else None)


def stream_model(folder: str | Path) -> PreTrainedModel:
    """Opens a checkpoint folder as a model for forward passes only; a layer's weights are in memory only while it computes.

    Outputs have the same bits as those of :func:`undo_core.models.load_model`. Parameters outside the layers (embeddings, final
    norm, head) stay on the device. On a GPU, the next layer is copied from pinned memory while the current one computes. Every
    forward pass reads the files, or the system's page cache, once.

    Memory: one layer on a CPU, two on a GPU, and the parameters outside the layers.

    Raises:
        ValueError: the model has no list of layers.
    """
    reader = WeightReader(Path(folder))
    model, device = reader.model, _device()
    lists = {path: part for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    if not lists:
        raise ValueError(f"teacher: got a {type(model).__name__}, which has no list of layers; wanted one to stream")
    path = max(lists, key=lambda path: sum(p.numel() for p in lists[path].parameters()))
    layers_of, prefix = lists[path], path + "."
    names: dict[int, list[str]] = {}  # the names of each parameter; a tied one has several
    for full, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(full)
    resident = {of[0]: of for of in names.values() if not all(full.startswith(prefix) for full in of)}
    for full, tensor in reader.read(resident):
        placed = nn.Parameter(tensor.to(device), requires_grad=False)
        for name in resident[full]:
            _place(model, name, placed)
    for full, buffer in list(model.named_buffers()):
        owner, _, last = full.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer.to(device)
    saved_buffers = [n for n, _ in model.named_buffers() if n in reader._groups]
    for full, tensor in reader.read(saved_buffers):
        model.get_buffer(full).copy_(tensor)
    layers = _Layers(reader, layers_of, prefix, device)
    model._undo_layers, model._undo_reader = layers, reader
    return model.eval()


class _Layers:
    """Hooks that load a layer's weights before its forward pass and release them after it."""

    def __init__(self, reader: WeightReader, layers: nn.ModuleList, prefix: str, device: torch.device) -> None:
        self.reader, self.layers, self.prefix, self.device = reader, layers, prefix, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.names = [[name for name, _ in layer.named_parameters()] for layer in layers]
        self.ahead: dict[int, dict[str, torch.Tensor]] = {}
        self.room = torch.empty(0)  # one buffer for all layers: with repeated allocation the heap would only grow
        if self.stream is None:
            self.room = torch.empty(max(sum(map(_padded, layer.parameters())) for layer in layers))
        for index, layer in enumerate(layers):
            layer.requires_grad_(False)
            layer.register_forward_pre_hook(lambda *_, index=index: self.bring(index))
            layer.register_forward_hook(lambda *_, index=index: self.let_go(index), always_call=True)

    def bring(self, index: int) -> None:
        tensors = self.ahead.pop(index, None) or self.read(index)
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
            for tensor in tensors.values():
                tensor.record_stream(torch.cuda.current_stream())
        for name, tensor in tensors.items():
            _place(self.layers[index], name, nn.Parameter(tensor, requires_grad=False))

    def let_go(self, index: int) -> None:
        layer = self.layers[index]
        for name in self.names[index]:
            _place(layer, name, nn.Parameter(torch.empty_like(layer.get_parameter(name), device="meta"), requires_grad=False))
        if self.stream is not None and index + 1 < len(self.layers):  # this layer's kernels are queued: the host is free
            self.ahead = {index + 1: self.read(index + 1)}

    def read(self, index: int) -> dict[str, torch.Tensor]:
        before = f"{self.prefix}{index}."
        names = [before + name for name in self.names[index]]
        if self.stream is None:
            return {name.removeprefix(before): tensor for name, tensor in self.reader.read(names, self.places(index, before))}
        with torch.cuda.stream(self.stream):
            return {
                name.removeprefix(before): tensor.pin_memory().to(self.device, non_blocking=True)
                for name, tensor in self.reader.read(names)
            }

    def places(self, index: int, before: str) -> dict[str, torch.Tensor]:
        places, at = {}, 0
        for name in self.names[index]:
            parameter = self.layers[index].get_parameter(name)
            places[before + name] = self.room[at : at + parameter.numel()].view(parameter.shape)
            at += _padded(parameter)
        return places


def _padded(parameter: torch.Tensor) -> int:
    """Number of entries, rounded up to 64 bytes.

    Tensors with memory of their own are aligned to 64 bytes too, and the order of a sum can depend on the alignment.
    """
    return -(-parameter.numel() // 16) * 16


def _place(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    model.get_submodule(owner)._parameters[last] = parameter


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
