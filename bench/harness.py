"""What all benchmarks share: interleaved timing, peak memory, the machine, the record on disk, and its summary.

Times: every contender is warmed up; then all of them run once in each round (A B C, A B C, ...), so that a slow minute of the
machine affects all of them. All samples are kept. A reported time is the median over rounds, and a reported ratio is the median
of the ratios within rounds.

Memory on a CPU: a fresh process per contender makes the same inputs (writing them touches every page), warms up on a small
problem, returns free pages to the system, notes its resident size, resets the kernel's high-water mark (``5`` to
``/proc/self/clear_refs``), takes one step and reads the mark: peak minus resident size before minus the outputs. A contender
that compiles warms up at full size, so that the compiler's own memory does not count. All use the same settings of glibc
(``MALLOC``): one arena, and a separate mapping for each block of 256 KiB or more, so that freed memory leaves the resident size
at once. Memory on a GPU is the caching allocator's peak.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from undo_core.version import __version__

ROOT = Path(__file__).resolve().parents[1]
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
PACKAGES = ("undo-core", "torch", "triton", "liger-kernel", "trl", "cut-cross-entropy", "transformers", "numpy")

Step = Callable[[], Any]


# -- time ----------------------------------------------------------------------------------------------------------------------


def stopwatch(device: str) -> Callable[[Step], float]:
    """Returns a function that takes one step and returns its seconds, on a GPU between two events on the stream."""
    return _seconds_cuda if device == "cuda" else _seconds_cpu


def _seconds_cpu(step: Step) -> float:
    gc.collect()
    start = time.perf_counter()
    outputs = step()
    seconds = time.perf_counter() - start
    del outputs
    return seconds


def _seconds_cuda(step: Step) -> float:
    gc.collect()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    outputs = step()
    end.record()
    torch.cuda.synchronize()
    del outputs
    return start.elapsed_time(end) / 1e3


def interleave(
    steps: Mapping[Any, Step], rounds: int, device: str, least: int | None = None, seconds: float = 0.0
) -> Iterator[tuple[Any, float]]:
    """Yields samples ``(name, seconds)``, one of each name per round.

    With ``least``, no round begins after that many rounds once ``seconds`` have passed.
    """
    measure, began = stopwatch(device), time.monotonic()
    gc.collect()
    gc.freeze()  # garbage collection before each sample is then cheap
    try:
        for done in range(rounds):
            if least is not None and done >= least and time.monotonic() - began > seconds:
                return
            for name, step in steps.items():
                yield name, measure(step)
    finally:
        gc.unfreeze()


# -- memory --------------------------------------------------------------------------------------------------------------------


def peak_extra_cpu(warm_up: Step, run: Step, output_bytes: int) -> dict[str, Any]:
    """Returns the peak resident bytes of ``run`` beyond those before it and its outputs. Needs a separate process."""
    warm_up()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started_at = status("VmHWM")
    outputs = run()
    peak = status("VmHWM")
    del outputs
    return {
        "extra_bytes": max(0, peak - before - output_bytes),
        "resident_before": before,
        "mark_before": started_at,
        "peak": peak,
        "output_bytes": output_bytes,
        "method": "VmHWM reset, fresh process",
        "malloc": {name: os.environ.get(name) for name in MALLOC},
    }


def peak_extra_cuda(run: Step, output_bytes: int) -> dict[str, Any]:
    """Returns the peak bytes of torch's allocator during ``run`` beyond those allocated before it and its outputs."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del outputs
    return {
        "extra_bytes": max(0, peak - before - output_bytes),
        "allocated_before": before,
        "peak": peak,
        "output_bytes": output_bytes,
        "method": "torch.cuda.max_memory_allocated",
    }


