"""Finished runs, copies of them that lack one stage, and lives: what a process does between its beginning and its end."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import itertools
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import yaml
from faulty_files import Ended, Fault, FaultyFiles
from tiny_run import RUN

from undo_core import cli
from undo_core.cli.parser import command_values
from undo_core.distillation import cache
from undo_core.io import locks
from undo_core.io.files import hash_file, hash_json, read_json
from undo_core.pipeline.stages import relearn
from undo_core.report import figures
from undo_core.training import loop

RESULTS = "results"  # in place of a stage: evaluations, results and report
COMMAND = ("run", "run.yaml")
# Entries of manifests and results that differ between two equal runs; a prediction that fails stops no stage.
_OF_THE_TIME = {"seconds", "peak_bytes", "predicted_bytes", "command"}
_lives = itertools.count(1)


def shortest_run(**changes: Any) -> dict[str, Any]:
    """The smallest run, in which each kind of stage trains for two steps, with some settings replaced."""
    run = copy.deepcopy(RUN)
    run["unlearn"]["train"]["steps"] = 2
    run["relearn"] |= {"evaluate_at": [0, 2], "headline_step": 2, "extend": 0}
    return {**run, **changes}


# With these it builds the kinds of stages that the shortest run does not: gate, damage, initialise, probe, grid, intervene, search, measure,
# untie, erase.
FURTHER = {
    "model": {**RUN["model"], "config": {**RUN["model"]["config"], "tie_word_embeddings": True}},
    "controls": {"filter": True, "random": True, "gate": {"share": 0.5, "alphas": [0.5]}},
    "damage": {"operators": ["prune"]},
    "relearn": {**shortest_run()["relearn"], "rates": [1e-3, 2e-3], "together": 2},
    "attacks": {
        "quantised": {"kind": "quantise", "bits": [8]},
        "pruned": {"kind": "prune", "shares": [0.5]},
        "searched": {"kind": "search", "budget": 2, "steps": [1, 2], "batch_sizes": [2], "ranks": [0], "startup": 1},
    },
    "students": {"erased": {"untie": True, "alpha": 0.5, "erase": {"tokens": 2}}},
    "measures": {"angle": {"kind": "angle"}},
}


@dataclass
class Life:
    """How a process ended.

    Attributes:
        code: its exit code; None if it was killed.
        said: what it wrote to standard error.
        files: the operations on files that it got to.
    """

    code: int | None
    said: str
    files: FaultyFiles


class _Parser:
    """Reads a command's arguments once for each content of its file: to read them again takes longer than to build a stage."""

    known: ClassVar[dict[tuple[str, ...], Any]] = {}
    real = staticmethod(cli.command_parser)

    def __init__(self, only: str | None = None) -> None:
        self.only = only

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real(self.only), name)

    def parse_args(self, arguments: list[str]) -> Any:
        key = (*arguments, Path(COMMAND[1]).read_text())
        if key not in self.known:
            parser = self.real(self.only)
            parsed = parser.parse_args(arguments)
            self.known[key] = SimpleNamespace(subcommand=parsed.subcommand, values=command_values(parser, parsed))
        return copy.deepcopy(self.known[key])


def live(folder: Path, fault: Fault | None = None, command: tuple[str, ...] = COMMAND) -> Life:
    """Runs a command of ``undo`` in ``folder`` as a new process would, with a checkpoint after every step, and with ``fault``.

    Figures are written but not drawn, which would take longer than all stages do.
    """
    files, said, code = FaultyFiles(folder / "out", fault), io.StringIO(), None
    relearn._AT_START.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(cli, "command_parser", _Parser)
        patch.setattr(cli, "command_values", lambda _, parsed: parsed.values)
        patch.setattr(figures, "png", lambda figure: b"a figure")
        patch.setitem(inspect.unwrap(loop.train).__kwdefaults__, "checkpoint_seconds", -1.0)
        patch.setitem(cache.cache_teacher.__kwdefaults__, "checkpoint_seconds", 0.0)
        patch.setitem(cache.cache_teacher.__kwdefaults__, "shard_bytes", 20_000)
        start, number = locks._start, next(_lives)
        # earlier lives of this process have ended, as the locks see it
        patch.setattr(locks, "_start", lambda pid: f"{start(pid)} life {number}")
        patch.setattr(locks, "LEASE", 0.3)  # for which a torn claim is waited for
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said), files, contextlib.suppress(Ended):
            code = cli.main(list(command))
    return Life(None if files.ended else code, said.getvalue(), files)


