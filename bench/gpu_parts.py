"""The parts of the GPU suite: their commands, in the order in which they teach most, and one line about what each has found.

Every row has a small version of itself, which ``--rehearse`` runs on a CPU, with kernels interpreted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

# Seconds of each part when all of them are asked for: together under nine minutes. A part may also take what those before it left,
# and the last four share what is left then.
SECONDS: dict[str, float] = {
    "tests": 105, "plans": 80, "products": 25, "tiles": 80, "counters": 40, "peers": 90, "memory": 120,
    "sanitize": 0, "bench": 0, "tune": 0, "pipeline": 0,
}  # fmt: skip
PARTS = tuple(SECONDS)
FIRST = tuple(part for part, seconds in SECONDS.items() if seconds)
KERNELS = ("torch", "triton", "numpy")
WHOLE = (*KERNELS, "transformers", "safetensors", "rich")
SANITIZED = (
    "tests/undo_kernels/triton/test_triton_rmu.py",
    "tests/undo_kernels/triton/test_triton_noise.py::test_any_first_index",
    "tests/undo_kernels/triton/test_vocab_loss_options.py::test_few_rows",
)
# What the first ten minutes compare: those that compile first take longer to compile than all others to run.
PEERS = ("undo-core", "undo-core-lse", "plain", "liger-triton", "trl", "products")


@dataclass(frozen=True)
class Row:
    """One command of a part.

    Attributes:
        id: in the file.
        command: with ``{python}`` for this interpreter and ``{result}`` for a file that it writes JSON to.
        needs: modules without which it cannot run.
        tool: program without which it cannot run.
        seconds: that it may take.
        printed: whether the result is the last line of JSON that it prints; one that is stopped has printed what it has so far.
        parallel: commands that run side by side before it and may fail.
    """

    id: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = KERNELS
    tool: str | None = None
    seconds: float = 500.0
    printed: bool = False
    parallel: tuple[tuple[str, ...], ...] = ()


def rows_of(part: str, rehearse: bool = False, output: str = "runs/gpu-arithmetic") -> list[Row]:
    """A part's rows, the most telling first; ``output``: folder of the pipeline's run."""
    return _ROWS[part](rehearse) if part != "pipeline" else _pipeline(rehearse, output)


def _tests(rehearse: bool) -> list[Row]:
    few = ("--only", "documented or its_teacher", "--files", "vocab_loss_numerics", "--workers", "2") if rehearse else ()
    return [Row("triton", ("{python}", "bench/gpu_tests.py", *few), ("pytest", *KERNELS), printed=True)]


def _kernels(what: str, rehearse: bool, width: str = "768") -> tuple[str, ...]:
    return ("{python}", "bench/gpu_kernels.py", what, width, *["--rehearse"] * rehearse)


def _plans(rehearse: bool) -> list[Row]:
    widths = ("768",) if rehearse else ("768", "2304", "320")
    return [Row(f"plans-{width}", _kernels("plans", rehearse, width), printed=True, seconds=60) for width in widths]


def _products(rehearse: bool) -> list[Row]:
    return [Row("products", _kernels("products", rehearse), printed=True)]


def _counters(rehearse: bool) -> list[Row]:
    """The launches themselves come first in a rehearsal: a machine without a GPU has no ncu either."""
    rows = [Row("counters", ("{python}", "bench/gpu_counters.py"), KERNELS, "ncu", printed=True)]
    return [Row("launches", _kernels("once", True), printed=True), *rows] if rehearse else rows


def _sanitize(rehearse: bool) -> list[Row]:
    tests = ("{python}", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", *(SANITIZED[1:2] if rehearse else SANITIZED))
    rows = [Row("tests", tests, ("pytest", *KERNELS))] if rehearse else []
    for tool in ("memcheck", "racecheck"):  # torch's allocator would hide what lies between two of its tensors
        check = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
        command = (*check, "--target-processes", "all", *tests)
        rows.append(Row(tool, command, ("torch", "triton", "pytest"), "compute-sanitizer", 250))
    return rows


def _tune(rehearse: bool, dtypes: tuple[str, ...] = ("bfloat16", "float32"), kernels: tuple[str, ...] = ()) -> list[Row]:
    rows = []
    count = max(1, min(16, os.cpu_count() or 1))
    for dtype in dtypes:
        for kernel in kernels or ("loss", "stats", "jsd", "cross"):
            command = ("{python}", "-m", "undo_kernels.triton.tuner", kernel, dtype)
            if rehearse:
                return [Row(f"{kernel}-{dtype}-32", (*command, "32", "--rehearse"), printed=True)]
            first = tuple((*command, "320", "--first", str(i), str(count)) for i in range(count))
            for width in ("2304", "768", "320"):
                before = first if width == "2304" else ()
                rows.append(Row(f"{kernel}-{dtype}-{width}", (*command, width), printed=True, parallel=before))
    return rows


def _tiles(rehearse: bool) -> list[Row]:
    return _tune(rehearse, ("bfloat16",), ("stats", "loss"))


def _measured(script: str, row: str, rehearse: bool, *options: str) -> Row:
    where = ("--device", "cpu", "--quick") if rehearse else ("--device", "cuda")
    command = ("{python}", f"bench/bench_{script}.py", *where, "--only", row, "--out", "{result}", *options)
    return Row(f"{script}-{row}", command, WHOLE)


def _peers(rehearse: bool) -> list[Row]:
    if rehearse:
        return [_measured("kl", "quick-bf16", True, "--no-memory", "--contenders", *PEERS)]
    options = ("--rounds", "3", "--contenders", *PEERS)
    rows = [_measured("kl", f"bf16-256k-d{width}", False, *options) for width in ("2304", "768", "320")]
    return [replace(row, seconds=70) for row in rows]


def _bench(rehearse: bool) -> list[Row]:
    if rehearse:
        return [_measured("noise", "bf16-uniform", True)]
    rows = (
        ("kl", ("bf16-256k-d2304", "bf16-256k-d768", "bf16-256k-d320", "error")),
        ("noise", ("f32-uniform", "f32-normal", "bf16-uniform")),
        ("rmu", ("op-f32", "op-f32-frozen", "op-bf16", "op-bf16-frozen")),
    )
    return [_measured(script, row, False) for script, names in rows for row in names]


def _memory(rehearse: bool) -> list[Row]:
    command = ("{python}", "bench/bench_step_gpu.py", *(("--quick", "--steps", "3") if rehearse else ()), "--mode")
    modes: dict[str, tuple[str, ...]] = {
        "in-backward": (),
        "plain": (),
        "lean-stochastic": (),
        "float32": (),
        "checkpointing": (),
    }
    modes = {"leanest": ("torchao",), "in-backward-8bit": ("torchao",)} | modes
    chosen = ("in-backward", "leanest") if rehearse else modes
    return [Row(mode, (*command, mode), WHOLE + modes[mode], printed=True, seconds=60) for mode in chosen]


def _pipeline(rehearse: bool, output: str) -> list[Row]:
    """Without a GPU the pipeline is only planned: its tests run it."""
    reduced = ("--pretrain.train.steps=60", "--distill.train.steps=40", "--unlearn.train.steps=5", "--data.train_rows=50000")
    reduced += ("--noise.alphas=[0.7]", "--relearn.rates=[1e-4]", "--relearn.evaluate_at=[0,10]", "--relearn.headline_step=10")
    words = ("plan",) if rehearse else ("run",)
    command = ("{python}", "-m", "undo_core", *words, "configs/arithmetic.yaml", f"--output={output}", *reduced)
    return [Row("arithmetic", command, (*WHOLE, "jsonargparse", "matplotlib"))]


_ROWS: Mapping[str, Callable[[bool], list[Row]]] = {
    "tests": _tests, "plans": _plans, "products": _products, "tiles": _tiles, "counters": _counters, "peers": _peers,
    "memory": _memory, "sanitize": _sanitize, "bench": _bench, "tune": _tune,
}  # fmt: skip


# -- what a result says --------------------------------------------------------------------------------------------------------


def complaint(result: Any) -> str | None:
    """Why a result that was written is none: undo-core was not measured, or what it ran was not Triton's kernels; no tile."""
    if not isinstance(result, dict):
        return None
    if "tried" in result and result["best"] is None:
        return "no tile counts"
    failed = [entry["failed"] for name in ("plans", "products") for entry in result.get(name, ()) if "failed" in entry]
    if failed:
        return f"{len(failed)} failed, the first: {failed[0]}"
    if "mode" in result:
        own = [result | {"name": result["mode"]}] if result["mode"] != "plain" else []
    else:
        records = [record for row in result.get("rows", ()) for record in row["contenders"]]
        records += (result.get("error_versus_kl") or {}).get("curves", ())
        own = [record for record in records if record["name"].startswith("undo-core")]
    for record in own:
        if record.get("status", "measured") != "measured":
            return f"{record['name']}: {record['status']}"
        used = {call["backend"] for calls in record.get("ran", {}).values() for call in calls}
        if used != {"triton"}:
            return f"{record['name']}: ran on {', '.join(sorted(used)) or 'nothing that was noted'}, wanted triton"
    return None


