"""Checkpoints within a stage: model and optimizer as safetensors, counters as JSON.

On several ranks every rank writes its own shards, by torch.distributed.checkpoint in its safetensors format. A checkpoint can be
resumed on any number of ranks. Its ``state.json`` lists the files with their sizes, so that one with a missing or torn file is not
resumed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import re
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from undo_kernels.ops.layout import overlaps
from undo_kernels.ops.sharding import local_of

from undo_core.distributed import count, on_first, rank
from undo_core.distributed.sharding import is_sharded, release
from undo_core.distributed.storage import read_shards, result_of, stored_shapes, write_shards
from undo_core.io.files import errors_named, fresh, publish, write_json
from undo_core.io.untrusted import checked_object, inside, read_object, refused
from undo_core.training.optimizers import Updater

FORMAT = (
    2  # increase it when the computation of a step or the contents of a checkpoint change, so that no old checkpoint is resumed
)
LAST_WRITE = 60.0  # seconds that a run which an error ends waits for the checkpoint that is being written
_NAME = re.compile(r"step-(\d+)")


class CheckpointWriter:
    """Writes the checkpoints of a stage; the newest is kept. Every rank takes part in each call.

    A checkpoint is written into a folder of its own and published by one rename. On several ranks the training goes on while it is
    written; the next checkpoint and the end of the ``with`` block wait for it.

    Args:
        folder: folder of the checkpoints; None to write none.
        model: the trained model.
        updater: its optimizer.
    """

    def __init__(self, folder: Path | None, model: nn.Module, updater: Updater) -> None:
        self.folder, self.model, self.updater = folder, model, updater
        self._writing: Future | None = None
        self._temporary = Path()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.wait()
        elif self._writing is not None:  # the error that ends the block is the one to report
            concurrent.futures.wait([self._writing], LAST_WRITE)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written; the next one would hold up the training until it is published."""
        return self._writing is not None and not self._writing.done()

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Begins the checkpoint of ``step``, with ``state`` as JSON values."""
        if self.folder is None:
            return
        self.wait()
        self._temporary = temporary = on_first(lambda: _begin(self.folder, step))
        publish_it = functools.partial(_publish, temporary, self.folder, json.dumps({"step": step, "ranks": count(), **state}))
        if is_sharded(self.model):
            release(self.model)
            tensors = {**_stored(self.model, self.updater), **self.updater.tensors()}
            self._writing = write_shards(temporary, tensors, publish_it)
        else:
            with self._removed_if_it_fails():
                save_file(weights(self.model), temporary / "model.safetensors")
                save_file(self.updater.tensors(), temporary / "optimizer.safetensors")
                on_first(publish_it)

    def wait(self) -> None:
        """Waits until the checkpoint that was begun is published."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with self._removed_if_it_fails():
                result_of(writing)

    @contextlib.contextmanager
    def _removed_if_it_fails(self) -> Iterator[None]:
        """Removes what could not be written, so that a full disk does not stay full."""
        try:
            with errors_named(self._temporary):
                yield
        except Exception:  # of any kind: a full disk, or another rank's error; it is raised again
            if rank() == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise


def _begin(folder: Path, step: int) -> Path:
    """Removes what killed runs left unfinished, and returns an empty folder for a checkpoint."""
    for path in folder.glob("writing*"):
        shutil.rmtree(path)
    return fresh(folder / f"writing-{step}-{secrets.token_hex(4)}")


def _publish(temporary: Path, folder: Path, text: str) -> None:
    """Publishes a checkpoint whose files are complete, then removes the older ones; ``text`` is its state as JSON."""
    state = json.loads(text)
    files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    write_json(temporary / "state.json", {**state, "files": files})
    final = folder / f"step-{state['step']}"
    if final.exists():  # a resumed run saves the same step again
        shutil.rmtree(final)
    publish(temporary, final)
    for path in folder.iterdir():
        if path != final and _NAME.fullmatch(path.name):
            shutil.rmtree(path)


def find_training_state(folder: Path, made_by: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """Returns the newest complete checkpoint under ``folder`` and its state, or None if there is none.

    Raises:
        ValueError: there are checkpoints and none is complete, or the checkpoint was made with a different ``made_by``; the
            message names what is missing or differs.
    """
    steps = sorted((int(match[1]) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))), reverse=True)
    damaged = ""
    for step in steps:
        newest = folder / f"step-{step}"
        fault = _fault(newest)
        if not fault:
            break
        damaged = damaged or f"{newest} {fault}"
    else:
        if damaged:
            raise ValueError(f"checkpoint: got one that is not complete: {damaged}; delete {folder} to begin the stage again")
        return None
    if damaged:
        print(f"checkpoint: {damaged}; continuing from {newest.name}", flush=True)
    state = read_object(newest / "state.json")
    found = _flat(checked_object(state.get("made_by", {}), f"{newest}: made_by"))
    wanted = _flat(json.loads(json.dumps(made_by)))
    changed = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if changed:
        was, now = (", ".join(f"{name} {_shown(values.get(name))}" for name in changed) for values in (found, wanted))
        hint = "; a run resumes from the model as it was before its first step" if "model.weights" in changed else ""
        raise ValueError(f"folder: got {folder.parent} with a checkpoint made with {was}; wanted {now}, or a new folder{hint}")
    return newest, state


