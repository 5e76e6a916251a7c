"""Compares in-place noise on the published 0.1B model's tensors with torch's usual way: draw a tensor of noise, shrink, add.

Rounds are interleaved in one process; on a CPU the peak extra memory is measured in a fresh process for each contender. Rates
(million values per second) are given for the median round and for the best one. Time and memory are each recorded with the
backend and plan that undo-core's kernels report; it is an error if these differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import torch
import undo_kernels
from contenders import note_ran, observed, summarised, watched
from rich.console import Console
from rich.table import Table
from torch import nn

from undo_core import ops

ALPHA, BETA, SEED = 0.001, 0.1, 1  # a small alpha: thousands of rounds must not empty the parameters
HIDDEN, INTERMEDIATE, QUERIES, KEYS, LAYERS, VOCABULARY = 320, 1280, 8 * 128, 4 * 128, 14, 256000

console = Console(highlight=False)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """A benchmark of one dtype and one law of the noise."""

    id: str
    dtype: str
    law: str


ROWS = (
    Row("f32-uniform", "float32", "xavier_uniform"),
    Row("f32-normal", "float32", "xavier_normal"),
    Row("bf16-uniform", "bfloat16", "xavier_uniform"),
)


def shapes(quick: bool) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the model's parameters, with a tied head; with ``quick`` of two layers and a small vocabulary."""
    found: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (1000 if quick else VOCABULARY, HIDDEN),
        "norm.weight": (HIDDEN,),
    }
    matrices = {
        "self_attn.q_proj": (QUERIES, HIDDEN),
        "self_attn.k_proj": (KEYS, HIDDEN),
        "self_attn.v_proj": (KEYS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, QUERIES),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    for layer in range(2 if quick else LAYERS):
        for name, shape in {**matrices, **{norm: (HIDDEN,) for norm in norms}}.items():
            found[f"layers.{layer}.{name}.weight"] = shape
    return found


def draw(row: Row, device: str, quick: bool) -> Tensors:
    dtype = getattr(torch, row.dtype)
    return {name: torch.full(shape, 0.02, dtype=dtype, device=device) for name, shape in shapes(quick).items()}


def ours(tensors: Tensors, row: Row) -> Callable[[], None]:
    return lambda: ops.noise_(tensors, alpha=ALPHA, beta=BETA, seed=SEED, law=row.law)


def usual(tensors: Tensors, row: Row) -> Callable[[], None]:
    fill = {"xavier_uniform": nn.init.xavier_uniform_, "xavier_normal": nn.init.xavier_normal_}[row.law]

    @torch.no_grad()
    def step() -> None:
        for tensor in tensors.values():
            tensor.mul_(1 - ALPHA)
            if tensor.ndim > 1:
                tensor.add_(fill(torch.empty_like(tensor)), alpha=ALPHA * BETA)

    return step


CONTENDERS = {"undo-core": ours, "torch": usual}


def memory(name: str, row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the peak bytes beyond the parameters."""
    if options.device == "cuda":
        step = CONTENDERS[name](draw(row, "cuda", options.quick), row)
        step()
        return watched(lambda: harness.peak_extra_cuda(step, 0))
    request = {"row": asdict(row), "contender": name, "quick": options.quick}
    return harness.in_fresh_process(Path(__file__), request, torch.get_num_threads())


def worker(request: dict[str, Any]) -> None:
    """Runs in a separate process: prints one contender's memory on a CPU as JSON."""
    row, build = Row(**request["row"]), CONTENDERS[request["contender"]]
    small = {"w": torch.ones(64, 64, dtype=getattr(torch, row.dtype))}
    step = build(draw(row, "cpu", request["quick"]), row)
    build(small, row)()
    print(json.dumps(watched(lambda: harness.peak_extra_cpu(lambda: None, step, 0))))


def measure(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Measures memory and time of both contenders."""
    records: dict[str, dict[str, Any]] = {
        name: {"name": name, "memory": memory(name, row, options), "samples_s": [], "ran": {}} for name in CONTENDERS
    }
    tensors = draw(row, options.device, options.quick)
    steps = {name: build(tensors, row) for name, build in CONTENDERS.items()}
    for step in steps.values():
        step()
    with undo_kernels.recorded() as calls:
        for name, taken in harness.interleave(steps, options.rounds, options.device):
            records[name]["samples_s"].append(taken)
            note_ran(records[name], "both", summarised(calls))
            calls.clear()
    for name, record in records.items():
        harness.same_path(record, f"{row.id}: {name}")
    values = sum(tensor.numel() for tensor in tensors.values())
    return asdict(row) | {"values": values, "provenance": options.provenance(), "contenders": list(records.values())}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(box=None, pad_edge=False)
    for column in ("noise", "by", "M values/s", "best", "time", "against torch", "memory beyond parameters"):
        shown.add_column(column, justify="left" if column in ("noise", "by") else "right")
    for row in rows:
        baseline = harness.contender(row, "torch")
        for record in row["contenders"]:
            rates = [f"{row['values'] / taken / 1e6:.0f}" for taken in (harness.median(record), min(record["samples_s"]))]
            relative = harness.times(harness.ratio(record, baseline))
            extra = harness.megabytes(record["memory"]["extra_bytes"])
            shown.add_row(row["id"], record["name"], *rates, harness.seconds(harness.median(record)), relative, extra)
    return shown


# -- for pytest bench --benchmark-only -----------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: Any) -> None:
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    cases = [(row, d, quick, name) for d in devices for quick in (False, True) for row in ROWS for name in CONTENDERS]
    names = [f"noise-{device}-{'quick-' * quick}{row.id}-{name}" for row, device, quick, name in cases]
    metafunc.parametrize(("row", "device", "quick", "contender"), cases, ids=names)


def test_noise(benchmark: Any, row: Row, device: str, quick: bool, contender: str) -> None:
    step = CONTENDERS[contender](draw(row, device, quick), row)

    def run() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"noise {'quick-' * quick}{row.id}"
    _, ran = observed(lambda: benchmark.pedantic(run, rounds=5, warmup_rounds=1))
    benchmark.extra_info |= {"ran": ran}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[row.id for row in ROWS], metavar="ROW", help="some of %(choices)s")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="use a tiny model; its numbers mean nothing")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="results (default: bench/results/noise-DEVICE/MACHINE-VERSION.json; none with --quick)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's own choice)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for flag, value in (("--rounds", options.rounds), ("--threads", options.threads)):
        if value is not None and value < 1:
            parser.error(f"{flag}: got {value}, wanted an integer >= 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got 'cuda', but torch sees no GPU here")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.worker:
        worker(json.loads(options.worker))
        return
    harness.commit()  # asked for first: the commit of the code that runs, even if files change meanwhile
    given = list(sys.argv[1:] if arguments is None else arguments)
    options.provenance = lambda: harness.provenance("bench/bench_noise.py", given)
    rows = [measure(row, options) for row in ROWS if not options.only or row.id in options.only]
    console.print(table(rows))
    if options.out or not options.quick:
        console.print(f"results: {harness.record('noise', rows, options.device, options.out)}")


if __name__ == "__main__":
    main()
