"""Maps the tensors of a Hugging Face checkpoint on disk to the parameters in memory, without loading the model."""

from __future__ import annotations

import copy
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from undo_core.io.files import errors_named
from undo_core.io.untrusted import refused
from undo_core.models import skeleton
from undo_core.models.folder import named_weight_files, read_configuration, weight_files
from undo_core.models.loading import sized_skeleton

_BINARY = getattr(os, "O_BINARY", 0)  # without it, Windows changes line ends
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()} | {torch.int32: "I32", torch.int64: "I64"}


@dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors file; ``start`` and ``end`` are byte offsets, and dtype is None if it is not floating-point."""

    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass
class Group:
    """Tensors on disk that are converted together, and the parameters in memory that they become.

    Attributes:
        parameters: names of the parameters in memory.
        files: file of each tensor on disk, by the tensor's name.
        converter: transformers' conversion on load; None if a tensor at most changes its name.
        sources: the pattern of the converter that each tensor matched, by the tensor's name.
    """

    parameters: list[str] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    converter: WeightConverter | None = None
    sources: dict[str, str] = field(default_factory=dict)


def read_header(path: Path) -> dict[str, Entry]:
    """Returns the tensors of a safetensors file by name, in the order of their bytes.

    Raises:
        SafetensorError: the file is damaged or incomplete.
    """
    try:
        with refused(f"{path}", SafetensorError), safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise SafetensorError(f"{path}: {error}") from None
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    entries = [
        Entry(name, _DTYPES.get(v["dtype"]), tuple(v["shape"]), *(8 + length + at for at in v["data_offsets"]))
        for name, v in header.items()
    ]
    return {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.start)}


def stored_dtype(folder: Path) -> torch.dtype:
    """Returns bfloat16 or float16 if all floating-point tensors of a checkpoint folder have that dtype, else float32."""
    dtypes = {entry.dtype for path in weight_files(folder) for entry in read_header(path).values() if entry.dtype is not None}
    return next(iter(dtypes)) if len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float16} else torch.float32


def checkpoint_skeleton(folder: Path, buffers: bool = False) -> PreTrainedModel:
    """Builds the :func:`undo_core.models.skeleton` of a checkpoint folder, tied as its files are; never runs remote code."""
    config = read_configuration(folder)
    model = sized_skeleton(folder, config)
    if buffers:
        model = skeleton(config, buffers=True)
    settle_ties(model, {path: read_header(path) for path in weight_files(folder)})
    return model


def settled_configuration(folder: Path) -> PreTrainedConfig:
    """Returns the configuration of a checkpoint folder, with ``tie_word_embeddings`` off if the files hold a head that differs.

    Models built from it have the same parameters as :func:`undo_core.models.load_model` gives. A configuration ties everything
    or nothing, so that the second name of a head's bias (BERT) becomes a parameter too. For a folder without weights, the
    configuration is returned unchanged.
    """
    config = read_configuration(folder)
    parts = [part for part in (config, config.get_text_config()) if getattr(part, "tie_word_embeddings", False)]
    paths = named_weight_files(folder)
    there = parts and all(path.is_file() for path in paths)
    if there and settle_ties(skeleton(config), {path: read_header(path) for path in paths}):
        for part in parts:
            part.tie_word_embeddings = False
    return config


def settle_ties(model: PreTrainedModel, files: Mapping[Path, Mapping[str, Entry]]) -> bool:
    """Unties those parameters of ``model`` that transformers would keep separate on load.

    Two tied parameters are separate if the files hold both, with different values.

    Args:
        model: a model on the meta device, tied as its configuration says; changed in place.
        files: the entries of each weight file.

    Returns:
        Whether any parameters were untied.
    """
    ties, parted = getattr(model, "all_tied_weights_keys", {}), False
    found = {name: group for group in _groups(model, files) for name in group.parameters}
    stored = {name: name for name in found}  # by parameter: the name under which the files hold its values
    for target, source in list(ties.items()):
        if target in stored and source in stored:
            one, other = stored[target], stored[source]
            if one != other and not _equal(model, found[one], one, found[other], other):
                owner, _, last = target.rpartition(".")
                own = model.get_parameter(target)
                model.get_submodule(owner)._parameters[last] = nn.Parameter(torch.empty_like(own), own.requires_grad)
                del ties[target]
                parted = True
        elif target in stored or source in stored:
            stored[target] = stored[source] = stored.get(target) or stored[source]
    return parted


def _equal(model: PreTrainedModel, group: Group, name: str, other_group: Group, other: str) -> bool:
    tensors = []
    for part, parameter in ((group, name), (other_group, other)):
        mapped = {path: MappedFile(path, read_only=True) for path in set(part.files.values())}
        tensors.append(
            to_memory(model, part, {stored: mapped[path].tensor(stored) for stored, path in part.files.items()})[parameter]
        )
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tensor.float() for tensor in tensors]
    return torch.equal(*tensors)


def groups(model: PreTrainedModel, files: Mapping[Path, Mapping[str, Entry]]) -> list[Group]:
    """Returns how transformers' own conversions turn the tensors of ``files`` into the parameters of ``model``, a meta model.

    Raises:
        ValueError: the model has no place for a tensor, or no tensor fills a parameter.
    """
    found = _groups(model, files)
    filled = {name for group in found for name in group.parameters}
    tied = {id(p): name for name, p in model.named_parameters(remove_duplicate=False) if name in filled}
    for name, parameter in model.named_parameters():
        if id(parameter) not in tied:
            raise ValueError(f"model: got no tensor for {name}, wanted one for every parameter")
    return found


def _groups(model: PreTrainedModel, files: Mapping[Path, Mapping[str, Entry]]) -> list[Group]:
    state = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    where = {name: path for path, entries in files.items() for name in entries}
    found: dict[str, Group] = {}
    for name in sorted(where, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        if target not in state:
            if any(re.search(expression, name) for expression in ignored):
                continue
            raise ValueError(
                f"model: got {name}, which is not a parameter of {type(model).__name__}; wanted a checkpoint of this class"
            )
        group = found.setdefault(target, Group())
        if pattern is None:
            group.parameters = [target]
            shape, wanted = files[where[name]][name].shape, tuple(state[target].shape)
            if shape != wanted:
                raise ValueError(f"model: got {name} of shape {shape}, wanted {wanted} as the configuration says")
        elif group.converter is None:
            group.converter = copy.deepcopy(by_pattern[pattern])
            patterns = group.converter.target_patterns
            group.parameters = [target.replace(patterns[0], other) for other in patterns]
        group.files[name] = where[name]
        group.sources[name] = pattern
    model._weight_conversions = [c for c in conversions if c.was_used()]
    return list(found.values())


def to_memory(model: PreTrainedModel, group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the parameters that a group's tensors become, by name; these are new tensors if the group has a converter."""
    if group.converter is None:
        return dict.fromkeys(group.parameters, *tensors.values())
    converter = copy.deepcopy(group.converter)
    for name, tensor in tensors.items():
        converter.add_tensor(group.parameters[0], name, group.sources[name], tensor)
    with refused(f"model: got {', '.join(sorted(group.files)[:3])}, of which transformers makes no {group.parameters[0]}"):
        made = converter.convert(group.parameters[0], model=model, config=model.config)
    return {name: (value[0] if isinstance(value, list) else value).contiguous() for name, value in made.items()}


