"""What a run would do: stages, steps, tokens, memory and time, before anything runs."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from transformers import AutoConfig, PreTrainedModel

from undo_core.attacks.config import attack_config
from undo_core.checkpoint_files import INDEX, SINGLE, stored_dtype
from undo_core.data import arithmetic
from undo_core.data.rows import Rows
from undo_core.data.splits import TRAIN_SPLITS, check_lengths, distilled
from undo_core.models import architecture, forward_flops, head_flops, initialise, load_tokenizer, make, positions_of
from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.functions import FUNCTIONS
from undo_core.pipeline.graph import attacked_models, plan_run
from undo_core.pipeline.meta import PARTS, Memory, Predictor
from undo_core.pipeline.store import Stage, Store
from undo_core.planning.fit import Fit, apply_changes, cheapest_fit
from undo_core.training import TrainConfig, rows_source, train
from undo_core.training.losses import cross_entropy
from undo_core.training.precision import weight_dtype
from undo_core.unlearning import unlearn_config, unlearn_flops

MEASURED_PARAMETERS = 20_000_000  # models up to here are timed by two real steps
MATRIX_EFFICIENCY = 0.5  # of a training step against bare matrix products of the same width, measured on small models

Predict = Callable[..., Memory]


@dataclass(frozen=True)
class Row:
    """One line of the plan.

    Attributes:
        title: of the stage.
        steps: optimizer steps, at most.
        ruled: whether a stop rule may end it earlier.
        positions: run through the trained model, padding included.
        flops: at most.
        seconds: predicted, at most.
        memory: predicted peak, by parts.
        measured_bytes: the peak that was measured, of a stage that is there.
        disk_bytes: of what it leaves behind.
        folder: of the stage.
        done: whether it is there already.
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
    folder: str
    done: bool