def in_fresh_process(script: Path, request: dict[str, Any], threads: int) -> dict[str, Any]:
    """Runs ``script --worker REQUEST`` with the allocator's settings and returns the JSON object on its last line."""
    command = [sys.executable, str(script), "--worker", json.dumps(request), "--threads", str(threads)]
    done = subprocess.run(command, env=os.environ | MALLOC, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"memory worker: {lines[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024


# -- where and with what -------------------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """Returns facts on the hardware; ``name`` also names the results file and the instruction set of the C++ kernels."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    fields = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", info.read_text().split("\n\n")[0], re.MULTILINE)) if info.exists() else {}
    model = fields.get("model name", platform.processor() or platform.machine())
    flags = set(fields.get("flags", "").split())
    facts = {
        "cpu": model,
        "cpu_family_model_stepping": [fields.get(key) for key in ("cpu family", "model", "stepping")],
        "cpu_cache": fields.get("cache size"),
        "vector_flags": sorted(flag for flag in flags if re.match(r"avx|amx|fma|f16c", flag)),
        "kernels_vector_units": vector_units(),
        "cores": cores,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch_vector_units": torch.backends.cpu.get_cpu_capability(),
    }
    title = f"{model} {cores} cores {facts['kernels_vector_units']}"
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        title = gpu.name
        facts |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory, "capability": [gpu.major, gpu.minor]}
        facts |= {"cuda": torch.version.cuda or torch.version.hip}
    return {"name": re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|cpu|processor", "", title.lower())).strip("-"), **facts}


def vector_units() -> str:
    """Returns the best instruction set of the C++ kernels, such as avx2, with its bfloat16 product if any: avx512+amx."""
    from undo_kernels.cpu.extension import kernels

    if kernels is None:
        return "none"
    own = [product.name for product in kernels.bf16_products() if not product.emulated]
    return "+".join([kernels.instruction_set(""), *own[:1]])


def processor(facts: Mapping[str, Any]) -> str:
    """Returns the processor as precisely as it identifies itself; in a cloud, different ones can have the same name."""
    return "-".join([facts["name"], *(part or "?" for part in facts["cpu_family_model_stepping"])])


def whereabouts(facts: Mapping[str, Any]) -> str:
    """Describes the machine in one line."""
    return facts.get("gpu") or f"{facts['cpu']} ({facts['kernels_vector_units']}), {facts['cores']} cores"


def versions() -> dict[str, str | None]:
    """Returns the versions of the packages that took part; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def provenance(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Records when, from which commit, by which command and with which versions a row was measured."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = shlex.join(["python", script, *arguments])
    return {"when": now, "commit": commit(), "command": command, "threads": torch.get_num_threads(), "versions": versions()}


@functools.cache
def commit() -> str:
    """Returns the commit at the first call, with ``+changes`` if code (not results) differs from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    changed = git("status", "--porcelain", "--", ".", ":!bench/results", ":!docs", ":!*.md")
    return head + ("+changes" if changed else "")


# -- the record ----------------------------------------------------------------------------------------------------------------


def with_block(page: str, name: str, text: str) -> str:
    """Returns a page with ``text`` between its lines ``<!-- name -->`` and ``<!-- /name -->``."""
    before, mark, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->\n")
    if not (mark and end):
        raise ValueError(f"page: got no lines <!-- {name} --> and <!-- /{name} -->, wanted both")
    return f"{before}{mark}\n{text}\n\n{end}{after}"


def write_json(path: Path, value: Any) -> None:
    """Replaces ``path`` atomically: a reader finds the old text or the new one, even after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(value, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def results_path(suite: str, device: str, quick: bool = False) -> Path:
    """Returns ``bench/results/SUITE-DEVICE/MACHINE-VERSION.json``, or a path in ``runs/bench`` for a quick run."""
    folder = ROOT / ("runs/bench" if quick else "bench/results") / (f"{suite}-{device}" + ("-quick" if quick else ""))
    return folder / f"{machine(device)['name']}-{__version__}.json"


def record(suite: str, rows: list[dict[str, Any]], device: str, out: Path | None) -> Path:
    """Writes a suite's rows to ``out``, by default :func:`results_path`, and returns the path."""
    facts = machine(device)
    path = out or results_path(suite, device)
    write_json(path, {"format": 1, "suite": f"{suite}-{device}", "machine": facts, "rows": rows})
    return path


# -- what the samples say ------------------------------------------------------------------------------------------------------


def summary_rows(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the rows that have a peer; if the file has default rows, only those and the rows on captured activations."""
    own = ("undo-core", "undo-core-workspace", "undo-core-lse", "undo-reference", "products")
    rows = [row for row in results["rows"] if any(record["name"] not in own for record in row["contenders"])]
    return [row for row in rows if row.get("group") == "default" or "captured_loss" in row] or rows


SAMPLES = {"both": "samples_s", "forward": "forward_s"}  # seconds of every round: forward and backward, forward alone


def median(record: Mapping[str, Any], mode: str = "both") -> float | None:
    """Returns the median seconds of a contender's record; None if it was not timed."""
    samples = record.get(SAMPLES[mode])
    return statistics.median(samples) if samples else None


def ratio(record: Mapping[str, Any], to: Mapping[str, Any] | None, mode: str = "both") -> float | None:
    """Returns the median over rounds of the time of ``record`` over that of ``to`` in the same round."""
    own, others = record.get(SAMPLES[mode]), (to or {}).get(SAMPLES[mode])
    if not own or not others:
        return None
    return statistics.median(one / other for one, other in zip(own, others, strict=True))


def contender(row: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """Returns a row's record of one contender."""
    return next((record for record in row["contenders"] if record["name"] == name), None)


class AnotherPath(ValueError):
    """A figure does not belong to what was timed: undo-core ran another backend, plan or form."""


def same_path(record: Mapping[str, Any], where: str) -> None:
    """Checks that errors and memory are those of what was timed.

    Raises:
        AnotherPath: undo-core ran something else, or what was timed is unknown.
    """
    if not record.get("samples_s"):
        return
    if "verification" in record and "ran" not in record:
        raise AnotherPath(f"{where}: verified, but what was timed was not noted")
    kept = {mode: record.get(key, {}).get("ran") for mode, key in (("both", "memory"), ("forward", "forward_memory"))}
    for kind, others in (("verified", record.get("verification", {}).get("ran", {})), ("measured the memory of", kept)):
        for mode, ran in record.get("ran", {}).items():
            if others.get(mode) is not None and others[mode] != ran:
                raise AnotherPath(f"{where}, {mode}: timed {path(ran)}, but {kind} {path(others[mode])}")


def path(ran: Sequence[Mapping[str, Any]]) -> str:
    """Describes what ran: backend, plan and form, each once."""
    words = [", ".join(filter(None, (call["backend"], call["plan"], call["form"]))) for call in ran]
    return "; ".join(dict.fromkeys(words)) or "none of undo-core's kernels"


def gradient_error(record: Mapping[str, Any]) -> float | None:
    """Returns the larger of a contender's two gradient errors."""
    checked = record.get("verification")
    return max(checked["d_hidden"], checked["d_weight"]) if checked else None


def megabytes(count: float | None) -> str:
    """Formats bytes."""
    if count is None:
        return "–"
    if count >= 0.9995e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 9.95e6 else f"{count / 1e6:.1f} MB"


def short(number: int) -> str:
    """Formats a count, thousands as k if that is exact."""
    return f"{number // 1000}k" if number % 1000 == 0 else f"{number:,}"


def seconds(value: float | None) -> str:
    """Formats seconds with three digits."""
    return "–" if value is None else f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def share(value: float | None) -> str:
    """Formats a fraction."""
    return "–" if value is None else f"{value * 100:.0f} %"


def times(value: float | None) -> str:
    """Formats a ratio."""
    return "–" if value is None else f"{value:.2f}×"


def percent(value: float | None) -> str:
    """Formats a relative error with two digits."""
    if value is None:
        return "–"
    return (
        f"{value:.0e}".replace("e-0", "e-") if value < 1e-4 else f"{value * 100:.2g} %" if value < 1 else f"{value * 100:.0f} %"
    )
