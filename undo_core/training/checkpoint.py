"""Checkpoints inside a stage: model, optimizer and counters, in safetensors and JSON."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from undo_core.files import fresh, publish, read_json, write_json
from undo_core.training.optimizers import Updater

_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(folder: Path, step: int, model: nn.Module, updater: Updater, state: dict[str, Any]) -> None:
    """Write checkpoint ``step`` under ``folder`` and remove the older ones once it is on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = fresh(folder / "writing")
    save_file(_unique(model), temporary / "model.safetensors")
    save_file(updater.tensors(), temporary / "optimizer.safetensors")
    write_json(temporary / "state.json", {"step": step, "mode": _mode(updater), **state})
    final = folder / f"step-{step}"
    if final.exists():  # the same step again after a resume
        shutil.rmtree(final)
    publish(temporary, final)
    for path in folder.iterdir():
        if path != final and _NAME.fullmatch(path.name):
            shutil.rmtree(path)


def load_checkpoint(folder: Path, model: nn.Module, updater: Updater) -> dict[str, Any] | None:
    """Restore the newest complete checkpoint under ``folder``; None where there is none.

    Raises:
        ValueError: it was written with another precision or optimizer, whose state is of another kind.
    """
    steps = [int(match[1]) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    if not steps:
        return None
    newest = folder / f"step-{max(steps)}"
    state = read_json(newest / "state.json")
    if state["mode"] != _mode(updater):
        raise ValueError(
            f"folder: got a checkpoint of {state['mode']}, wanted one of {_mode(updater)}; train into a new folder"
        )
    saved, own = load_file(newest / "model.safetensors"), _unique(model)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
    updater.load(load_file(newest / "optimizer.safetensors"))
    return state


def _mode(updater: Updater) -> dict[str, Any]:
    return {name: getattr(updater.config, name) for name in ("precision", "optimizer", "step_in_backward")}


def _unique(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, tied ones once."""
    named = {name: tensor for name, tensor in model.named_parameters()}
    named.update({name: tensor for name, tensor in model.named_buffers() if name in model.state_dict()})
    return {name: tensor.detach() for name, tensor in named.items()}
