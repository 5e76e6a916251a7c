"""Reads and writes the shards of a checkpoint by torch.distributed.checkpoint, in its safetensors format: nothing is pickled."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from undo_core.distributed import ranks

Shape = tuple[torch.Size, torch.dtype]


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], written: Callable[[], None]) -> Future:
    """Copies tensors to host memory, then writes them into ``folder`` in the background, while training changes the originals.

    Every rank writes its shards of ``DTensor`` entries, and one rank each plain tensor. Call :func:`result_of` with what is
    returned before the next call. Memory: a copy of what this rank holds, and the bytes of its file.

    Args:
        folder: empty folder that all ranks see.
        tensors: the entries.
        written: called once, by rank 0 in the background, after all ranks have written and the files hold all entries.
    """
    from torch.distributed.checkpoint import async_save

    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    def finish() -> None:
        found = stored_shapes(folder)
        if found != wanted:
            name = min(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            raise ValueError(f"checkpoint: got {name} as {found.get(name)} in {folder}, wanted {wanted.get(name)}")
        written()

    return async_save(tensors, storage_writer=_writer()(folder, finish), process_group=ranks.background())


def result_of(writing: Future) -> None:
    """Waits until all ranks have ended what :func:`write_shards` began.

    Raises:
        RuntimeError: a rank failed to write, or ``written`` raised an error.
    """
    with _one_line("write"):
        writing.result()


@functools.cache
def _writer() -> Callable[[Path, Callable[[], None]], Any]:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    class Writer(HuggingFaceStorageWriter):
        def __init__(self, folder: Path, finish: Callable[[], None]) -> None:
            super().__init__(str(folder), save_distributed=True)
            self.last = finish

        def stage(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            """Returns copies on the host; torch's own method would return tensors that lie there already."""
            self.per_thread_copy_ahead = 0
            return {name: tensor.to("cpu", copy=True) for name, tensor in state_dict.items()}

        def finish(self, metadata: Any, results: Any) -> None:
            """Ends the checkpoint; torch calls it on rank 0 once all ranks have written, and tells all of them if it fails."""
            self.last()

    return Writer


def read_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Reads ``tensors`` in place from files that any number of ranks wrote, each entry as far as this rank holds it.

    Raises:
        RuntimeError: a rank failed to read.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    group = ranks.control()
    with warnings.catch_warnings(), _one_line("read"):
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a process that runs alone reads what several wrote
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=group, no_dist=group is None)


def stored_shapes(folder: Path) -> dict[str, Shape]:
    """Returns shape and dtype of each whole tensor in ``folder``.

    Raises:
        ValueError: the parts of a tensor do not cover it.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for name, entry in found.items():
        covered = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if covered != math.prod(entry.size):
            raise ValueError(f"checkpoint: got {covered} elements of {name} in {folder}, wanted {math.prod(entry.size)}")
    return {name: (entry.size, entry.properties.dtype) for name, entry in found.items()}


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Replaces torch's report of failed ranks, which is no ``Exception`` and has a traceback for each, by the first failure."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise RuntimeError(f"checkpoint: rank {rank} could not {what} it: {type(cause).__name__}: {cause}") from None
