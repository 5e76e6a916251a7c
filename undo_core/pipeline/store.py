"""Folders of finished stages: named by the stage's key, built in a hidden folder and published by a rename."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from undo_core import distributed
from undo_core.evaluation.metrics import SCORE
from undo_core.io.files import errors_named, fresh, hash_file, publish, read_json, write_json
from undo_core.io.locks import Hold, locked
from undo_core.io.memory_use import peak_bytes, reset_peak, return_freed_memory
from undo_core.io.progress import console
from undo_core.io.untrusted import NUMBER, OPTIONAL, Facts, read_object
from undo_core.models.folder import CONFIG, weight_files
from undo_core.pipeline.stage import FORMAT, MANIFEST, Folder, Stage, Work
from undo_core.version import __version__

ENTRIES = {  # of a manifest; each is there for some kinds of stages. What a kind alone has is in its ``entries``
    **{"seconds?": NUMBER, "peak_bytes?": int, "outputs?": {str: str}, "removed?": [str], "parameters?": int},
    **{"splits?": {str: {"rows": int, "tokens": int}}, "curve?": [{"step": int, "forget": SCORE, "retain": SCORE}]},
    **{"steps?": int, "tokens?": int, "flops?": NUMBER, "limit_reached?": bool, "history?": [{str: NUMBER}]},
    **{"retain_target?": OPTIONAL, "labelled_forget_tokens?": int, "labelled_retain_tokens?": int},
    **{"labelled_distinct_tokens?": {str: int}, "stopped?": (bool, type(None))},
}
THREADS = "threads.json"  # in the hidden folder of a stage
_PARTIAL = re.compile(r"\.(?P<name>.+?)\.partial(\.(?P<number>\d+))?")


class Store:
    """The stage folders of one output folder, each named by its stage's key."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, stage: Stage | Folder) -> Path:
        """Path of the stage's result, whether or not it exists."""
        return stage.path if isinstance(stage, Folder) else self.root / stage.name

    def done(self, stage: Stage | Folder) -> bool:
        """Whether the stage's result is complete."""
        return isinstance(stage, Folder) or (self.folder(stage) / MANIFEST).exists()

    def manifest(self, stage: Stage) -> Facts:
        """The manifest of a complete stage, whose entries have the shapes of :data:`ENTRIES` and of the stage's own ``entries``."""
        return read_object(self.folder(stage) / MANIFEST, {**ENTRIES, **stage.entries})

    def description(self, stage: Stage) -> dict[str, Any]:
        """The entries of the manifest that identify the stage."""
        return {"kind": stage.kind, "settings": stage.settings, "key": stage.key}

    def ensure(self, stage: Stage | Folder, awaited: bool = False) -> Path:
        """Builds the stage, and the inputs it lacks, unless it is complete, and returns its folder.

        A build that was killed continues from its last checkpoint. With ``awaited``, other processes build the late inputs.
        """
        final = self.folder(stage)
        if distributed.on_first(lambda: self.done(stage)):
            return final
        inputs = {
            name: self.folder(source) if awaited and name in stage.late else self.ensure(source)
            for name, source in stage.inputs.items()
        }
        lock = final.parent / f".{final.name}.lock"
        waiting = f"{final.name}: another process is building it; waiting"
        with locked(lock, waiting) if distributed.rank() == 0 else contextlib.nullcontext() as hold:
            if not distributed.on_first(lambda: self.done(stage)):  # the other process may have finished it
                self._build(stage, final, inputs, hold)
        return final

    def _build(self, stage: Stage, final: Path, inputs: dict[str, Path], hold: Hold | None) -> None:
        """Runs the stage in a hidden folder beside ``final``; one rename then publishes the complete result.

        On several ranks, rank 0 holds the lock, reads and writes the store; the others take part only in stages that all run
        together.
        """
        together, output = stage.together, distributed.on_first(lambda: self._begin(stage, unfinished_folder(final, hold)))
        return_freed_memory()  # so that the stage's peak is its own
        reset_peak()
        began = time.monotonic()
        work = Work(inputs, output.parent, output, stage.title or stage.kind, distributed.count(), distributed.tensor())
        with errors_named(output):  # of what the libraries that a stage uses write
            expected = distributed.on_first(lambda: stage.expected(work))
            facts = {**expected, **(stage.run(work) if together else distributed.on_first(lambda: stage.run(work)))}
            facts.setdefault("seconds", time.monotonic() - began)
            if distributed.count() > 1 and together:
                facts |= {"ranks": distributed.count(), "tensor": distributed.tensor()} | {
                    "peak_bytes": max(distributed.gather(peak_bytes()))
                }
            distributed.on_first(lambda: self._finish(stage, final, work, facts, hold))

    def _begin(self, stage: Stage, partial: Path) -> Path:
        """Prepares the hidden folder and returns the empty folder of the output in it."""
        description = self.description(stage)
        begun = partial / "description.json"
        if begun.exists() and read_json(begun) != description:  # an unfinished build of another stage
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        write_json(begun, description)
        threads, used = torch.get_num_threads(), _threads_used(partial)
        if used and threads != used[-1]:
            console.print(
                f"{stage.title or stage.kind}: continues with {threads} threads, began with {used[0]}; the last bits of its result can differ"
            )
        if threads not in used[-1:]:
            write_json(partial / THREADS, {"threads": [*used, threads]})
        return fresh(partial / "output")

    def _finish(self, stage: Stage, final: Path, work: Work, facts: dict[str, Any], hold: Hold) -> None:
        """Writes the manifest and publishes the output."""
        partial, output = work.scratch, work.output
        log = partial / "log.jsonl"
        if log.exists():
            shutil.copyfile(log, output / "log.jsonl")
        weights = sorted(output.glob("*.safetensors"))
        manifest = {
            "format": FORMAT,
            **self.description(stage),
            "inputs": {name: provenance(work.wait(name) if name in stage.late else path) for name, path in work.inputs.items()},
            "outputs": {path.name: hash_file(path) for path in weights},
            "versions": versions(),
            "machine": machine(),
            "peak_bytes": peak_bytes(),
            **({"threads_used": used} if len(used := _threads_used(partial)) > 1 else {}),
            **facts,
        }
        write_json(output / MANIFEST, manifest)
        publish(output, final, hold.check)
        _remove_partials(final)

    def tidy(self) -> None:
        """Removes the hidden folders of complete stages, which a build left that was killed just after it had published its result."""
        begun = (_PARTIAL.fullmatch(path.name) for path in self.root.glob(".*"))
        for final in {self.root / match["name"] for match in begun if match}:
            if (final / MANIFEST).exists():
                _remove_partials(final)


