"""What a run would do: stages, steps, tokens, memory and time, before anything runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from undo_core.config import RunConfig
from undo_core.data import arithmetic
from undo_core.data.rows import Rows
from undo_core.data.splits import TRAIN_SPLITS, distilled
from undo_core.models import forward_flops, head_flops, initialise, load_tokenizer
from undo_core.pipeline import attack_stage, plan_run
from undo_core.stages import FUNCTIONS, unlearn_config
from undo_core.store import Stage, Store
from undo_core.training import TrainConfig, rows_source, train
from undo_core.training.losses import cross_entropy
from undo_core.unlearn import unlearn_flops
from undo_core.unlearn.activations import find_layers
from undo_core.unlearn.rmu import trained_parameters

BASELINE_BYTES = 550 * 2**20  # a Python process with torch and transformers loaded, measured
MEASURED_PARAMETERS = 20_000_000  # models up to here are timed by two real steps
MATRIX_EFFICIENCY = 0.5  # of a training step against bare matrix products of the same width, measured on small models
REFERENCE_LOGIT_COPIES = {"distill": 8, "pretrain": 4, "unlearn": 4, "relearn": 4}  # [tokens, V] float32 arrays alive at once


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
        memory_bytes: predicted peak of the process.
        folder: of the stage.
        done: whether it is there already.
    """

    title: str
    steps: int
    ruled: bool
    positions: int
    flops: float
    seconds: float
    memory_bytes: int
    folder: str
    done: bool


