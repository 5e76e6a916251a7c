"""Checks that the kernels are no slower and no larger than the committed baseline; it also works on a busy machine.

It compares four kinds of numbers, the least noisy first:

plan          workspace, products and memory traffic in the plans of full-size problems, on CPU and GPU. Exact on any machine.
calls         products, FLOPs, allocations and bytes of one float32 step, counted by torch's profiler. Exact.
instructions  executed by the C++ kernels for each element with AVX2, counted by valgrind --tool=callgrind. Other programs do
not
              change them, but another compiler does: they are compared only if the compiler is the baseline's.
ratio         time of a step over that of its bare products, each the smallest of interleaved rounds. It is compared only on the
              processors of the baseline, and measured up to three times before it counts as worse.

Calls and ratios are compared with those of the backend that the steps ran on, as reported by the kernels.

Prints a line for each number that got worse by more than the tolerance of its kind, and exits with status 1. It also prints
what could not be compared, and what got better: --write records such numbers in the baseline.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import harness
import peers
import peers_cross_entropy
import torch
import undo_kernels
from callgrind_worker import KERNELS
from contenders import observed
from problems import DTYPES, Row, draw
from torch.profiler import ProfilerActivity, profile
from undo_kernels.cpu.plan import cpu_plan
from undo_kernels.problem import Problem
from undo_kernels.projection import Projection
from undo_kernels.triton.plan import gpu_plan

BASELINE = harness.ROOT / "bench" / "baseline.json"
TOLERANCE = {"plan": 0.0, "calls": 0.0, "instructions": 0.02, "ratio": 0.25}
SUITES = {"kl": peers.CONTENDERS, "cross-entropy": peers_cross_entropy.CONTENDERS}
STEPS = {
    "kl f32": ("kl", Row("regressions", 300, 12000, 64, "float32", None, ())),
    "kl f32, workspace 1 MB": ("kl", Row("regressions", 300, 12000, 64, "float32", None, ())),
    "cross-entropy f32": ("cross-entropy", Row("regressions", 300, 12000, 64, "float32", None, ())),
}
SMALL_WORKSPACE = 1 << 20
RATIOS = {
    "kl f32": ("kl", Row("regressions", 256, 16000, 320, "float32", None, ())),
    "cross-entropy f32": ("cross-entropy", Row("regressions", 256, 16000, 320, "float32", None, ())),
}
ROUNDS, TRIES = 7, 3
PLANS = [
    (target, backend, dtype, rows, vocabulary, width)
    for target in ("forward", "own")
    for backend, rows in (("cpu", 1024), ("cpu with AMX", 1024), ("triton", 8192))
    for dtype in ("float32", "bfloat16")
    for vocabulary, width in ((32000, 320), (256000, 320), (256000, 2304), (128256, 4096))
    if (backend, dtype) != ("cpu with AMX", "float32")
]

Numbers = dict[str, float]


# -- what is measured ----------------------------------------------------------------------------------------------------------


def plan() -> Numbers:
    """Returns the numbers in plans of full-size problems on the meta device, with a teacher (forward) and labels (own)."""
    found: Numbers = {}
    for target, backend, dtype, rows, vocabulary, width in PLANS:
        row = torch.empty(rows, device="meta")
        sides = [
            Projection(*(torch.empty(size, width, dtype=DTYPES[dtype], device="meta") for size in (rows, vocabulary)))
            for _ in range(2)
        ]
        teacher = sides[1] if target == "forward" else None
        label = None if teacher else row
        problem = Problem(sides[0], target, row, label_factor=label, teacher=teacher, needs=(True, True, False))
        name = f"{target}, {backend}, {dtype}, {rows} × {vocabulary} × {width}"
        if backend == "triton":
            made = gpu_plan(problem, "sm_90")
            found |= {f"{name}: FLOPs": made.flops, f"{name}: bytes moved": made.traffic_bytes}
        else:
            made = cpu_plan(problem, rows, native="AMX" in backend)
            found[f"{name}: products"] = made.products
        found[f"{name}: workspace bytes"] = made.workspace_bytes
    return found


def calls() -> tuple[Numbers, str]:
    """Returns the counts of one step after a warm-up, and the backend."""
    found: Numbers = {}
    used = set()
    for name, (suite, row) in STEPS.items():
        workspace = SMALL_WORKSPACE if "workspace" in name else None
        inputs = draw(row, "cpu", suite == "kl")
        step = SUITES[suite]["undo-core"].step(replace(inputs, workspace_bytes=workspace))
        used.add(backend_of(step))
        with profile(activities=[ProfilerActivity.CPU], with_flops=True, profile_memory=True) as profiler:
            outputs = step()
        del outputs
        events = profiler.profiler.kineto_results.events()
        products = [event for event in profiler.events() if event.name in ("aten::mm", "aten::addmm", "aten::addmm_")]
        inner = [event for event in products if not any(child in products for child in event.cpu_children)]
        taken = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
        found |= {
            f"{name}: products": len(inner),
            f"{name}: product FLOPs": sum(event.flops or 0 for event in inner),
            f"{name}: allocations": len(taken),
            f"{name}: bytes allocated": sum(taken),
        }
    return found, f"backend {only(used)}"


def backend_of(step: Callable[[], object]) -> str:
    """Returns the backend that a step of undo-core runs on."""
    return only({call["backend"] for call in observed(step)[1]})


def only(used: set[str]) -> str:
    """Returns the only backend; numbers of several backends cannot be compared with one baseline.

    Raises:
        RuntimeError: several backends ran, or none.
    """
    if len(used) != 1:
        raise RuntimeError(f"steps: ran on {', '.join(sorted(used)) or 'none'} of undo-core's backends, wanted one")
    return used.pop()


def instructions() -> tuple[Numbers, str | None]:
    """Returns instructions per element by kernel, and the compiler; no numbers and None if there is no valgrind."""
    valgrind, library = shutil.which("valgrind"), undo_kernels.cpu.vocab_loss.kernels
    if valgrind is None or library is None:
        return {}, None
    worker = Path(__file__).with_name("callgrind_worker.py")
    with tempfile.TemporaryDirectory(prefix="bench-regressions-") as folder:
        out = Path(folder) / "callgrind.out"
        command = [valgrind, "--tool=callgrind", f"--callgrind-out-file={out}", sys.executable, str(worker), library.__file__]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        counted = self_costs(out.read_text(), "undo::avx2::")
    found = {
        name: sum(cost for function, cost in counted.items() if re.search(kernel.function, function)) / kernel.elements
        for name, kernel in KERNELS.items()
    }
    missing = [name for name, value in found.items() if not value]
    if missing:
        raise RuntimeError(f"callgrind counted nothing for {', '.join(missing)}; functions there: {', '.join(counted)}")
    return found, compiler(Path(library.__file__))


def self_costs(text: str, within: str) -> dict[str, int]:
    """Returns the instructions of each function whose name contains ``within``, without callees, from callgrind's file."""
    names: dict[str, str] = {}
    costs: dict[str, int] = defaultdict(int)
    function, call = "", False
    for line in text.splitlines():
        if match := re.match(r"(c?fn)=\((\d+)\)(?: (.*))?$", line):
            kind, number, name = match.groups()
            if name:
                names[number] = name
            if kind == "fn":
                function = names[number]
        elif line.startswith("calls="):
            call = True
        elif re.match(r"[+\-*\d]", line):
            if not call and within in function:
                costs[function] += int(line.split()[1])
            call = False
    return dict(costs)