def headline(result: Any) -> str:
    """What a result says, in one line for a reader who watches."""
    if not isinstance(result, dict):
        return ""
    if "plans" in result:
        cells = [
            f"{e['plan']}{' lse' * e['teacher_lse']} {e.get('ms', 0):.4g} ms (predicted {e.get('predicted_ms', 0):.3g})"
            for e in result["plans"]
        ]
        return "; ".join(cells)
    if "products" in result:
        best: dict[str, float] = {}
        for e in result["products"]:
            name = f"{e['product']} {e['width']}"
            best[name] = max(best.get(name, 0.0), e.get("flops", 0.0) / 1e12)
        return "TFLOP/s at best: " + ", ".join(f"{name} {value:.0f}" for name, value in best.items())
    if "tried" in result:
        times = {tuple(tried["tile"]): tried["seconds"] * 1e3 for tried in result["tried"] if "seconds" in tried}
        default, best_tile = tuple(result["default"]), tuple(result["best"] or ())
        return f"best {best_tile} {times.get(best_tile, 0):.3f} ms, default {default} {times.get(default, 0):.3f} ms, {len(times)} timed"
    if "counted" in result:
        return "; ".join(f"{name}: {kernel.get('Duration', '?')}" for name, kernel in result["counted"].items())
    if "outcomes" in result:
        return ", ".join(f"{count} {name}" for name, count in result["outcomes"].items()) + "".join(
            f"\n  {name}" for name in result["failures"]
        )
    if "mode" in result:
        peak = f", peak {result['peak_bytes'] / 1e9:.1f} GB" if result.get("peak_bytes") else ""
        return f"{result.get('tokens_per_second', 0):.0f} tokens/s{peak}"
    cells = [
        f"{record['name']} {sorted(record['samples_s'])[len(record['samples_s']) // 2] * 1e3:.3g} ms"
        if record.get("samples_s")
        else f"{record['name']} {record.get('status', '')}"
        for row in result.get("rows", ())
        for record in row["contenders"]
    ]
    return "; ".join(cells)