def _remove_partials(final: Path) -> None:
    for folder in _partials(final).values():  # a network file system keeps a folder in which a file is open
        shutil.rmtree(folder, ignore_errors=True)


def _threads_used(partial: Path) -> list[int]:
    """The numbers of CPU threads with which a stage was begun and continued, one after the other."""
    return read_object(partial / THREADS, threads=[int])["threads"] if (partial / THREADS).exists() else []


def _partials(final: Path) -> dict[int, Path]:
    """Hidden folders of a build: ``.NAME.partial``, which has number 0, and ``.NAME.partial.N``, begun or taken over by a later claim."""
    found = ((_PARTIAL.fullmatch(path.name), path) for path in final.parent.iterdir())
    return {int(match["number"] or 0): path for match, path in found if match and match["name"] == final.name}


def unfinished_folder(final: Path, hold: Hold) -> Path:
    """Returns the hidden folder in which ``final`` is built.

    A takeover renames it. If the former owner was only stopped, what it still writes goes to a folder that nobody reads.
    """
    begun, number = _partials(final), hold.number - 1
    if begun and hold.takeover is None:
        return begun[max(begun)]
    if begun:
        print(f"{final.name}: {hold.takeover}; this process continues its work", flush=True)
        number = max(number, max(begun) + 1)
    own = final.with_name(f".{final.name}.partial" + (number > 0) * f".{number}")
    return begun[max(begun)].rename(own) if begun else own


class OneFolder(Store):
    """A store for a single stage, in a folder that the user names; its inputs are existing folders."""

    def folder(self, stage: Stage | Folder) -> Path:
        return stage.path if isinstance(stage, Folder) else self.root

    def done(self, stage: Stage | Folder) -> bool:
        """Whether the folder exists and was made from the same inputs and settings.

        Raises:
            FileExistsError: it was made from other inputs or settings.
        """
        if isinstance(stage, Folder) or not self.root.exists():
            return isinstance(stage, Folder)
        description, manifest = self.description(stage), self.root / MANIFEST
        if manifest.exists() and {key: read_object(manifest).get(key) for key in description} == description:
            return True
        raise FileExistsError(
            f"output: got {self.root}, which exists and was made from other inputs or settings; wanted a new folder"
        )

    def tidy(self) -> None:
        if (self.root / MANIFEST).exists():
            _remove_partials(self.root)

    def description(self, stage: Stage) -> dict[str, Any]:
        """The entries that identify the stage, with the content of each input folder: folders can be moved and renamed."""
        sources = {name: source.content for name, source in stage.inputs.items()}
        return {"format": FORMAT, "kind": stage.kind, "settings": stage.settings, "sources": sources}


def provenance(folder: Path) -> dict[str, Any]:
    """Name and hashes of the weight files of an input folder."""
    manifest = folder / MANIFEST
    if manifest.exists():
        outputs = read_object(manifest, outputs={str: str})["outputs"]
    else:
        weights = weight_files(folder) if (folder / CONFIG).is_file() else []
        outputs = {path.name: hash_file(path) for path in weights}
    return {"folder": folder.name, "outputs": outputs}


def versions() -> dict[str, str]:
    """Versions of the software on which the bits of a result depend."""
    return {
        "undo_core": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine() -> dict[str, Any]:
    """Device, number of threads and operating system that compute the result."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {"device": device, "threads": torch.get_num_threads(), "system": f"{platform.system()} {platform.machine()}"}


def usable_cores() -> int:
    """Number of cores that this process may use; all of the machine's if the system does not say (macOS, Windows)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_a_worker(workers: int) -> int:
    """Number of CPU threads of each of ``workers`` processes: an equal share of OMP_NUM_THREADS or, without it, of the usable cores."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (int(limit) if limit.isdigit() and int(limit) > 0 else usable_cores()) // workers)


def load_warning(workers: int = 1) -> str:
    """One line about a machine with more running processes than cores; empty for another, and where the system does not say.

    It recommends a single thread unless each of the ``workers`` processes has no more than one.
    """
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, usable_cores()
    if load <= cores:
        return ""
    warning = f"WARNING the load average is {load:.1f} on {cores} cores: other processes compete for them"
    if threads_of_a_worker(workers) == 1:
        return f"{warning}."
    return (
        f"{warning}, and threads that wait for each other can take many times as long as one. OMP_NUM_THREADS=1 avoids that; keep it "
        "until the run is finished."
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or sys.platform
