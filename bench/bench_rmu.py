"""Compares RMU's step and its bare loss with the usual way, on the CPU in one process; on a GPU it compares the bare loss only.

step: forget and retain text through a 12-layer decoder, backward, AdamW. The usual way keeps two whole models, asks for every
hidden
      state (and so computes every layer and the logits), and gives every parameter a gradient and two moments.
op:   loss and gradient of [tokens, width] activations: ops.rmu_loss beside mse_loss in the same dtype.

Loss and gradients are compared at the timed size before anything is timed: those of the step with the usual way's, those of the
op with float64. Errors, memory and times are each recorded with the backend and plan that undo-core's kernels report; it is an
error if these differ. Memory is the peak of a separate process, less what it held before it built its models (step), or less
inputs and gradient (op). Times are interleaved, see harness.py. Prints a table; results go to
bench/results/rmu-cpu/MACHINE-VERSION.json.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
import undo_kernels
from contenders import note_ran, observed, summarised, watched
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from undo_core import ops
from undo_core.training import TrainConfig
from undo_core.training.batches import Batch
from undo_core.unlearning import METHODS, RMUConfig, UnlearnConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COEFFICIENT = 6.5
CONTENDERS = ("undo-core", "usual")

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class StepRow:
    """A benchmarked step: the model, the batch and the layers that are trained."""

    id: str
    first: int
    target: int
    layers: int = 12
    width: int = 256
    inner: int = 1024
    vocabulary: int = 16000
    rows: int = 4
    length: int = 64


@dataclass(frozen=True)
class OpRow:
    """A benchmark of the bare loss."""

    id: str
    dtype: str
    frozen: bool
    tokens: int = 3072
    width: int = 2304


# The layers as published, scaled to 12: WMDP 10 to 15 of 26, arithmetic and language 5 to 11 of 14.
ROWS = [
    StepRow("step-wmdp", 5, 7),
    StepRow("step-arithmetic", 4, 9),
    OpRow("op-f32", "float32", frozen=False),
    OpRow("op-f32-frozen", "float32", frozen=True),
    OpRow("op-bf16", "bfloat16", frozen=False),
    OpRow("op-bf16-frozen", "bfloat16", frozen=True),
]
SMALL = {"width": 32, "inner": 64, "vocabulary": 100, "rows": 2, "length": 8}
QUICK = [StepRow("quick-step", 1, 3, layers=4, **SMALL), OpRow("quick-op", "float32", False, 7, 33)]


# -- the step ------------------------------------------------------------------------------------------------------------------


def build_model(row: StepRow) -> PreTrainedModel:
    """Returns a Llama model with random weights."""
    config = AutoConfig.for_model(
        "llama", hidden_size=row.width, intermediate_size=row.inner, num_hidden_layers=row.layers, vocab_size=row.vocabulary,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=row.length,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def batches(row: StepRow) -> dict[str, Batch]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, row.vocabulary, (row.rows, row.length), generator=generator) for _ in range(2)]
    return {name: Batch(i, torch.ones_like(i, dtype=torch.bool)) for name, i in zip(("forget", "retain"), ids, strict=True)}


def settings(row: StepRow) -> UnlearnConfig:
    rmu = RMUConfig(first_layer=row.first, target_layer=row.target, coefficient=COEFFICIENT)
    return UnlearnConfig(method="rmu", rmu=rmu, train=TrainConfig(seed=0))


Stepper = Callable[[bool], torch.Tensor]  # takes a step and returns the loss; with False it only computes the gradients


def undo_step(row: StepRow, model: PreTrainedModel) -> Stepper:
    method, parts = METHODS["rmu"](model, settings(row)), batches(row)
    optimizer = torch.optim.AdamW(method.parameters, lr=1e-5, fused=True)
    counted = {name: batch.counted for name, batch in parts.items()}
    model.train()

    def step(update: bool = True) -> torch.Tensor:
        with method.alone(model):
            loss = method.loss(model, parts, counted)
            loss.backward()
        if update:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def usual_step(row: StepRow, model: PreTrainedModel) -> Stepper:
    frozen, parts = copy.deepcopy(model).eval().requires_grad_(False), batches(row)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    direction = COEFFICIENT * ops.misdirection(row.width, 0)
    model.train()

    def hidden(model: PreTrainedModel, name: str) -> torch.Tensor:
        return model(input_ids=parts[name].input_ids, output_hidden_states=True).hidden_states[row.target][:, 1:]

    def step(update: bool = True) -> torch.Tensor:
        forget, retain = hidden(model, "forget"), hidden(model, "retain")
        with torch.no_grad():
            target = hidden(frozen, "retain")
        loss = (forget - direction).square().mean() + F.mse_loss(retain, target)
        loss.backward()
        if update:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


STEPS = {"undo-core": undo_step, "usual": usual_step}


def step_errors(row: StepRow) -> dict[str, Any]:
    """Returns the relative differences of loss and trained gradients between the two ways.

    undo-core takes a few steps first; the usual way then gets its weights. The result also has what undo-core's step ran.
    """
    model = build_model(row)
    ours, other = undo_step(row, model), copy.deepcopy(model)
    theirs = usual_step(row, other)
    for _ in range(3):
        ours(True)
    other.load_state_dict(model.state_dict())
    loss, ran = observed(lambda: ours(False))
    losses = [float(loss), float(theirs(False))]
    twin = dict(other.named_parameters())
    pairs = [(p.grad, twin[name].grad) for name, p in model.named_parameters() if p.grad is not None]
    assert len(pairs) == row.target - row.first
    worst = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return {"loss": abs(losses[0] / losses[1] - 1), "gradient": worst, "ran": {"both": ran}}


# -- the op --------------------------------------------------------------------------------------------------------------------


def draw(row: OpRow, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(row.tokens, row.width, generator=generator).to(device, DTYPES[row.dtype]).requires_grad_()
    shape = (row.tokens, row.width) if row.frozen else (row.width,)
    return hidden, torch.randn(shape, generator=generator).to(device, DTYPES[row.dtype])


def op(name: str, row: OpRow, hidden: torch.Tensor, target: torch.Tensor) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    def loss() -> torch.Tensor:
        if name == "undo-core":
            return ops.rmu_loss(hidden, target, coefficient=COEFFICIENT)
        return F.mse_loss(hidden, (COEFFICIENT * target).expand_as(hidden))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        value = loss()
        return value.detach(), torch.autograd.grad(value, hidden)[0]

    return run


def op_errors(name: str, row: OpRow, device: str) -> dict[str, Any]:
    """Returns the relative errors of loss and gradient of the timed problem against float64."""
    hidden, target = draw(row, device)
    (loss, gradient), ran = observed(op(name, row, hidden, target))
    difference = hidden.detach().double() - COEFFICIENT * target.double()
    wanted = 2 * difference / difference.numel()
    found = float(difference.square().mean())
    worst = float((gradient.double() - wanted).norm() / wanted.norm())
    return {"loss": abs(float(loss) / found - 1), "gradient": worst, "ran": {"both": ran}}


# -- measuring -----------------------------------------------------------------------------------------------------------------


def worker(request: dict[str, Any]) -> None:
    """Runs in a separate process: prints one contender's peak memory as JSON."""
    name = request["contender"]
    if request["kind"] == "step":
        row, small = StepRow(**request["row"]), QUICK[0]

        def steps(row: StepRow) -> None:
            step = STEPS[name](row, build_model(row))
            for _ in range(2):  # the second step holds the optimizer's moments beside its activations
                step(True)

        steps(small)
        measured = watched(lambda: harness.peak_extra_cpu(lambda: None, lambda: steps(row), 0))
    else:
        row = OpRow(**request["row"])
        inputs = draw(row)
        warm = dataclasses.replace(row, tokens=7)
        size = inputs[0].numel() * inputs[0].element_size()
        op(name, warm, *draw(warm))()
        measured = watched(lambda: harness.peak_extra_cpu(lambda: None, op(name, row, *inputs), size))
    print(json.dumps(measured))