def _fault(checkpoint: Path) -> str:
    """Says which of its files a checkpoint lacks, has in part only, or has from another one; empty if it is complete."""
    if not (checkpoint / "state.json").exists():
        return "lacks state.json"
    try:
        state = read_object(checkpoint / "state.json", step=int)
        files = checked_object(state.get("files", {}), "files")
    except ValueError as error:
        return f"has a torn state.json ({error})"
    if f"step-{state.get('step')}" != checkpoint.name:  # files of the same sizes belong to every step
        return f"has the state.json of step {state.get('step')}"
    for name, size in files.items():
        try:
            path = inside(checkpoint, name, "state.json")
        except ValueError as error:
            return f"has a torn state.json ({error})"
        if not path.is_file():
            return f"lacks {name}, written by one of {state.get('ranks')} ranks"
        if (found := path.stat().st_size) != size:
            return f"has {found} of the {size} bytes of {name}"
        try:
            with safe_open(path, "pt"):  # reads its header
                pass
        except SafetensorError as error:
            return f"has a torn {name} ({error})"
    return ""


def load_training_state(checkpoint: Path, model: nn.Module, updater: Updater) -> None:
    """Loads a checkpoint's model and optimizer state into ``model`` and ``updater``; every rank calls it.

    Raises:
        ValueError: the files are not those of this model and optimizer.
    """
    if is_sharded(model):
        release(model)
        _load_shards(checkpoint, model, updater)
        return
    with refused(f"checkpoint: got {checkpoint}, which is damaged or of another model"):
        _load_whole(checkpoint, model, updater)


def _load_whole(checkpoint: Path, model: nn.Module, updater: Updater) -> None:
    if (checkpoint / "model.safetensors").exists():
        load_weights(checkpoint / "model.safetensors", model)
        updater.load(load_file(checkpoint / "optimizer.safetensors"))
    else:  # written by several ranks
        whole = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored_shapes(checkpoint).items()}
        read_shards(checkpoint, whole)
        own = _unique(model).keys()
        _fill(model, {name: whole[name] for name in own})
        updater.load({name: tensor for name, tensor in whole.items() if name not in own})


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the parameters and saved buffers of a model that is not sharded, as safetensors stores them."""
    return _apart(_unique(model))


def load_weights(path: Path, model: nn.Module) -> None:
    """Loads the :func:`weights` that ``path`` stores into ``model``."""
    with refused(f"{path}: not the weights of this model"):
        _fill(model, load_file(path))


def _fill(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Sets the parameters and saved buffers of ``model``."""
    own = _unique(model)
    expanded = {name for name, other in overlaps(own) if name == other}
    with torch.no_grad():
        for name, tensor in own.items():
            if name in expanded:  # an expanded buffer cannot be written to; `check_trained` refuses such parameters
                owner, _, last = name.rpartition(".")
                setattr(model.get_submodule(owner), last, saved[name].to(tensor.device))
            else:
                tensor.copy_(saved[name])


def _load_shards(checkpoint: Path, model: nn.Module, updater: Updater) -> None:
    """Loads the parts of a checkpoint that this rank holds; the checkpoint may be of any number of ranks."""
    own, states = _unique(model), dict[str, torch.Tensor]()
    for name, (shape, dtype) in stored_shapes(checkpoint).items():
        if name in own:
            continue
        parameter = updater.parameters[int(name.split(".")[0])]
        states[name] = torch.empty_like(parameter, dtype=dtype) if shape == parameter.shape else torch.empty(shape, dtype=dtype)
    # A float32 master is read instead of the parameter that was rounded from it.
    masters = {id(updater.parameters[int(name.split(".")[0])]) for name in states if name.endswith(".target")}
    rounded = {name for name, parameter in model.named_parameters() if id(parameter) in masters}
    read_shards(checkpoint, {**{name: tensor for name, tensor in own.items() if name not in rounded}, **states})
    updater.load({name: local_of(tensor) for name, tensor in states.items()})


def _stored(model: nn.Module, updater: Updater) -> dict[str, torch.Tensor]:
    """Tensors of a sharded model as one process would store them: parameters with a float32 master in bfloat16."""
    mastered = {id(p) for p in updater.parameters} if updater.config.precision == "bfloat16-master" else set()
    names = {name for name, parameter in model.named_parameters() if id(parameter) in mastered}
    return {name: tensor.to(torch.bfloat16) if name in names else tensor for name, tensor in _unique(model).items()}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dictionaries to dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _shown(value: Any) -> Any:
    """Shortens a digest to its first digits."""
    return value[:12] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else value


def _unique(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name; tied parameters appear once."""
    named = {name: tensor for name, tensor in model.named_parameters()}
    named.update({name: tensor for name, tensor in model.named_buffers() if name in model.state_dict()})
    return {name: tensor.detach() for name, tensor in named.items()}


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prepares tensors for safetensors: contiguous, and copied where they share memory with another tensor."""
    shared = {second for _, second in overlaps(tensors)}
    return {
        name: tensor.clone(memory_format=torch.contiguous_format) if name in shared else tensor.contiguous()
        for name, tensor in tensors.items()
    }
