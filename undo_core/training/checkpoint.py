"""Checkpoints inside a stage: model, optimizer and counters, in safetensors and JSON."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from undo_kernels.ops.layout import overlaps

from undo_core.files import fresh, publish, read_json, write_json
from undo_core.training.optimizers import Updater

FORMAT = 1  # raised when what a step computes or a checkpoint holds changes, so that nothing stale is resumed
_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(folder: Path, step: int, model: nn.Module, updater: Updater, state: dict[str, Any]) -> None:
    """Write checkpoint ``step`` under ``folder`` and remove the older ones once it is on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = fresh(folder / "writing")
    save_file(_apart(_unique(model)), temporary / "model.safetensors")
    save_file(updater.tensors(), temporary / "optimizer.safetensors")
    write_json(temporary / "state.json", {"step": step, **state})
    final = folder / f"step-{step}"
    if final.exists():  # the same step again after a resume
        shutil.rmtree(final)
    publish(temporary, final)
    for path in folder.iterdir():
        if path != final and _NAME.fullmatch(path.name):
            shutil.rmtree(path)


def find_checkpoint(folder: Path, made_by: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint under ``folder`` and its state; None where there is none.

    Raises:
        ValueError: its state's ``made_by`` is another.
    """
    steps = [int(match[1]) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    if not steps:
        return None
    newest = folder / f"step-{max(steps)}"
    state = read_json(newest / "state.json")
    found, wanted = _flat(state.get("made_by", {})), _flat(json.loads(json.dumps(made_by)))
    changed = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if changed:
        was, now = (", ".join(f"{name} {_shown(values.get(name))}" for name in changed) for values in (found, wanted))
        hint = "; a run resumes from the model as it was before its first step" if "model.weights" in changed else ""
        raise ValueError(f"folder: got {folder.parent} with a checkpoint made with {was}; wanted {now}, or a new folder{hint}")
    return newest, state


def load_checkpoint(checkpoint: Path, model: nn.Module, updater: Updater) -> None:
    """Restore model and optimizer."""
    saved, own = load_file(checkpoint / "model.safetensors"), _unique(model)
    expanded = {name for name, other in overlaps(own) if name == other}
    with torch.no_grad():
        for name, tensor in own.items():
            if name in expanded:  # a buffer: nothing can be copied into it, and training has refused such a parameter
                owner, _, last = name.rpartition(".")
                setattr(model.get_submodule(owner), last, saved[name].to(tensor.device))
            else:
                tensor.copy_(saved[name])
    updater.load(load_file(checkpoint / "optimizer.safetensors"))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _shown(value: Any) -> Any:
    """A digest by its first digits."""
    return value[:12] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else value


def _unique(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, tied ones once."""
    named = {name: tensor for name, tensor in model.named_parameters()}
    named.update({name: tensor for name, tensor in model.named_buffers() if name in model.state_dict()})
    return {name: tensor.detach() for name, tensor in named.items()}


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As safetensors wants them: contiguous, and copied where they share memory with another."""
    shared = {second for _, second in overlaps(tensors)}
    return {
        name: tensor.clone(memory_format=torch.contiguous_format) if name in shared else tensor.contiguous()
        for name, tensor in tensors.items()
    }