def to_disk(model: PreTrainedModel, group: Group, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverts :func:`to_memory`.

    Raises:
        ValueError: transformers cannot turn the parameters back into the tensors that they came from.
    """
    tensors = dict(parameters) if group.converter is None else revert_weight_conversion(model, dict(parameters))
    if group.converter is not None and set(tensors) != set(group.files):
        raise ValueError(
            f"model: got {', '.join(sorted(group.files)[:3])}, which become {group.parameters[0]} on load in a way that "
            f"transformers does not undo; wanted tensors that it writes as it read them"
        )
    return tensors


class TensorWriter:
    """Writes a safetensors file in any order without holding its tensors in memory; its data begin at a multiple of 64 bytes.

    Args:
        path: path of the file.
        layout: dtype and shape of every tensor, by name.
        keep: continue an existing file of the same layout instead of truncating it.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], keep: bool = False) -> None:
        self.path, self.layout, self.at = path, layout, {}
        header, end = {}, 0
        for name, (dtype, shape) in layout.items():
            begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % 64)
        for name, entry in header.items():
            self.at[name] = 8 + len(text) + entry["data_offsets"][0]
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | (0 if keep else os.O_TRUNC) | _BINARY, 0o666)
        self._put(struct.pack("<Q", len(text)) + text, 0)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)

    def write(self, name: str, position: int, values: torch.Tensor) -> None:
        """Writes ``values`` into the tensor ``name``, starting at index ``position`` of its first dimension."""
        dtype, shape = self.layout[name]
        row = dtype.itemsize * torch.Size(shape[1:]).numel()
        self._put(memoryview(values.contiguous().cpu().flatten().view(torch.uint8).numpy()), self.at[name] + position * row)

    def flush(self) -> None:
        """Flushes what was written to disk."""
        with errors_named(self.path):
            os.fsync(self.file)

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        while len(data):
            with errors_named(self.path):
                if hasattr(os, "pwrite"):
                    written = os.pwrite(self.file, data, offset)
                else:  # Windows has no pwrite; seeking is safe because only one thread writes
                    os.lseek(self.file, offset, os.SEEK_SET)
                    written = os.write(self.file, data)
            data, offset = data[written:], offset + written


class MappedFile:
    """A memory-mapped safetensors file; :meth:`let_go` releases the pages of a tensor.

    Writing to a tensor changes the file. With ``read_only``, such changes are lost.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path, self.entries = path, read_header(path)
        with open(path, "rb" if read_only else "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY if read_only else mmap.ACCESS_WRITE)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns a tensor that shares the mapped memory; ``dtype`` must be given for a tensor that is not floating-point.

        Raises:
            ValueError: the file has no such tensor, or one of another dtype.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise ValueError(f"{self.path}: got no tensor {name}, wanted one")
        dtype = dtype or entry.dtype
        count = math.prod(entry.shape)
        if dtype is None or count * dtype.itemsize != entry.end - entry.start:
            raise ValueError(f"{self.path}: got {name} of another dtype, wanted {dtype or 'a floating-point one'}")
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=entry.start).view(entry.shape)

    def let_go(self, name: str) -> None:
        """Releases the tensor's pages from the process; changes that were written to a file are kept."""
        entry, page = self.entries[name], mmap.PAGESIZE
        start = entry.start // page * page
        if entry.end > start and hasattr(mmap, "MADV_DONTNEED"):  # missing on Windows, which releases pages by itself
            self._map.madvise(mmap.MADV_DONTNEED, start, entry.end - start)

    def flush(self) -> None:
        """Flushes changes to disk."""
        self._map.flush()
