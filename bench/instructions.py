"""Instructions, registers and spills of the Triton kernels, counted from code compiled for GPUs that need not be here.

    python bench/instructions.py             compiles the heaviest and the typical forms for sm_80, sm_90 and sm_100
    python bench/instructions.py --all       every form that is launched; long
    python bench/instructions.py --table     prints the recorded counts as tables; compiles nothing

The counts go to bench/results/instructions/triton-VERSION.json (``--out`` names another file). tests/undo_kernels/triton/test_aot.py
compares what it compiles with them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness

RESULTS = harness.ROOT / "bench" / "results" / "instructions"
TARGETS = ("sm_80", "sm_90", "sm_100")
FIELDS = ("instructions", "special", "shuffles", "barriers", "registers", "spills", "shared")


def compiled(target: str, every: bool) -> list[dict[str, Any]]:
    """Reports of a target's forms, from a process in which no kernel is interpreted."""
    command = [sys.executable, "-W", "ignore", "-m", "undo_kernels.triton.aot", target, *(["all"] if every else [])]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def record(reports: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What is kept of each form, by name."""
    return {report["name"]: {field: round(report[field], 2) for field in FIELDS} for report in reports}


def table(counts: dict[str, Any], before: dict[str, Any] | None = None, only: str = "_(tiles|rows) ") -> str:
    """A table a target, in Markdown; ``before``: counts of the same forms to show beside."""
    lines = []
    for target, forms in counts["targets"].items():
        lines += [f"### {target}, Triton {counts['triton']}", ""]
        lines += [
            "| form | instructions | special | shuffles | barriers | registers | spills (bytes) |",
            "| --- |" + " ---: |" * 6,
        ]
        for name, now in forms.items():
            if re.search(only, name):
                old = (before or {"targets": {}})["targets"].get(target, {}).get(name)
                cells = [f"{old[f]:g} → {now[f]:g}" if old and old[f] != now[f] else f"{now[f]:g}" for f in FIELDS[:6]]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every form that is launched")
    parser.add_argument("--table", action="store_true", help="print the recorded counts and compile nothing")
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS, help="GPUs to compile for")
    parser.add_argument("--out", type=Path, help="file of the counts")
    options = parser.parse_args(arguments)
    if options.table:
        for path in sorted(RESULTS.glob("triton-*.json")):
            counts = json.loads(path.read_text())
            earlier = RESULTS / f"before-{counts['triton']}.json"
            print(table(counts, json.loads(earlier.read_text()) if earlier.exists() else None))
        return 0
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    targets = {target: record(compiled(target, options.all)) for target in options.targets}
    harness.write_json(options.out or RESULTS / f"triton-{version}.json", {"format": 1, "triton": version, "targets": targets})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