def measure(row: StepRow | OpRow, options: argparse.Namespace) -> dict[str, Any]:
    kind = "step" if isinstance(row, StepRow) else "op"
    load = os.getloadavg()
    records: dict[str, dict[str, Any]] = {name: {"name": name, "samples_s": [], "ran": {}} for name in CONTENDERS}
    for name, record in records.items():
        if options.device == "cuda":
            inputs = draw(row, "cuda")
            run = op(name, row, *inputs)
            run()
            size = inputs[0].numel() * inputs[0].element_size()
            record["memory"] = watched(lambda run=run, size=size: harness.peak_extra_cuda(run, size))
        elif not options.no_memory:
            request = {"kind": kind, "row": asdict(row), "contender": name}
            record["memory"] = harness.in_fresh_process(Path(__file__), request, torch.get_num_threads())
        if kind == "op":
            record["verification"] = op_errors(name, row, options.device)
    if kind == "step":
        records["undo-core"]["verification"] = step_errors(row)
    if kind == "step":
        steps = {name: STEPS[name](row, build_model(row)) for name in CONTENDERS}
        runs = {name: (lambda step=step: step(True)) for name, step in steps.items()}
    else:
        inputs = draw(row, options.device)
        runs = {name: op(name, row, *inputs) for name in CONTENDERS}
    for run in (*runs.values(), *runs.values()):
        run()
    with undo_kernels.recorded() as calls:
        for name, taken in harness.interleave(runs, options.rounds * (1 if kind == "step" else 5), options.device):
            records[name]["samples_s"].append(taken)
            note_ran(records[name], "both", summarised(calls))
            calls.clear()
    for name, record in records.items():
        harness.same_path(record, f"{row.id}: {name}")
    loads = {"load_before": load, "load_after": os.getloadavg()}
    made = harness.provenance("bench/bench_rmu.py", options.given)
    return {"kind": kind, **asdict(row), **loads, "provenance": made, "contenders": list(records.values())}


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("row", "contender", "time", "× usual", "memory", "× usual", "d loss", "d gradient"):
        table.add_column(heading, justify="left" if heading in ("row", "contender") else "right", no_wrap=True)
    for row in rows:
        usual = harness.contender(row, "usual")
        for record in row["contenders"]:
            own = record.get("memory", {}).get("extra_bytes")
            share = None if own is None else own / max(usual["memory"]["extra_bytes"], 1)
            table.add_row(
                row["id"] if record is row["contenders"][0] else "",
                record["name"],
                harness.seconds(harness.median(record)),
                harness.times(harness.ratio(record, usual)),
                harness.megabytes(own),
                harness.times(share),
                *(harness.percent(record.get("verification", {}).get(part)) for part in ("loss", "gradient")),
            )
    console.print(table)


