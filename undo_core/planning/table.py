"""Tables of what a run would do, before anything runs: stages, steps, tokens, memory, time and disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.described import planned_skeleton
from undo_core.pipeline.graph import attacked_models, graph_of, measured_models
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.needs import PARTS, Memory, Scene
from undo_core.pipeline.stage import Stage
from undo_core.pipeline.store import Store, load_warning
from undo_core.planning.communication import exchange_collectives, stage_collectives, wire_bytes
from undo_core.planning.models import distilled_sequences, predictor_of, sequence_length
from undo_core.planning.timing import Measure, basis
from undo_core.report.table import count

Line = tuple[str, list[Stage]]
SHORT_RUN = 'docs/guides/checkpoint.md, "A small model, or a first trial"'  # what to cut in a run that takes too long
SHORT_ATTACK = 'docs/guides/attack.md, "A short attack on a CPU"'


@dataclass(frozen=True)
class Row:
    """One line of the plan.

    Attributes:
        title: title of the stage.
        steps: maximum number of optimizer steps.
        ruled: whether a stop rule may end the stage earlier.
        positions: tokens that run through the trained model, padding included.
        flops: maximum number of floating-point operations.
        seconds: predicted maximum time; 0 if it is not predicted.
        memory: predicted peak memory, by parts.
        measured_bytes: measured peak memory of a finished stage, else None.
        disk_bytes: bytes that the stage's folder takes on disk.
        scratch_bytes: bytes on disk that one trial needs for a while beyond that, for its checkpoints.
        wire_bytes: bytes that each of several ranks sends to the others in a step.
        folder: name of the stage's folder.
        done: whether the stage is finished.
        time_from: the settings on which its time depends.
    """

    title: str
    steps: int
    ruled: bool
    positions: int
    flops: float
    seconds: float
    memory: Memory
    measured_bytes: int | None
    disk_bytes: int
    scratch_bytes: int
    wire_bytes: float
    folder: str
    done: bool
    time_from: str = ""


def plan_rows(config: RunConfig, store: Store, ranks: int = 1) -> tuple[list[Row], int]:
    """Returns the lines of the plan, with one line for all trials of an attack on a model, and the disk space still needed at most."""
    graph = graph_of(config)
    lines = [(stage.title, [stage]) for stage in graph.stages()]
    for models in attacked_models(config, graph).values():
        for attacked in models.values():
            lines += attacked.lines()
    for models in measured_models(config, graph).values():
        lines += [(stage.title, [stage]) for stage in models.values()]
    return rows_of(config, lines, graph.prepared, store, ranks)


def rows_of(config: RunConfig, lines: list[Line], prepared: Stage, store: Store, ranks: int = 1) -> tuple[list[Row], int]:
    """Returns the rows for these lines, each a title and stages that differ only in their settings, and the disk still needed at most:
    the stages' folders, and the checkpoints of as many of them as run at the same time.

    ``prepared`` is the stage of the data. It must have been made before: it raises for a missing folder, which transformers would
    look up on the hub.
    """
    model = planned_skeleton(config)
    measure = Measure(config, model, sum(parameter.numel() for parameter in model.parameters()))
    for stage in (stage for _, stages in lines for stage in stages):
        stage.check_ranks(ranks)
    predict, distilled = predictor_of(config, ranks), distilled_sequences(config, store, prepared)
    some_untied = any(stage.untied for _, stages in lines for stage in stages)
    untied = planned_skeleton(config, untied=True) if some_untied else model
    rows, scratch = [], []
    for title, stages in lines:
        stage, times = largest(stages), len(stages)
        scene = Scene(untied if stage.untied else model, sequence_length(config, stage), distilled)
        cost = stage.cost(scene)
        seconds = cost.steps * measure.seconds(cost.sequences, cost.passes, scene.length) if cost.steps else 0.0
        if (estimated := stage.estimated_seconds(scene)) is not None:
            seconds = estimated
        row = Row(
            title=title,
            steps=cost.steps * times,
            ruled=cost.ruled,
            positions=cost.positions * times,
            flops=cost.flops * times,
            seconds=seconds * times,
            memory=predict(stage)(stage),
            measured_bytes=store.manifest(stage)["peak_bytes"] if store.done(stage) else None,
            disk_bytes=cost.disk * times,
            scratch_bytes=cost.scratch,
            wire_bytes=_wire(predict(stage), stage) if ranks > 1 else 0.0,
            folder=stage.name,
            done=all(map(store.done, stages)),
            time_from=stage.time_from,
        )
        rows.append(row)
        scratch += [cost.scratch] * sum(not store.done(stage) for stage in stages)
    at_once = sorted(scratch)[-config.workers :]
    return rows, sum(row.disk_bytes for row in rows if not row.done) + sum(at_once)


def _wire(predictor: Predictor, stage: Stage) -> float:
    shared = exchange_collectives(predictor.exchanges(stage), predictor.tensor)
    return wire_bytes([*stage_collectives(predictor.traffic(stage), predictor.ranks), *shared])


def plan_table(config: RunConfig, ranks: int = 1) -> RenderableType:
    """Returns the output of ``undo plan``: a table of work, a table of memory, and notes with totals and the basis of times.

    From 80 columns on, no number is cut; titles of stages are folded.
    """
    return _tables(config, *plan_rows(config, Store(Path(config.output) / "stages"), ranks), ranks)


def stages_table(config: RunConfig, lines: list[Line], prepared: Stage) -> RenderableType:
    """Returns the same tables for the lines of ``undo attack``, as in :func:`rows_of`."""
    return _tables(config, *rows_of(config, lines, prepared, Store(Path(config.output) / "stages")), 1, SHORT_ATTACK)


def _tables(config: RunConfig, rows: list[Row], disk: int, ranks: int, guide: str = SHORT_RUN) -> RenderableType:
    work = _table(
        f"{config.name}: what would run, disk in MiB", "stage", "steps", "positions", "FLOP", "time", "disk", "folder"
    )
    size = 2**30 if max(row.memory.total for row in rows) >= 8 * 2**30 else 2**20
    unit = "GiB" if size == 2**30 else "MiB"
    shown = lambda number: f"{number / size:,.1f}" if size == 2**30 else f"{number / size:,.0f}"  # noqa: E731
    of, sent = ("", ()) if ranks == 1 else (f" of one of {ranks} ranks", ("MiB/step",))
    known = ("measured",) if any(row.measured_bytes is not None for row in rows) else ()
    memory = _table(f"\nPeak memory{of}, predicted by parts, {unit}", "stage", "peak", *known, "during", *_HEADINGS, *sent)
    for row in rows:
        limit = "<= " if row.ruled else ""
        took = "done" if row.done else f"{limit}{_duration(row.seconds)}" if row.seconds else "-"
        done = (f"{limit}{row.steps:,}", count(row.positions), count(row.flops)) if row.steps else ("-", "-", "-")
        work.add_row(row.title, *done, took, f"{row.disk_bytes / 2**20:,.0f}", row.folder)
    for title, row in _alike(rows):
        measured = ["-" if row.measured_bytes is None else shown(row.measured_bytes)] if known else []
        parts = [shown(getattr(row.memory, part)) for part in PARTS]
        moved = [f"{row.wire_bytes / 2**20:,.1f}" if row.wire_bytes else "-"] if sent else []
        memory.add_row(title, shown(row.memory.total), *measured, row.memory.phase, *parts, *moved)
    left = [row for row in rows if not row.done]
    total = sum(row.seconds for row in left) / config.workers
    notes = [
        f"To do: {len(left)} of {len(rows)} line{'s'[: len(rows) > 1]}; an estimated {_duration(total)} with {config.workers} worker(s), "
        f"up to {disk / 2**20:,.0f} MiB of disk{_of_checkpoints(left, disk)}.",
        "The estimate takes every stage to its last step: a stop rule usually ends one much earlier. It leaves out evaluations, grid "
        "extensions, loading and saving, and the lines without a time.",
        f"Time per step: {basis(sum(p.numel() for p in planned_skeleton(config).parameters()))}.",
    ]
    if config.target_robustness is not None:
        notes.append(
            f"The search for R = {config.target_robustness:g} is not included: it may add {config.alpha_tries} alphas, each distilled "
            "and attacked like those above."
        )
    if left and (busy := load_warning(config.workers)):
        notes.append(f"{busy} The times above are longer for it.")
    if total > LONG:
        notes.append(_what_to_cut(left, sum(row.seconds for row in left), guide))
    if ranks > 1:
        notes.append(
            f"Stages that send nothing run on rank 0. Times are of one process: {ranks} ranks divide the work of a step, but also wait "
            "for what they send, MiB/step for each of them."
        )
        if config.parallel.tensor > 1:
            notes.append(f"Groups of {config.parallel.tensor} ranks share a head (parallel.tensor).")
    elif config.workers > 1:
        notes.append(f"Memory is that of one stage; up to {config.workers} stages run at the same time.")
    else:
        notes.append("Memory is that of the process that runs the stage.")
    if any(row.memory.process for row in rows):
        notes.append(ON_A_CPU)
    return Group(work, memory, "", *notes)


def _of_checkpoints(rows: list[Row], disk: int) -> str:
    """The part of the disk space that is only for checkpoints within stages."""
    passing = disk - sum(row.disk_bytes for row in rows)
    return f", {passing / 2**20:,.0f} of them for checkpoints of training, which are removed" if passing else ""


def _what_to_cut(rows: list[Row], total: float, guide: str) -> str:
    """The settings on which most of a long plan's time depends, and where the guide says what to cut."""
    spent: dict[tuple[str, str], float] = {}
    for row in rows:
        kind = row.folder.rpartition("-")[0], row.time_from
        spent[kind] = spent.get(kind, 0.0) + row.seconds
    most = sorted(spent, key=lambda kind: -spent[kind])[:2]
    parts = [f"{kind[0]} {spent[kind] / total:.0%} ({kind[1]})" for kind in most if spent[kind]]
    return (
        f"This takes longer than a day on this machine. Most of it: {', '.join(parts)}; all grow with data.length. "
        f"What to cut: {guide}."
    )


