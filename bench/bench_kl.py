"""Compares linear_kl_div with what a user would take instead; runner.py describes the measurement."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import measuring
import runner
from contenders import Ran, observed
from harness import AnotherPath, path
from measuring import Suite
from peers import CONTENDERS
from problems import ALL, DEFAULT, ERROR_PAIRS, Approaching, Row, divergence_oracle, draw, errors
from rich.progress import Progress
from rich.table import Table
from runner import console

ERROR_TARGETS = [10.0**-k for k in range(7)]
ERROR_SEEDS = 3
STATED = ("direct", "chunk", "recompute")  # plans that a caller can ask for
ERROR = "error"  # name of the section on gradient error against KL, for --only

CPU = (
    "undo-core",
    "undo-reference",
    "plain",
    "compile",
    "auto-chunker",
    "liger-chunked",
    "liger-triton",
    "liger-kl",
    "trl",
    "products",
)
CUDA = ("undo-core", "undo-core-lse", *CPU[1:])
MOST = (
    "undo-core",
    "plain",
    "compile",
    "liger-chunked",
    "trl",
    "products",
)  # contenders of the sweeps and of the largest heads
SOFTCAP = ("undo-core", "plain", "trl", "products")


def _sweep(device: str) -> list[Row]:
    """Rows that change one of tokens, vocabulary and width at a time."""
    dtype, (tokens, vocabulary, width) = {"cpu": ("float32", (512, 32000, 512)), "cuda": ("bfloat16", (4096, 64000, 1024))}[
        device
    ]
    names = MOST if device == "cpu" else tuple(name if name != "liger-chunked" else "liger-triton" for name in MOST)
    rows = [Row("sweep", tokens, vocabulary, width, dtype, None, names, ALL)]
    for factor in (0.25, 4):
        n, v, d = int(factor * tokens), int(factor * vocabulary), int(factor * width)
        rows += [
            Row(f"sweep-tokens-{n}", n, vocabulary, width, dtype, None, names, ALL),
            Row(f"sweep-vocabulary-{v}", tokens, v, width, dtype, None, names, ALL),
            Row(f"sweep-width-{d}", tokens, vocabulary, d, dtype, None, names, ALL),
        ]
    return rows


ROWS = {
    "cpu": [
        Row("f32-32k", 1024, 32000, 320, "float32", None, CPU),
        Row("bf16-256k", 256, 256000, 320, "bfloat16", None, CPU, model="0.1B"),
        Row("f32-32k-softcap", 1024, 32000, 320, "float32", 30.0, SOFTCAP, ALL),
        Row("bf16-32k", 1024, 32000, 320, "bfloat16", None, CPU, ALL),
        Row("f32-256k", 512, 256000, 320, "float32", None, ("undo-core", "undo-core-workspace", *CPU[1:]), ALL, "0.1B"),
        Row("bf16-256k-512", 512, 256000, 320, "bfloat16", None, MOST, ALL, "0.1B"),
        Row("f32-1b", 256, 128256, 2048, "float32", None, MOST, ALL, "Llama 3.2 1B"),
        Row("bf16-1b", 256, 128256, 2048, "bfloat16", None, MOST, ALL, "Llama 3.2 1B"),
        Row("f32-0.3b", 256, 256000, 768, "float32", None, MOST, ALL, "0.3B"),
        Row("bf16-0.3b", 256, 256000, 768, "bfloat16", None, MOST, ALL, "0.3B"),
        Row("f32-2b", 64, 256000, 2304, "float32", None, MOST, ALL, "Gemma 2 2B"),
        Row("bf16-2b", 64, 256000, 2304, "bfloat16", None, MOST, ALL, "Gemma 2 2B"),
        Row("f32-8b", 64, 128256, 4096, "float32", None, MOST, ALL, "Llama 3 8B"),
        Row("bf16-8b", 64, 128256, 4096, "bfloat16", None, MOST, ALL, "Llama 3 8B"),
        *_sweep("cpu"),
    ],
    "cuda": [
        Row("bf16-256k-d2304", 8192, 256000, 2304, "bfloat16", 30.0, CUDA, model="Gemma 2 2B"),
        Row("bf16-256k-d768", 8192, 256000, 768, "bfloat16", 30.0, CUDA, model="0.3B"),
        Row("bf16-256k-d320", 8192, 256000, 320, "bfloat16", 30.0, CUDA, model="0.1B"),
        Row("bf16-128k-d4096", 4096, 128256, 4096, "bfloat16", None, CUDA, model="Llama 3 8B"),
        Row("bf16-32k-d4096", 8192, 32000, 4096, "bfloat16", None, CUDA, ALL),
        Row("f32-256k-d320", 4096, 256000, 320, "float32", 30.0, CUDA, ALL, "0.1B"),
        *_sweep("cuda"),
    ],
}
QUICK = {  # the smallest size at which the kernels run: dispatch leaves smaller problems to plain PyTorch
    device: [
        Row(f"quick-{short}", 64, 8209, 32, dtype, None, names) for short, dtype in (("f32", "float32"), ("bf16", "bfloat16"))
    ]
    for device, names in (("cpu", ("undo-core", "undo-core-workspace", *CPU[1:])), ("cuda", CUDA))
}


# -- gradient error against KL -------------------------------------------------------------------------------------------------


def error_section(device: str, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Measures relative gradient errors as the true KL falls: undo-core in float32 and bfloat16, all others in bfloat16.

    The problems have the shape of a default row of each dtype, but fewer tokens. undo-core runs the plan that it chooses for
    the whole row, which is called once to find out.
    """
    rows = QUICK[device] if options.quick else ROWS[device]
    names = [name for name in dict.fromkeys(n for row in rows for n in row.contenders) if CONTENDERS[name].is_loss]
    names = [name for name in names if name not in ("undo-core-workspace", "undo-core-lse", "undo-reference")]
    pairs = [("undo-core", "float32"), *((name, "bfloat16") for name in names)]
    pairs = [pair for pair in pairs if options.contenders is None or pair[0] in options.contenders]
    dtypes = dict.fromkeys(d for _, d in pairs)
    like = {dtype: next(r for r in rows if r.dtype == dtype and r.group == DEFAULT) for dtype in dtypes
            if any(r.dtype == dtype and r.group == DEFAULT for r in rows)}  # fmt: skip
    pairs = [pair for pair in pairs if pair[1] in like]
    seeds = 1 if options.quick else ERROR_SEEDS
    task = progress.add_task("gradient error against KL", total=seeds * len(pairs) * len(ERROR_TARGETS))
    curves = {pair: _blank_curve(*pair, like[pair[1]], device) for pair in pairs}
    for dtype, row in like.items():
        here = {pair: curve for pair, curve in curves.items() if pair[1] == dtype and curve["status"] is None}
        for (name, _), curve in here.items():
            curve["ran"] = {"both": _ran_in(row, name, device)}
        measuring.forget_compiled(SUITE, [name for name, _ in here])
        for seed in range(seeds):
            student = Approaching(row, ERROR_PAIRS[device] // row.vocabulary, device, seed)
            for number, target in enumerate(ERROR_TARGETS):
                inputs, wanted = student.within(target)
                for (name, _), curve in here.items():
                    curve["tokens"] = len(inputs.student_hidden)
                    plan = next((call["plan"] for call in curve["ran"]["both"] if call["plan"] in STATED), "auto")
                    got, ran = observed(CONTENDERS[name].step(replace(inputs, plan=plan)))
                    if ran != (wanted_path := curve["ran"]["both"]):
                        raise AnotherPath(
                            f"{name}, {dtype}, KL {target:g}: ran {path(ran)}, wanted {path(wanted_path)} as in row {row.id}"
                        )
                    curve["points"][number]["seeds"].append({"kl": float(wanted[0])} | errors(got, wanted) | {"ran": ran})
                    progress.update(task, advance=1, description=f"gradient error: {curve['label']}, KL {target:g}")
        for curve in here.values():
            curve["status"] = "measured"
    for curve in curves.values():
        curve["points"] = [point for point in curve["points"] if point["seeds"]]
    progress.remove_task(task)
    return {"provenance": options.provenance(), "seeds": seeds, "curves": list(curves.values())}


def _blank_curve(name: str, dtype: str, row: Row, device: str) -> dict[str, Any]:
    contender = CONTENDERS[name]
    about = {"name": name, "label": contender.label, "dtype": dtype, "row": row.id, "status": contender.missing(device)}
    return about | {"points": [{"target_kl": target, "seeds": []} for target in ERROR_TARGETS]}


def _ran_in(row: Row, name: str, device: str) -> Ran:
    """Returns what a contender of undo-core runs for the whole row."""
    if not name.startswith("undo-"):
        return []
    return observed(CONTENDERS[name].step(draw(row, device)))[1]


def show_errors(section: dict[str, Any]) -> None:
    """Prints the errors of dH, of the worst seed."""

    def short(value: float) -> str:
        return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value >= 0.01 else f"{value:.0e}".replace("e-0", "e-")

    title = "relative error of dH in %, as the true KL falls"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("contender", no_wrap=True)
    for target in ERROR_TARGETS:
        table.add_column(short(target), justify="right", no_wrap=True)
    for curve in section["curves"]:
        worst = [100 * max(run["d_hidden"] for run in point["seeds"]) for point in curve["points"]]
        label = f"{curve['label']}, {curve['dtype'].replace('float', 'f')}"
        table.add_row(label, *(map(short, worst) if worst else [curve["status"]]))
    console.print(table)
    console.print()


SUITE = Suite(
    name="kl",
    script="bench/bench_kl.py",
    contenders=CONTENDERS,
    oracle=divergence_oracle,
    teacher=True,
    rows=ROWS,
    quick=QUICK,
    sections={ERROR: ("error_versus_kl", error_section)},
    shows={ERROR: show_errors},
)


# -- for pytest bench --benchmark-only -----------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: Any) -> None:
    measuring.parametrize(metafunc, SUITE)


def test_step(benchmark: Any, case: measuring.Case) -> None:
    measuring.run_case(benchmark, SUITE, case)


def main(arguments: Sequence[str] | None = None) -> None:
    runner.main(SUITE, __doc__ or "", arguments)


if __name__ == "__main__":
    main()
