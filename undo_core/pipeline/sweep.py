"""A sweep: many runs that share one folder of stages, so that common stages are computed once."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from undo_core.io.progress import console
from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.graph import Graph, graph_of
from undo_core.pipeline.run import announce, evaluations, missing_stages, save_results, searched
from undo_core.pipeline.stage import Stage
from undo_core.pipeline.store import Store
from undo_core.pipeline.sweep_config import SweepConfig, expand
from undo_core.pipeline.workers import gpus, run_stages
from undo_core.report import write_report
from undo_core.report.compare import comparison_table, write_comparison

if TYPE_CHECKING:
    from undo_core.pipeline.ray_engine import RayEngine


def run_sweep(sweep: SweepConfig, command: str) -> list[str]:
    """Runs all missing stages of all runs in one pool of workers, or on a cluster, then writes a report on each run and one on all.

    After an interruption, the same call continues where it stopped. A run that fails, even because a file or a package is
    missing, does not stop the others.

    Returns:
        One line for each run that failed.

    Raises:
        ModuleNotFoundError: the engine's package is not installed.
    """
    with contextlib.nullcontext() if sweep.engine == "local" else _cluster(sweep) as cluster:
        return _run(sweep, command, cluster)


def _cluster(sweep: SweepConfig) -> RayEngine:
    from undo_core.pipeline.ray_engine import RayEngine

    return RayEngine(sweep.address, sweep.cpus, sweep.ranks)


def _run(sweep: SweepConfig, command: str, cluster: RayEngine | None) -> list[str]:
    store = Store(Path(sweep.output) / "stages")
    errors: dict[str, str] = {}
    failures: dict[tuple[str, int], str] = {}
    runs: list[tuple[RunConfig, Graph]] = []
    for config in _configs(sweep):
        try:
            graph = graph_of(config)
            all_stages(config, graph, sweep.ranks)
            runs.append((config, graph))
        except _UNPLANNED as error:
            failures[config.name, config.seed] = _line("plan", error)
            console.print(f"  {config.name}: {failures[config.name, config.seed]}")
    store.tidy()
    whole, left = [], runs

    def failed(stage: Stage, error: Exception) -> None:
        errors[stage.key] = _line(stage.title, error)
        console.print(f"  {errors[stage.key]}")

    while left:
        wanted = [missing_stages(store, config, graph) for config, graph in left]
        whole += [run for run, stages in zip(left, wanted, strict=True) if not stages]
        todo = [(*run, stages) for run, stages in zip(left, wanted, strict=True) if stages]
        if todo:
            titled = _titled([(config, stages) for config, _, stages in todo])
            build = functools.partial(run_stages, workers=todo[0][0].workers) if cluster is None else cluster.build
            build(store, titled, finished=lambda stage: announce(store, stage), failed=failed)
        left = []
        for config, graph, stages in todo:
            reason = next((_cause(stage, errors) for stage in stages if not store.done(stage)), None)
            if reason is None:
                left.append((config, graph))
            else:
                failures[config.name, config.seed] = reason
    if cluster is not None:
        pairs = [pair for run in whole for pair in evaluations(store, searched(store, *run))]
        cluster.evaluate(store, list({(stage.key, prepared.key): (stage, prepared) for stage, prepared in pairs}.values()))
    folders: dict[Path, list[dict[str, Any]]] = collections.defaultdict(list)
    for config, graph in sorted(whole, key=lambda run: runs.index(run)):
        try:
            folders[Path(config.output)].append(save_results(store, config, graph, command))
        except Exception as error:  # a failed evaluation must not stop the other runs
            failures[config.name, config.seed] = _line("results", error)
    for folder, saved in folders.items():
        write_report(saved, folder / "report", folder.name)
    loaded = [(str(folder), results) for folder, saved in folders.items() for results in saved]
    if loaded:
        page = write_comparison(loaded, Path(sweep.output) / "report", sweep.name)
        console.print(comparison_table(loaded))
        console.print(str(page))
    return [f"{name}, seed {seed}: {reason}" for (name, seed), reason in failures.items()]


def sweep_table(sweep: SweepConfig) -> RenderableType:
    """Returns tables of what :func:`run_sweep` would run: the runs and how many of their stages are shared and missing."""
    store = Store(Path(sweep.output) / "stages")
    table = Table(title=f"{sweep.name}: the runs", title_justify="left", box=None, pad_edge=False)
    for heading in ("run", "seeds", "stages", "shared", "missing", "results"):
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    stages_of, refused = [], dict[str, list[RunConfig]]()
    for config in (configs := _configs(sweep)):
        try:
            stages_of.append((config, all_stages(config, graph_of(config), sweep.ranks)))
        except _UNPLANNED as error:
            refused.setdefault(_line("plan", error), []).append(config)
    wanted = collections.Counter(key for _, stages in stages_of for key in stages)
    names = list(dict.fromkeys(config.name for config, _ in stages_of))
    for name in names:
        group = [(config, stages) for config, stages in stages_of if config.name == name]
        own = {key: stage for _, stages in group for key, stage in stages.items()}
        inside = collections.Counter(key for _, stages in group for key in stages)
        shared = sum(wanted[key] > inside[key] for key in own)
        missing = sum(not store.done(stage) for stage in own.values())
        done = sum((Path(config.output) / f"results-seed{config.seed}.json").exists() for config, _ in group)
        seeds = ", ".join(str(config.seed) for config, _ in group)
        table.add_row(name, seeds, str(len(own)), str(shared), str(missing), f"{done} of {len(group)}")
    kinds = Table(title="\nTheir stages", title_justify="left", box=None, pad_edge=False)
    for heading in ("kind", "needed", "distinct", "finished", "missing"):
        kinds.add_column(heading, justify="left" if heading == "kind" else "right")
    every = {key: stage for _, stages in stages_of for key, stage in stages.items()}
    needed, distinct, finished = collections.Counter(), collections.Counter(), collections.Counter()
    for key, stage in every.items():
        needed[stage.kind] += wanted[key]
        distinct[stage.kind] += 1
        finished[stage.kind] += store.done(stage)
    for kind, count in distinct.items():
        kinds.add_row(kind, str(needed[kind]), str(count), str(finished[kind]), str(count - finished[kind]))
    shared = sum(times > 1 for times in wanted.values())
    notes = [
        f"{len(stages_of)} runs need {wanted.total()} stages: {len(every)} distinct ones, {shared} of them shared by several "
        f"runs; {len(every) - finished.total()} are missing, to run with {configs[0].workers} worker(s).",
        "Attacks that extend a grid of rates and alphas that a search adds are not included. `undo plan` shows the steps, memory and time of one run.",
    ]
    for reason, left_out in refused.items():
        named = ", ".join(dict.fromkeys(config.name for config in left_out))
        notes.append(Text(f"{len(left_out)} run(s) cannot begin ({named}): {reason}", style="yellow"))
    return Group(table, kinds, "", *notes)


def _configs(sweep: SweepConfig) -> list[RunConfig]:
    configs = expand(sweep)
    workers = sweep.workers or len(gpus()) or configs[0].workers
    return [dataclasses.replace(config, workers=workers) for config in configs]


def all_stages(config: RunConfig, graph: Graph, ranks: int) -> dict[str, Stage]:
    """Every stage of a run by its key, without extensions of attack grids.

    Raises:
        ModuleNotFoundError: a package that an attack needs is not installed.
        ValueError: a stage cannot be run on so many ranks, or the configuration wants ranks that share a head.
    """
    if config.parallel.tensor > 1:
        raise ValueError(
            f"parallel.tensor: got {config.parallel.tensor} in a sweep, wanted 1: stages that runs have in common are trained once, by "
            "ranks with whole heads"
        )
    stages = {stage.key: stage for stage in missing_stages(_EMPTY, config, graph)}
    for stage in stages.values():
        if stage.together:
            stage.check_ranks(ranks)
    return stages


_UNPLANNED = (OSError, ImportError, ValueError)  # a file or a package is missing, or a setting does not fit the model
_EMPTY = Store(Path("/nonexistent"))  # in this store every stage is missing


def _line(what: str, error: Exception) -> str:
    return f"{what}: {type(error).__name__}: {' '.join(str(error).split())}"


def _titled(runs: list[tuple[RunConfig, list[Stage]]]) -> Iterator[Stage]:
    """Yields the stages of all runs; the title of a stage that only one run needs starts with the run's name."""
    several = len({config.name for config, _ in runs}) > 1
    seeds = len({config.seed for config, _ in runs}) > 1
    wanted = collections.Counter(stage.key for _, stages in runs for stage in stages)
    for config, stages in runs:
        parts = [config.name] * several + [f"seed {config.seed}"] * seeds
        for stage in stages:
            alone = wanted[stage.key] == 1 and parts
            yield dataclasses.replace(stage, title=f"{' '.join(parts)}: {stage.title}") if alone else stage


def _cause(stage: Stage, errors: Mapping[str, str]) -> str | None:
    """Returns the error that prevented a stage: its own, or that of a stage it reads; None if there is none."""
    if stage.key in errors:
        return errors[stage.key]
    return next(filter(None, (_cause(source, errors) for source in stage.inputs.values())), None)