@dataclass
class Finished:
    """A finished run.

    Attributes:
        folder: folder with ``run.yaml`` and ``out``.
        contents: see :func:`contents`.
    """

    folder: Path
    contents: dict[str, str] = field(default_factory=dict)

    @classmethod
    def new(cls, folder: Path, run: dict[str, Any]) -> Finished:
        folder.mkdir(parents=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(run))
        life = live(folder)
        assert life.code == 0, life.said
        return cls(folder, contents(folder / "out"))

    def stages(self) -> list[str]:
        """One stage of each kind, in the order in which they were built, and :data:`RESULTS`."""
        built = sorted((self.folder / "out" / "stages").iterdir(), key=lambda path: (path / "manifest.json").stat().st_mtime_ns)
        first = {path.name.split("-")[0]: path.name for path in reversed(built)}
        return [*reversed(first.values()), RESULTS]

    def without(self, stage: str, folder: Path) -> Path:
        """Copies the run to ``folder``, without this stage; and without the trials of a grid, or nobody would build it again."""
        shutil.rmtree(folder, ignore_errors=True)
        manifests = self.folder.glob("out/stages/relearn-*/manifest.json")
        trials = [path.parent.name for path in manifests if read_json(path)["inputs"].get("grid", {}).get("folder") == stage]
        left_out = ("results-*", "report", "evaluations") if stage == RESULTS else (stage, *trials)
        return Path(shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(*left_out)))

    def compare(self, folder: Path, what: str) -> None:
        """Asserts that the run in ``folder`` has ended with the same bits as this one, and left nothing behind."""
        found = contents(folder / "out")
        differing = [name for name in sorted({*found, *self.contents}) if found.get(name) != self.contents.get(name)]
        assert not differing, f"{what}: {differing} differ"
        hidden = [path for path in (folder / "out").rglob(".*") if not path.name.endswith(".tmp") and ".lock." not in path.name]
        assert not hidden, f"{what}: {hidden} are left"

    def check_published(self, folder: Path, what: str) -> None:
        """Asserts that each stage that a run has published, whole or not, is whole."""
        found = contents(folder / "out")
        for path in (folder / "out" / "stages").glob("[!.]*"):
            own = f"stages/{path.name}/"
            whole = {name: value for name, value in self.contents.items() if name.startswith(own)}
            assert {name: value for name, value in found.items() if name.startswith(own)} == whole, (
                f"{what}: {path.name} is torn"
            )


def contents(out: Path) -> dict[str, str]:
    """Hashes of the files of a run by relative path, without hidden ones; of JSON without what depends on the time.

    The report repeats the results, and so the seconds; it must be made from these results.
    """
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or any(part.startswith(".") for part in name.split("/")):
            continue
        if name.endswith("report/report.json"):
            sources = [source["sha256"] for source in read_json(path)["sources"]]
            found[name] = str(sources == [hash_json(read_json(path.parent.parent / "results-seed0.json"))])
        elif path.parent.name == "report" and path.suffix != ".png":
            found[name] = str(path.stat().st_size > 0)
        elif path.suffix == ".json":
            found[name] = hash_json(_lasting(read_json(path)))
        elif path.suffix == ".jsonl":
            found[name] = hash_json([_lasting(json.loads(line)) for line in path.read_text().splitlines()])
        else:
            found[name] = hash_file(path)
    return found


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(entry) for key, entry in value.items() if key not in _OF_THE_TIME}
    return [_lasting(entry) for entry in value] if isinstance(value, list) else value


def strike(finished: Finished, stage: str, folder: Path, fault: Fault) -> bool:
    """Builds a stage with ``fault``, then without; returns whether the second command ended with the same bits as ``finished``.

    Otherwise it has refused. The first must end with one line that names a file, unless it was killed or went on.
    """
    place = finished.without(stage, folder)
    life = live(place, fault)
    what = f"{stage}: error {fault.error} at operation {fault.at}, {(life.files.struck or ['never'])[0]}"
    assert life.files.struck, what
    if life.code is not None:
        check_end(life, what)
    finished.check_published(place, what)
    again = live(place)
    check_end(again, f"again after {what}")
    if again.code == 0:
        finished.compare(place, what)
    return again.code == 0


def check_end(life: Life, what: str) -> None:
    """Asserts that a process has ended well, or with one line that names a file and says what to do."""
    if life.code != 0:
        assert life.said.count("\n") == 1 and life.said.startswith("undo: "), f"{what}: {life.said}"
        assert re.search(r"\bout[/']", life.said) and "the same command continues" in life.said, f"{what}: {life.said}"
