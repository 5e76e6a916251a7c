"""Reads and writes the shards of a checkpoint by torch.distributed.checkpoint, in its safetensors format: nothing is pickled."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from undo_core.distributed import ranks

Shape = tuple[torch.Size, torch.dtype]


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes tensors into ``folder``: every rank its shards of ``DTensor`` entries, and one rank each plain tensor."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True), process_group=ranks.control())


def read_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Reads ``tensors`` in place from files that any number of ranks wrote, each entry as far as this rank holds it."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    group = ranks.control()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a process that runs alone reads what several wrote
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=group, no_dist=group is None)


def stored_shapes(folder: Path) -> dict[str, Shape]:
    """Returns shape and dtype of each whole tensor in ``folder``."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in found.items()}