def largest(stages: list[Stage]) -> Stage:
    """Returns the stage with the longest sequences: the one with the most few-shot examples."""
    return max(stages, key=lambda stage: stage.settings.get("shots", 0))


def _alike(rows: list[Row]) -> list[tuple[str, Row]]:
    """The lines with titles for the table of memory; those of one kind, by the first word of their titles, that agree are one."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.title.split()[0], row.memory, row.measured_bytes, row.wire_bytes), []).append(row)
    return [
        (group[0].title if len(group) == 1 else f"{group[0].title.split()[0]}, {len(group)} lines", group[0])
        for group in groups.values()
    ]


ON_A_CPU = (  # measured with configs/hf-trial.yaml, see docs/guides/memory.md
    "On a CPU, leave room for a fifth more: glibc's heap keeps freed memory that does not fit later tensors. Three stages of a model of "
    "135M parameters took 9 to 17 % more than predicted; with MALLOC_MMAP_THRESHOLD_=262144 set, the unlearning took 0.5 % more."
)
LONG = 24 * 3600.0  # seconds from which the plan says what to cut
_HEADINGS = ("weights", "grads", "optim.", "activ.", "work", "teacher", "process")


def _table(title: str, *names: str) -> Table:
    """A table of which only the first column is folded where the terminal is narrow; numbers are never cut."""
    table = Table(title=Text(title, "table.title"), title_justify="left", box=None, pad_edge=False, collapse_padding=True)
    for name in names:
        left = name in ("stage", "folder", "during")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "stage", overflow="fold")
    return table


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