def plan_rows(config: RunConfig, store: Store) -> tuple[list[Row], int]:
    """The plan's lines, attacks of a model as one, and the disk that the missing stages take; memory by :mod:`undo_core.pipeline.meta`."""
    plan, model = plan_run(config), _meta_model(config)  # a missing folder is not looked for on the hub
    parameters = sum(p.numel() for p in model.parameters())
    measure = _Measure(config, model, parameters)
    lines = [(stage.title, [stage]) for stage in plan.stages()]
    for models in attacked_models(config, plan).values():
        for attacked in models.values():
            of = "rates" if attacked.config.trains and attacked.config.seeds == 1 else "trials"
            lines.append((f"{attacked.title}, {len(attacked.stages())} {of}", attacked.stages()))
    predict = _predictor(config)
    rows = []
    for title, stages in lines:
        stage, times = _largest(stages), len(stages)
        length = _row_length(config, stage)
        settings = _training(config, stage)
        steps = 0 if settings is None else settings.steps
        size = 0 if settings is None else settings.batch_size * _sources(stage)
        positions = steps * size * length
        passes = _passes(stage, model, length)
        ruled = stage.settings.get("recover") is not None or stage.settings.get("stop_retain") is not None
        seconds = 0.0 if settings is None else steps * measure.seconds(size, passes, length)
        flops = passes * forward_flops(model, length) * positions
        disk = times * parameters * (4 if settings is None else weight_dtype(settings.precision).itemsize)
        if stage.kind == "cache":
            cached = _cached_rows(config, store, plan.prepared)
            steps, positions = -(-cached // stage.settings["batch_size"]), cached * length
            seconds = steps * measure.seconds(stage.settings["batch_size"], 1, length)
            flops = forward_flops(model, length) * positions
            disk = cached * (length - 1) * _cache_bytes(stage, model)
        if stage.kind == "gate":
            disk = _cached_rows(config, store, plan.prepared) + 8 * stage.settings["buckets"]
        if stage.kind == "probe":  # a manifest
            disk = 0
        done = all(map(store.done, stages))
        measured = store.manifest(stage)["peak_bytes"] if store.done(stage) else None
        memory = predict(stage)
        work = (steps * times, ruled, positions * times, flops * times, seconds * times)
        rows.append(Row(title, *work, memory, measured, disk, stage.name, done))
    return rows, sum(row.disk_bytes for row in rows if not row.done)


def plan_table(config: RunConfig) -> RenderableType:
    """``undo plan``: the lines as two tables, work and memory, with sums and what the numbers rest on."""
    rows, disk = plan_rows(config, _store(config))
    work = _table(f"{config.name}: what would run", "stage", "steps", "positions", "TFLOP", "time", "disk MiB", "folder")
    size = 2**30 if max(row.memory.total for row in rows) >= 8 * 2**30 else 2**20
    unit = "GiB" if size == 2**30 else "MiB"
    shown = lambda count: f"{count / size:,.1f}" if size == 2**30 else f"{count / size:,.0f}"  # noqa: E731
    memory = _table(f"\nPeak memory, predicted by parts, {unit}", "stage", "peak", "measured", "during", *_HEADINGS)
    for row in rows:
        limit = "<= " if row.ruled else ""
        took = "there" if row.done else "-" if not row.steps else f"{limit}{_duration(row.seconds)}"
        done = (f"{limit}{row.steps:,}", f"{row.positions:,}", f"{row.flops / 1e12:.2f}") if row.steps else ("-", "-", "-")
        work.add_row(row.title, *done, took, f"{row.disk_bytes / 2**20:,.0f}", row.folder)
        measured = "-" if row.measured_bytes is None else shown(row.measured_bytes)
        parts = [shown(getattr(row.memory, part)) for part in PARTS]
        memory.add_row(row.title, shown(row.memory.total), measured, row.memory.moment, *parts)
    left = [row for row in rows if not row.done]
    total = sum(row.seconds for row in left) / config.workers
    notes = [
        f"To do: {len(left)} of {len(rows)} lines, at most {_duration(total)} with {config.workers} worker(s), {disk / 2**20:,.0f} MiB of disk.",
        "Times are of limits; a stop rule usually ends a stage much earlier. Evaluation and grid extensions come on top.",
        f"Time per step: {_basis(sum(p.numel() for p in _meta_model(config).parameters()))}.",
        f"Memory is of one stage; {config.workers} run side by side."
        if config.workers > 1
        else "Memory is of the process that runs.",
    ]
    return Group(work, memory, "", *notes)


def fit_notes(config: RunConfig, limit: int) -> tuple[list[str], list[str]]:
    """What to do for every stage to fit in ``limit`` bytes: flags to add, and a line for each stage that no flags can help."""
    predict, groups = _predictor(config), dict[str, list[Stage]]()
    plan = plan_run(config)
    attacks = {name: next(iter(models.values())).stages() for name, models in attacked_models(config, plan).items()}
    sections = {stage.key: name for name, trials in attacks.items() for stage in trials}
    for stage in plan.stages() + [_largest(trials) for trials in attacks.values()]:
        if predict(stage).total > limit:
            groups.setdefault(sections.get(stage.key, stage.kind), []).append(stage)  # a flag is of all stages of a kind
    flags, hopeless = [], []
    for name, group in groups.items():
        kind = group[0].kind
        section = f"attacks.{name}" if name in config.attacks else kind

        def need(changes: dict[str, Any], group: list[Stage] = group) -> int:
            return max(_peak(predict, stage, changes) for stage in group)

        title = name if len(group) > 1 or group[0].key in sections else group[0].title
        changeable = kind == "relearn" or "train" in group[0].settings
        fit, least = cheapest_fit(kind, group[0].settings, limit, need) if changeable else (None, Fit({}, need({})))
        if fit is None:
            with_ = f"with {_flags(section, least)}" if least.changes else "and no setting changes that"
            hopeless.append(f"{title} needs at least {_gib(least.memory_bytes)} GiB, {with_}")
        else:
            flags.append(f"{title}: {_gib(need({}))} GiB; {_gib(fit.memory_bytes)} GiB with {_flags(section, fit)}")
    return flags, hopeless


def _largest(stages: list[Stage]) -> Stage:
    """The one whose rows are longest."""
    return max(stages, key=lambda stage: stage.settings.get("shots", 0))


def bytes_of(text: str) -> int:
    """``24GB`` (powers of 1000), ``24GiB`` (of 1024), ``500MB`` or a number of bytes, in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ValueError(f"memory: got {text!r}, wanted a size such as 24GB, 24GiB or 500MB")
    power = " KMGT".index(found[2].upper()) if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


_HEADINGS = ("weights", "grads", "optim.", "activ.", "work", "teacher", "process")


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, collapse_padding=True)
    for name in names:
        table.add_column(name, justify="left" if name in ("stage", "folder", "during") else "right", no_wrap=True)
    return table


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def _flags(section: str, fit: Fit) -> str:
    return " ".join(f"--{section}.{path}={str(value).lower()}" for path, value in fit.changes.items())


def _peak(predict: Predict, stage: Stage, changes: dict[str, Any]) -> int:
    """Of a stage with changed settings, and of the cache that a cached teacher asks for."""
    settings = apply_changes(stage.settings, changes)
    peak = predict(stage, settings).total
    if "teacher.kind" in changes:
        size = settings["train"]["micro_batch_size"] or settings["train"]["batch_size"]
        peak = max(peak, predict(stage, {"kind": "cached", "dtype": "float32", "batch_size": size}, "cache").total)
    return peak


def _store(config: RunConfig) -> Store:
    return Store(Path(config.output) / "stages", FUNCTIONS)


def _predictor(config: RunConfig) -> Predict:
    """Memory of a stage, or of it with other settings or as another kind; stages read rows of different lengths."""

    @functools.cache
    def of_length(length: int) -> Predictor:
        data = 0 if config.data.kind == "text" else 2 * 2 * 4 * config.data.train_rows * length  # both splits, and their union
        scored = {"answers": config.data.metric == "accuracy", "choices": 4 if config.data.questions else 0}  # as most have
        return Predictor(_model_config(config), length, **scored, data_bytes=data)

    def predict(stage: Stage, settings: dict[str, Any] | None = None, kind: str | None = None) -> Memory:
        predictor = of_length(_row_length(config, stage))
        return predictor(kind or stage.kind, stage.settings if settings is None else settings, _stored(config, stage))

    return predict


def _stored(config: RunConfig, stage: Stage) -> torch.dtype:
    """Dtype of the weights in the folder that the stage reads its model from."""
    names = [name for name in ("student", "model", "teacher", "prepared") if name in stage.inputs]
    if names:
        source = stage.inputs[names[0]]
        if "train" in source.settings:
            return weight_dtype(source.settings["train"]["precision"])
        return torch.float32 if source.kind == "initialise" else _stored(config, source)
    path = config.model.path and Path(config.model.path)
    there = path and any((path / name).is_file() for name in (INDEX, SINGLE))
    return stored_dtype(path) if there else torch.float32


def _basis(parameters: int) -> str:
    if parameters <= MEASURED_PARAMETERS:
        return "two real steps of this model, measured now"
    return f"FLOPs over {MATRIX_EFFICIENCY:.0%} of this machine's matrix-product rate, measured now"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _training(config: RunConfig, stage: Stage) -> TrainConfig | None:
    if stage.kind == "relearn":
        return attack_config(stage.settings).training(stage.settings["rate"])
    return TrainConfig(**stage.settings["train"]) if "train" in stage.settings else None


def _sources(stage: Stage) -> int:
    """How many batches a step reads."""
    return 2 if stage.kind == "unlearn" and stage.settings["retain_weight"] else 1


def _passes(stage: Stage, model: PreTrainedModel, length: int) -> float:
    """Forward passes of the trained model that a step costs; a backward pass is two, a teacher's forward one."""
    if stage.kind == "unlearn":  # of each of its sources
        flops = unlearn_flops(model, unlearn_config(stage.settings), length)
        return sum(flops.values()) / _sources(stage) / forward_flops(model, length)
    if stage.kind != "distill":
        return 2 if stage.settings.get("kind") == "lora" else 3
    if "cache" not in stage.inputs:
        return 4
    exact = stage.settings["teacher"]["kind"] == "cached"  # the teacher's head is left to each step
    return 3 + (head_flops(model) / forward_flops(model, length) if exact else 0)


def _cached_rows(config: RunConfig, store: Store, prepared: Stage) -> int:
    """Rows that a cached teacher reads: at most, where problems are packed and not prepared yet; unknown text counts as none."""
    if store.done(prepared):
        splits = store.manifest(prepared)["splits"]
        return sum(splits[name]["rows"] for name in (TRAIN_SPLITS[part] for part in distilled(splits)))
    return 0 if config.data.kind == "text" else 2 * config.data.train_rows


def _cache_bytes(stage: Stage, model: PreTrainedModel) -> int:
    """Bytes that a cache stores of a position."""
    if stage.settings["kind"] == "topk":
        return 8 * stage.settings["k"]
    return model.config.get_text_config().hidden_size * getattr(torch, stage.settings["dtype"]).itemsize + 4


def _row_length(config: RunConfig, stage: Stage) -> int:
    """Positions that a row takes: its last token is a label only."""
    if config.data.kind == "arithmetic-compact":
        return arithmetic.compact_splits(seed=0, train_rows=2, eval_prompts=2)[1]["train_retain"].length
    distilled_rows = config.data.distill.sources and stage.kind in ("distill", "cache")
    return (distilled_rows and config.data.distill.length) or config.data.length


def _model_config(config: RunConfig) -> Any:
    if config.model.path:
        return AutoConfig.from_pretrained(config.model.path, trust_remote_code=False)
    if config.data.tokenizer:
        size = len(load_tokenizer(config.data.tokenizer))
    else:
        alphabets = {"arithmetic-compact": arithmetic.COMPACT_ALPHABET, "arithmetic": arithmetic.CHARACTERS}
        size = config.data.vocab_size if config.data.kind == "text" else len(alphabets[config.data.kind]) + 2
    settings = {"vocab_size": size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, **config.model.config}
    return architecture(settings)


def _meta_model(config: RunConfig) -> PreTrainedModel:
    described = _model_config(config)
    check_lengths(dataclasses.asdict(config.data), positions_of(described))
    with torch.device("meta"):
        return make(described)


class _Measure:
    """Seconds of a training step on this machine."""

    def __init__(self, config: RunConfig, model: PreTrainedModel, parameters: int) -> None:
        self.config, self.model = config, model
        self.real = initialise(_model_config(config), 0) if parameters <= MEASURED_PARAMETERS else None
        self.rate = None if self.real is not None else self._matrix_rate()
        self.known: dict[tuple[int, int], float] = {}

    def seconds(self, rows: int, passes: float, length: int) -> float:
        """Of one step on ``rows`` rows of ``length`` that costs ``passes`` forward passes."""
        if self.real is None:
            return passes * forward_flops(self.model, length) * rows * length / (self.rate * MATRIX_EFFICIENCY)
        if (rows, length) not in self.known:
            self.known[rows, length] = self._step(rows, length)
        return self.known[rows, length] * passes / 3

    def _step(self, rows: int, length: int) -> float:
        ids = torch.randint(
            1, self.model.config.get_text_config().vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)
        )
        source = {"text": rows_source(Rows(ids, pad_id=0), rows, 0)}
        loss = lambda model, batches, counted: cross_entropy(model, batches["text"], counted["text"])  # noqa: E731
        train(self.real, loss, source, TrainConfig(steps=1, batch_size=rows), progress=False)  # the first step warms up
        began = time.perf_counter()
        train(self.real, loss, source, TrainConfig(steps=2, batch_size=rows), progress=False)
        return (time.perf_counter() - began) / 2

    def _matrix_rate(self) -> float:
        """FLOP/s of a float32 product at the model's width."""
        width = self.model.config.get_text_config().hidden_size
        device = "cuda" if torch.cuda.is_available() else "cpu"
        a, b = torch.randn(1024, width, device=device), torch.randn(width, 4 * width, device=device)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            float((a @ b)[0, 0])
            times.append(time.perf_counter() - began)
        return 2 * a.shape[0] * width * 4 * width / min(times)
