"""Stage folders: keyed by what they are made of, built beside their final name, published by a rename."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from undo_core.checkpoint_files import CONFIG, weight_files
from undo_core.files import fresh, hash_file, hash_json, locked, publish, read_json, write_json
from undo_core.training.memory import peak_bytes, reset_peak
from undo_core.version import __version__

FORMAT = 5  # of the folders; a change of what a stage computes raises it, so that nothing stale is reused
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Stage:
    """One step of the method: what is done, with which settings, to which other stages' folders.

    Attributes:
        kind: name of the stage function: prepare, pretrain, initialise, unlearn, noise, damage, gate, cache, distill,
            relearn or probe.
        settings: everything that decides the result besides the inputs, as JSON values, seeds included.
        inputs: the stages whose folders this one reads.
        title: for people; not part of the key.
    """

    kind: str
    settings: dict[str, Any]
    inputs: dict[str, Stage] = field(default_factory=dict)
    title: str = ""

    @functools.cached_property
    def key(self) -> str:
        """Hash of the stage's settings and of its inputs' keys."""
        inputs = {name: stage.key for name, stage in self.inputs.items()}
        return hash_json({"format": FORMAT, "kind": self.kind, "settings": self.settings, "inputs": inputs})[:12]

    @property
    def name(self) -> str:
        """Name of the stage's folder."""
        return f"{self.kind}-{self.key}"


@dataclass(frozen=True)
class Work:
    """What a stage function works with.

    Attributes:
        settings: the stage's settings.
        inputs: folders of the stages that it reads.
        scratch: survives a kill: checkpoints and the log.
        output: empty at first; becomes the stage's folder.
        title: for the progress bar.
    """

    settings: dict[str, Any]
    inputs: dict[str, Path]
    scratch: Path
    output: Path
    title: str


StageFunction = Callable[[Work], dict[str, Any]]


class Store:
    """The stage folders of one output folder."""

    def __init__(self, root: Path, functions: Mapping[str, StageFunction]) -> None:
        self.root = root
        self.functions = functions

    def folder(self, stage: Stage) -> Path:
        """Where the stage's result is, or will be."""
        return self.root / stage.name

    def done(self, stage: Stage) -> bool:
        """Whether the stage's result is complete."""
        return (self.folder(stage) / MANIFEST).exists()

    def manifest(self, stage: Stage) -> dict[str, Any]:
        """The manifest of a complete stage."""
        return read_json(self.folder(stage) / MANIFEST)

    def ensure(self, stage: Stage) -> Path:
        """The stage's folder, built first where it is missing; a killed build continues from its last checkpoint."""
        final = self.folder(stage)
        if self.done(stage):
            return final
        inputs = {name: self.ensure(source) for name, source in stage.inputs.items()}
        with locked(self.root / f".{stage.name}.lock", f"{stage.name}: another process is at work on it; waiting"):
            if not self.done(stage):  # the other process may have finished it
                description = {"kind": stage.kind, "settings": stage.settings, "key": stage.key}
                build_folder(final, self.functions[stage.kind], stage.settings, inputs, stage.title or stage.kind, description)
        (self.root / f".{stage.name}.lock").unlink(missing_ok=True)
        return final


def build_folder(
    final: Path,
    function: StageFunction,
    settings: dict[str, Any],
    inputs: Mapping[str, Path],
    title: str,
    description: dict[str, Any],
) -> dict[str, Any]:
    """Run a stage function and publish its folder with a manifest; returns the manifest.

    The function works in a hidden folder beside ``final``, which appears in one rename, complete and on disk.
    """
    partial = final.parent / f".{final.name}.partial"
    begun = partial / "description.json"
    if begun.exists() and read_json(begun) != description:  # an unfinished build of something else
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_json(begun, description)
    output = fresh(partial / "output")
    reset_peak()
    began = time.monotonic()
    facts = function(Work(settings, dict(inputs), partial, output, title))
    facts.setdefault("seconds", time.monotonic() - began)
    log = partial / "log.jsonl"
    if log.exists():
        shutil.copyfile(log, output / "log.jsonl")
    weights = sorted(output.glob("*.safetensors"))
    manifest = {
        "format": FORMAT,
        **description,
        "inputs": {name: _provenance(folder) for name, folder in inputs.items()},
        "outputs": {path.name: hash_file(path) for path in weights},
        "versions": versions(),
        "machine": machine(),
        "peak_bytes": peak_bytes(),
        **facts,
    }
    write_json(output / MANIFEST, manifest)
    publish(output, final)
    shutil.rmtree(partial)
    return manifest


def _provenance(folder: Path) -> dict[str, Any]:
    """Name and weight hashes of an input folder."""
    manifest = folder / MANIFEST
    if manifest.exists():
        outputs = read_json(manifest)["outputs"]
    else:
        weights = weight_files(folder) if (folder / CONFIG).is_file() else []
        outputs = {path.name: hash_file(path) for path in weights}
    return {"folder": folder.name, "outputs": outputs}


def versions() -> dict[str, str]:
    """Versions of what decides a result's bits."""
    return {
        "undo_core": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine() -> dict[str, Any]:
    """What the result was computed on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {"device": device, "threads": torch.get_num_threads(), "system": f"{platform.system()} {platform.machine()}"}


def usable_cores() -> int:
    """Cores that this process may run on; all of the machine's where the system does not tell (macOS, Windows)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or sys.platform