def compiler(library: Path) -> str:
    """Returns the compiler named in the library's comment section."""
    found = re.search(rb"(GCC: [^\0]+|clang version [^\0]+)\0", library.read_bytes())
    return found[1].decode() if found else "unknown"


def ratio_key() -> str:
    """Returns the processor, with the backend if that is not the C++ kernels."""
    used = only(
        {backend_of(SUITES[suite]["undo-core"].step(draw(row, "cpu", suite == "kl"))) for suite, row in RATIOS.values()}
    )
    return harness.processor(harness.machine("cpu")) + (f", backend {used}" if used != "cpu" else "")


def ratio() -> Numbers:
    """Returns the ratios of the fastest rounds."""
    found: Numbers = {}
    for name, (suite, row) in RATIOS.items():
        inputs = draw(row, "cpu", suite == "kl")
        steps = {one: SUITES[suite][one].step(inputs) for one in ("undo-core", "products")}
        for step in (*steps.values(), *steps.values()):
            step()
        samples: dict[str, list[float]] = {one: [] for one in steps}
        for one, taken in harness.interleave(steps, ROUNDS, "cpu"):
            samples[one].append(taken)
        found[f"{name}: time over its products"] = min(samples["undo-core"]) / min(samples["products"])
    return found


# -- comparing -----------------------------------------------------------------------------------------------------------------


