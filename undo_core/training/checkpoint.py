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

_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write checkpoint ``step`` under ``folder`` and remove the older ones once it is on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = fresh(folder / "writing")
    save_file(_unique(model), temporary / "model.safetensors")
    tensors = {
        f"{index}.{key}": value.contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    save_file(tensors, temporary / "optimizer.safetensors")
    write_json(temporary / "state.json", {"step": step, **state})
    final = folder / f"step-{step}"
    if final.exists():  # the same step again after a resume
        shutil.rmtree(final)
    publish(temporary, final)
    for path in folder.iterdir():
        if path != final and _NAME.fullmatch(path.name):
            shutil.rmtree(path)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Restore the newest complete checkpoint under ``folder``; None where there is none."""
    steps = [int(match[1]) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    if not steps:
        return None
    newest = folder / f"step-{max(steps)}"
    saved, own = load_file(newest / "model.safetensors"), _unique(model)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(newest / "optimizer.safetensors").items():
        index, key = name.split(".", 1)
        entries.setdefault(int(index), {})[key] = value.clone()
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    return read_json(newest / "state.json")


def _unique(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, tied ones once."""
    named = {name: tensor for name, tensor in model.named_parameters()}
    named.update({name: tensor for name, tensor in model.named_buffers() if name in model.state_dict()})
    return {name: tensor.detach() for name, tensor in named.items()}