def rows_of(options: argparse.Namespace) -> list[StepRow | OpRow]:
    """Returns the rows that run on the device."""
    rows = QUICK if options.quick else ROWS
    return [row for row in rows if options.device == "cpu" or isinstance(row, OpRow)]


# -- for pytest bench --benchmark-only -----------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: Any) -> None:
    cases = [(row, name) for row in (*ROWS, *QUICK) for name in CONTENDERS]
    metafunc.parametrize(("row", "contender"), cases, ids=[f"rmu-cpu-{row.id}-{name}" for row, name in cases])


def test_rmu(benchmark: Any, row: StepRow | OpRow, contender: str) -> None:
    step = STEPS[contender](row, build_model(row)) if isinstance(row, StepRow) else op(contender, row, *draw(row))
    benchmark.group = f"rmu {row.id}"
    _, ran = observed(lambda: benchmark.pedantic(step, rounds=5, warmup_rounds=1))
    benchmark.extra_info |= {"ran": ran}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help=f"of {', '.join(row.id for row in ROWS)}")
    parser.add_argument("--rounds", type=int, default=None, metavar="N", help="timed rounds (default: 9, and 2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="tiny problems; their numbers mean nothing")
    parser.add_argument("--no-memory", action="store_true", help="skip the measurement of memory")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="results (default: bench/results/rmu-DEVICE/MACHINE-VERSION.json; none with --quick)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's own choice)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got 'cuda', but torch sees no GPU here")
    known = [row.id for row in rows_of(options)]
    for name in options.only or ():
        if name not in known:
            parser.error(f"--only: got {name!r}, wanted some of {', '.join(known)}")
    options.rounds = options.rounds if options.rounds is not None else 2 if options.quick else 9
    for flag, value in (("--rounds", options.rounds), ("--threads", options.threads)):
        if value is not None and value < 1:
            parser.error(f"{flag}: got {value}, wanted an integer >= 1")
    if not options.no_memory and not sys.platform.startswith("linux"):
        parser.error("memory is measured through Linux's /proc; add --no-memory")
    return options


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.worker:
        worker(json.loads(options.worker))
        return []
    harness.commit()  # asked for first: the commit of the code that runs, even if files change meanwhile
    options.given = list(sys.argv[1:] if arguments is None else arguments)
    rows = [row for row in rows_of(options) if not options.only or row.id in options.only]
    measured = []
    for row in rows:
        measured.append(measure(row, options))
        show(measured[-1:])
    console.print("errors: of a step, between the two; of the op, against float64", style="dim")
    if options.out or not options.quick:
        console.print(f"results: {harness.record('rmu', measured, options.device, options.out)}")
    return measured


if __name__ == "__main__":
    main()
