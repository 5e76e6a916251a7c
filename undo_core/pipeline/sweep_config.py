"""Settings of a sweep (a base configuration and what varies in it), and their expansion to the configurations of the runs."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError

from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.config_files import SettingsParser, check_sections, read_settings

MOST_RUNS = 10_000
_KEY = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]*")


@dataclass(frozen=True)
class SweepConfig:
    """A sweep: every entry of ``runs`` with every combination of ``grid``.

    Attributes:
        name: name of the sweep and of its report.
        base: YAML file of a run.
        output: folder of the stages, which all runs share, of the results of each run, and of the report on all runs.
        overlays: further YAML files that override the base, one after the other.
        overrides: dotted keys of the run's configuration and their values, for every run.
        grid: dotted keys and the values that each takes; all combinations are run. Runs that differ only in ``seed`` share a
            name.
        runs: named variants: ``name``, ``overlay`` (a file, or a list of files) and dotted keys with their values.
        workers: number of stages that run in parallel on this machine; None for one on each GPU, or without a GPU the number in
            the base configuration.
        engine: local, for workers on this machine, or ray, for the machines of a Ray cluster, each stage on one GPU; all of them
            must share the working directory and ``output``.
        address: address of the Ray cluster; None for the one that RAY_ADDRESS names or that runs on this machine, else a new one
            of this machine alone.
        cpus: with ray, the number of CPU threads of each process; a continued sweep with the same number ends with the same bits.
        ranks: with ray, the number of processes, each with its own GPU, that train a model together.
    """

    name: str
    base: str
    output: str
    overlays: list[str] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    workers: int | None = None
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    cpus: int = 1
    ranks: int = 1

    def __post_init__(self) -> None:
        if not (self.grid or self.runs):
            raise ValueError("grid, runs: got neither, wanted at least one of them")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers: got {self.workers}, wanted an integer >= 1")
        for name in ("cpus", "ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted an integer >= 1")
        if self.engine == "local" and (self.address, self.cpus, self.ranks) != (None, 1, 1):
            raise ValueError("address, cpus, ranks: got one of them with the engine local, wanted --engine=ray")
        if self.engine == "ray" and self.workers is not None:
            raise ValueError(f"workers: got {self.workers} with the engine ray, which fills the cluster; wanted none")
        for name in ("overrides", "grid", "runs"):
            try:
                json.dumps(getattr(self, name))
            except (TypeError, ValueError) as error:  # a date, a set, bytes: YAML has more kinds of values than a setting
                raise ValueError(f"{name}: {error}, wanted numbers, texts, lists and objects") from None
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{key}: got no values, wanted at least one")
        count = math.prod(map(len, self.grid.values())) * max(1, len(self.runs))
        if count > MOST_RUNS:
            raise ValueError(f"grid, runs: got {count:,} runs, wanted at most {MOST_RUNS:,}")
        for key in ("name", "output"):  # both are printed
            if not getattr(self, key).isprintable():
                raise ValueError(f"{key}: got {getattr(self, key)!r}, wanted a text without control characters")
        names = ["" if run.get("name") is None else str(run["name"]) for run in self.runs]
        for name in names:
            if not _NAME.fullmatch(name) or names.count(name) > 1:
                raise ValueError(
                    f"runs: got the name {name!r}, wanted a unique name of letters, digits and ._+=,- for each run"
                )


def expand(sweep: SweepConfig) -> list[RunConfig]:
    """Returns the configuration of every run, in order, with the run's name and its folder ``OUTPUT/runs/NAME``.

    Raises:
        FileNotFoundError: a file that the sweep names is missing.
        ValueError: a setting of a run is invalid, or two runs would share both name and seed.
    """
    parser = SettingsParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(RunConfig)
    known = {entry.name for entry in dataclasses.fields(RunConfig)}
    configs: list[RunConfig] = []
    short = _short(key for key in sweep.grid if key != "seed")
    for run in sweep.runs or [{}]:
        own = {key: value for key, value in run.items() if key not in ("name", "overlay")}
        overlays = run.get("overlay", [])
        overlays = [overlays] if isinstance(overlays, str) else overlays
        if not isinstance(overlays, list) or not all(isinstance(path, str) for path in overlays):
            raise ValueError(f"runs: got the overlay {overlays!r}, wanted a file or a list of files")
        files = [sweep.base, *sweep.overlays, *overlays]
        for path in files:
            read_settings(path, "base, overlays")
        for values in itertools.product(*sweep.grid.values()):
            chosen = dict(zip(sweep.grid, values, strict=True))
            parts = [str(run["name"])] if run else []
            parts += [f"{short[key]}={_readable(value)}" for key, value in chosen.items() if key != "seed"]
            name = ",".join(parts) or sweep.name
            if Path(name).name != name or name == "..":
                raise ValueError(
                    f"name, grid, runs: got the name {name!r} of a run, wanted the name of a folder in {sweep.output}/runs"
                )
            fixed = {"name": name, "output": str(Path(sweep.output) / "runs" / name)}
            settings = {**sweep.overrides, **own, **chosen, **fixed}
            for key in settings:
                if not isinstance(key, str) or not _KEY.fullmatch(key) or "class_path" in key.split("."):
                    raise ValueError(f"run {name}: got the key {key!r}, wanted a dotted key of a run's settings")
                if key.split(".")[0] not in known:  # not --help, nor another flag of the parser
                    raise ValueError(f"run {name}: unrecognized arguments: --{key}")
            arguments = [f"--config={path}" for path in files] + [f"--{k}={_argument(v)}" for k, v in settings.items()]
            try:
                values = parser.parse_args(arguments)
                check_sections(values, RunConfig)
                read = vars(parser.instantiate(values))
            except (ArgumentError, ValueError) as error:
                raise ValueError(f"run {name}: {error}") from error
            configs.append(RunConfig(**{key: value for key, value in read.items() if key != "config"}))
    for (name, seed), times in collections.Counter((c.name, c.seed) for c in configs).items():
        if times > 1:
            raise ValueError(f"grid, runs: got {times} runs named {name} with seed {seed}, wanted one; list them under runs")
    return configs


def _short(keys: Iterator[str]) -> dict[str, str]:
    """Maps each dotted key to its last part, or to the whole key if several keys share that last part."""
    keys = list(keys)
    last = collections.Counter(key.rpartition(".")[2] for key in keys)
    return {key: key.rpartition(".")[2] if last[key.rpartition(".")[2]] == 1 else key for key in keys}


def _readable(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_")


def _argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
