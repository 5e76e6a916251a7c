"""Instructions, registers and spills of the Triton kernels, counted from code compiled for GPUs that need not be here.

    python bench/instructions.py             compiles the heaviest and the typical forms for sm_80, sm_90 and sm_100
    python bench/instructions.py --all       every form that is launched; long
    python bench/instructions.py --targets sm_90        for one of them; the file keeps its counts of the others
    python bench/instructions.py --table     prints the recorded counts as tables; compiles nothing

The counts go to bench/results/instructions/triton-VERSION.json (``--out`` names another file). tests/undo_kernels/triton/test_aot.py
compares what it compiles with them. Triton's cache keeps what was compiled and counted: a second run takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import harness

RESULTS = harness.ROOT / "bench" / "results" / "instructions"
TARGETS = ("sm_80", "sm_90", "sm_100")
FIELDS = ("instructions", "special", "shuffles", "barriers", "registers", "spills", "shared")


def record(reports: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What is kept of each form, by name."""
    return {report["name"]: {field: round(report[field], 2) for field in FIELDS} for report in reports}


def same_form(name: str) -> str:
    """A form's name without its tile and without how it is computed: by this, counts from before a change are found."""
    name = re.sub(r" \d+(x\d+)*(?= |$)| warps\b| bounded\b| same\b", "", name)
    for old, new in (("bias_s capped_s bias_t capped_t", "has_bias capped"), ("capped_s capped_t", "capped")):
        name = name.replace(old, new)
    return " ".join(sorted(name.split()))


def table(counts: dict[str, Any], before: dict[str, Any] | None = None, only: str = "_(tiles|rows) ") -> str:
    """A table a target, in Markdown; ``before``: counts of the same forms to show beside."""
    lines = []
    for target, forms in counts["targets"].items():
        earlier = {same_form(name): old for name, old in (before or {"targets": {}})["targets"].get(target, {}).items()}
        lines += [f"### {target}, Triton {counts['triton']}", ""]
        lines += [
            "| form | instructions | special | shuffles | barriers | registers | spills (bytes) |",
            "| --- |" + " ---: |" * 6,
        ]
        for name, now in forms.items():
            if re.search(only, name):
                old = earlier.get(same_form(name))
                cells = [f"{old[f]:.4g} → {now[f]:.4g}" if old and old[f] != now[f] else f"{now[f]:.4g}" for f in FIELDS[:6]]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every form that is launched")
    parser.add_argument("--table", action="store_true", help="print the recorded counts and compile nothing")
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS, help="GPUs to compile for")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile side by side (%(default)s)")
    parser.add_argument("--out", type=Path, help="file of the counts")
    options = parser.parse_args(arguments)
    if options.table:
        for path in sorted(RESULTS.glob("triton-*.json")):
            counts = json.loads(path.read_text())
            earlier = RESULTS / f"before-{counts['triton']}.json"
            print(table(counts, json.loads(earlier.read_text()) if earlier.exists() else None))
        return 0
    import triton
    from undo_kernels.triton import aot

    began, version = time.monotonic(), ".".join(triton.__version__.split(".")[:2])
    reports = aot.compiled(options.targets, "all" if options.all else "typical", options.processes)
    broken = [report for lines in reports.values() for report in lines if "error" in report]
    path = options.out or RESULTS / f"triton-{version}.json"
    known = json.loads(path.read_text())["targets"] if path.exists() else {}
    found = {target: record([r for r in lines if "error" not in r]) for target, lines in reports.items()}
    targets = {target: (known | found)[target] for target in TARGETS if target in known | found}
    harness.write_json(path, {"format": 1, "triton": version, "targets": targets})
    for report in broken:
        print(f"{report['target']} {report['name']}: {report['error'].strip().splitlines()[-1]}", file=sys.stderr)
    print(
        f"{sum(map(len, reports.values()))} forms, {len(broken)} that do not compile, {time.monotonic() - began:.0f} s: {path}"
    )
    return int(bool(broken))


if __name__ == "__main__":
    raise SystemExit(main())