def shown(value: float) -> str:
    """Formats a number: counts exactly, others with four digits."""
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def worse(kind: str, measured: Mapping[str, float], wanted: Mapping[str, float]) -> list[str]:
    """Returns a line for each number that is worse than the tolerance allows or is no longer measured."""
    lines = []
    for name, before in wanted.items():
        now = measured.get(name)
        if now is None:
            lines.append(f"{kind}: {name} is no longer measured; the baseline has {shown(before)}")
        elif now > before * (1 + TOLERANCE[kind]):
            change = f"+{(now / before - 1) * 100:.1f} %" if before else "from nothing"
            lines.append(
                f"{kind}: {name} got worse: {shown(before)} -> {shown(now)} ({change}, tolerated {TOLERANCE[kind] * 100:g} %)"
            )
    return lines


def better(kind: str, measured: Mapping[str, float], wanted: Mapping[str, float]) -> list[str]:
    """Returns a line for each number that is better than the baseline's or missing there."""
    lines = []
    for name, now in measured.items():
        before = wanted.get(name)
        if before is None:
            lines.append(f"{kind}: {name} is new: {shown(now)}")
        elif now < before * (1 - TOLERANCE[kind]):
            lines.append(f"{kind}: {name} got better: {shown(before)} -> {shown(now)}")
    return lines


def steady_ratio(wanted: Mapping[str, float], measure: Callable[[], Numbers]) -> Numbers:
    """Returns the smallest ratios of several tries, which end once all are within the tolerance."""
    best: Numbers = {}
    for _ in range(TRIES):
        best = {name: min(value, best.get(name, value)) for name, value in measure().items()}
        if wanted and not worse("ratio", best, wanted):
            break
    return best


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE", help="(default: bench/baseline.json)")
    parser.add_argument("--only", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE), help="kinds (default: all)")
    parser.add_argument("--write", action="store_true", help="record the measured numbers as the baseline of these kinds")
    options = parser.parse_args(arguments)
    if not options.write and not options.baseline.exists():
        parser.error(f"--baseline: got {options.baseline}, which does not exist; --write makes it")
    baseline = json.loads(options.baseline.read_text()) if options.baseline.exists() else {}
    failures, remarks, compared = [], [], []
    for kind in options.only:
        known = baseline.get(kind, {})
        key, measured = None, {}
        if kind == "plan":
            measured = plan()
        elif kind == "calls":
            measured, key = calls()
        elif kind == "instructions":
            measured, key = instructions()
            if key is None:
                remarks.append("instructions: not compared: no valgrind here, or no C++ kernels")
                continue
        else:
            key = ratio_key()
        wanted = known.get(key, {}) if key else known
        if kind == "ratio":
            measured = steady_ratio(wanted, ratio)
        if options.write:
            baseline[kind] = {**known, key: measured} if key else measured
            continue
        if key and not wanted:
            remarks.append(f"{kind}: not compared: the baseline is of {', '.join(known) or 'nothing'}, this is {key}")
            continue
        compared.append(kind)
        failures += worse(kind, measured, wanted)
        remarks += better(kind, measured, wanted)
    if options.write:
        harness.write_json(options.baseline, baseline)
        print(f"baseline: {options.baseline}")
        return 0
    for line in (*remarks, *failures):
        print(line)
    if not failures:
        print(f"bench-check: nothing got worse ({', '.join(compared)})" if compared else "bench-check: nothing was compared")
    return int(bool(failures) or not compared)


if __name__ == "__main__":
    raise SystemExit(main())