def plan_rows(config: RunConfig, store: Store) -> tuple[list[Row], int]:
    """The plan's lines, attacks of a model as one, and the disk that the missing stages take.

    Memory of a stage, in float32: 16 bytes a parameter for weights, gradients and AdamW's moments, 4 for a teacher's (RMU: 4, and 16
    more for a trained one); activations of a micro-batch in the layers that are trained through,
    ``4 * positions * layers * (20 * hidden + 3 * intermediate + 3 * heads * length)``; the reference backend's logits,
    ``4 * positions * V * copies``; and the process itself.
    """
    plan, model = plan_run(config), _meta_model(config)  # a missing folder is not looked for on the hub
    parameters = sum(p.numel() for p in model.parameters())
    measure = _Measure(config, model, parameters)
    lines: list[tuple[str, Stage, int]] = [(stage.title, stage, 1) for stage in plan.stages()]
    for entry in plan.models:
        if entry.attacked:
            stage = attack_stage(config, plan, entry, config.relearn.rates[0])
            lines.append((f"relearn {entry.name}, {len(config.relearn.rates)} rates", stage, len(config.relearn.rates)))
    rows, cache_bytes = [], 0
    for title, stage, times in lines:
        length = _row_length(config, stage)
        settings = _training(config, stage)
        steps = 0 if settings is None else settings.steps
        sources = 2 if stage.kind == "unlearn" else 1
        size = 0 if settings is None else settings.batch_size * sources
        positions = steps * size * length
        passes = _passes(stage, model, length)
        ruled = stage.settings.get("recover") is not None or stage.settings.get("stop_retain") is not None
        seconds = 0.0 if settings is None else steps * measure.seconds(size, passes, length)
        flops = passes * forward_flops(model, length) * positions
        if stage.kind == "cache":
            cached = _cached_rows(config, store, plan.prepared)
            steps, positions = -(-cached // stage.settings["batch_size"]), cached * length
            seconds, flops = (
                steps * measure.seconds(stage.settings["batch_size"], 1, length),
                forward_flops(model, length) * positions,
            )
            cache_bytes = 0 if store.done(stage) else cached * (length - 1) * _cache_bytes(stage, model)
        memory = _memory(stage, settings, model, parameters, length)
        done = store.done(stage) if times == 1 else _attacks_done(config, store, plan, stage)
        rows.append(
            Row(title, steps * times, ruled, positions * times, flops * times, seconds * times, memory, stage.name, done)
        )
    missing = sum(len(config.relearn.rates) if "rates" in row.title else 1 for row in rows if not row.done)
    return rows, missing * 4 * parameters + cache_bytes


def plan_table(config: RunConfig) -> RenderableType:
    """``undo plan``: the lines as a table, with sums and what the numbers rest on."""
    from pathlib import Path

    store = Store(Path(config.output) / "stages", FUNCTIONS)
    rows, disk = plan_rows(config, store)
    table = Table(title=f"{config.name}: what would run", title_justify="left", box=None, pad_edge=False)
    for name in ("stage", "steps", "positions", "TFLOP", "memory", "time", "folder"):
        table.add_column(name, justify="left" if name in ("stage", "folder") else "right", no_wrap=True)
    for row in rows:
        steps = "-" if not row.steps else f"{'<= ' if row.ruled else ''}{row.steps:,}"
        took = "there" if row.done else "-" if not row.steps else f"{'<= ' if row.ruled else ''}{_duration(row.seconds)}"
        work = ("-", "-") if not row.steps else (f"{row.positions:,}", f"{row.flops / 1e12:.2f}")
        table.add_row(row.title, steps, *work, f"{row.memory_bytes / 2**30:.2f} GiB", took, row.folder)
    left = [row for row in rows if not row.done]
    total = sum(row.seconds for row in left) / config.workers
    notes = [
        f"To do: {len(left)} of {len(rows)} lines, at most {_duration(total)} with {config.workers} worker(s), {disk / 2**20:,.0f} MiB of disk.",
        "Times are of limits; a stop rule usually ends a stage much earlier. Evaluation and grid extensions come on top.",
        f"Time per step: {_basis(sum(p.numel() for p in _meta_model(config).parameters()))}.",
    ]
    return Group(table, *notes)


def _basis(parameters: int) -> str:
    if parameters <= MEASURED_PARAMETERS:
        return "two real steps of this model, measured now"
    return f"FLOPs over {MATRIX_EFFICIENCY:.0%} of this machine's matrix-product rate, measured now"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _training(config: RunConfig, stage: Stage) -> TrainConfig | None:
    if stage.kind == "relearn":
        return config.relearn.training(stage.settings["rate"])
    return TrainConfig(**stage.settings["train"]) if "train" in stage.settings else None


def _passes(stage: Stage, model: PreTrainedModel, length: int) -> float:
    """Forward passes of the trained model that a step costs; a backward pass is two, a teacher's forward one."""
    if stage.kind == "unlearn":  # of each of its two sources
        flops = unlearn_flops(model, unlearn_config(stage.settings), length)
        return sum(flops.values()) / len(flops) / forward_flops(model, length)
    if stage.kind != "distill":
        return 3
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


def _attacks_done(config: RunConfig, store: Store, plan: Any, first: Stage) -> bool:
    model = next(m for m in plan.models if m.stage.key == first.inputs["model"].key)
    return all(store.done(attack_stage(config, plan, model, rate)) for rate in config.relearn.rates)


def _row_length(config: RunConfig, stage: Stage) -> int:
    """Positions that a row takes: its last token is a label only."""
    if config.data.kind == "arithmetic-compact":
        return arithmetic.compact_splits(seed=0, train_rows=2, eval_prompts=2)[1]["train_retain"].length
    distilled_rows = config.data.distill.sources and stage.kind in ("distill", "cache")
    return (distilled_rows and config.data.distill.length) or config.data.length


def _model_config(config: RunConfig) -> Any:
    if config.model.path:
        return AutoConfig.from_pretrained(config.model.path)
    if config.data.tokenizer:
        size = len(load_tokenizer(config.data.tokenizer))
    else:
        alphabets = {"arithmetic-compact": arithmetic.COMPACT_ALPHABET, "arithmetic": arithmetic.CHARACTERS}
        size = config.data.vocab_size if config.data.kind == "text" else len(alphabets[config.data.kind]) + 2
    settings = {"vocab_size": size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, **config.model.config}
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def _meta_model(config: RunConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_model_config(config))


def _memory(stage: Stage, settings: TrainConfig | None, model: PreTrainedModel, parameters: int, length: int) -> int:
    if settings is None:
        return BASELINE_BYTES + 8 * parameters
    shape = model.config.get_text_config()
    positions = (settings.micro_batch_size or settings.batch_size) * length
    per_layer = 20 * shape.hidden_size + 3 * shape.intermediate_size + 3 * shape.num_attention_heads * length
    layers = shape.num_hidden_layers
    logits = 4 * positions * shape.vocab_size * REFERENCE_LOGIT_COPIES[stage.kind]
    weights = 16 * parameters + (_teacher_bytes(stage, parameters, shape))
    if stage.settings.get("method") == "rmu":
        settings = unlearn_config(stage.settings).rmu
        trained = trained_parameters(find_layers(model), settings)
        weights = 4 * parameters + 16 * sum(p.numel() for named in trained.values() for p in named.values())
        layers, logits = settings.target_layer - min(trained), 0
    activations = 4 * positions * layers * per_layer * (2 if stage.kind == "unlearn" else 1)
    return BASELINE_BYTES + weights + activations + logits


def _teacher_bytes(stage: Stage, parameters: int, shape: Any) -> int:
    """Of a teacher in float32: all of it, or the head where its layers are elsewhere (cached, streamed)."""
    if stage.kind != "distill":
        return 0
    return 4 * (shape.vocab_size * shape.hidden_size if "teacher" in stage.settings else parameters)


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
        ids = torch.randint(1, self.model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
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
