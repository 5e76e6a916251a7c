"""Instructions, registers and spills of the Triton kernels, counted from code compiled for GPUs that need not be here.

    python bench/instructions.py             compiles the heaviest and the typical forms for sm_80, sm_90 and sm_100
    python bench/instructions.py --scope all            every form that is launched; long
    python bench/instructions.py --targets sm_90        for one of them; the file keeps its counts of the others
    python bench/instructions.py --table     prints the recorded counts as tables; compiles nothing
    python bench/instructions.py --write     puts them into docs/findings/gpu-epilogue.md

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness

PAGE = harness.ROOT / "docs" / "findings" / "gpu-epilogue.md"
RESULTS = harness.ROOT / "bench" / "results" / "instructions"
TARGETS = ("sm_80", "sm_90", "sm_100")
FIELDS = ("instructions", "special", "shuffles", "barriers", "registers", "spills", "shared")


def record(reports: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What is kept of each form, by name."""
    return {report["name"]: {field: round(report[field], 2) for field in FIELDS if field in report} for report in reports}


def same_form(name: str) -> str:
    """A form's name without its tile and without how it is computed: by this, counts from before a change are found."""
    name = re.sub(r" \d+(x\d+)*(?= |$)| warps\b| bounded\b| same\b", "", name)
    for old, new in (("bias_s capped_s bias_t capped_t", "has_bias capped"), ("capped_s capped_t", "capped")):
        name = name.replace(old, new)
    return " ".join(sorted(name.split()))


HEAD = "| form | instructions | special | shuffles | barriers | registers | spills (bytes) |\n| --- |" + " ---: |" * 6
TYPICAL = (  # forward KL of two 16-bit heads with a softcap
    "stats_tiles capped bounded teacher same", "stats_tiles capped bounded same", "loss_tiles forward capped bounded same gradient",
    "stats_rows capped bounded teacher same", "loss_rows forward capped bounded same gradient",
)  # fmt: skip


def cells(now: dict[str, float], old: dict[str, float] | None) -> str:
    """Counts of a form, before → now where they differ."""
    found = [f"{old[f]:.4g} → {now[f]:.4g}" if old and old[f] != now[f] else f"{now[f]:.4g}" for f in FIELDS[:6]]
    return " | ".join(found)


def rows(forms: dict[str, Any], earlier: dict[str, Any], typical: bool) -> list[str]:
    """A line for each form of a target, or for the typical ones."""
    known = {same_form(name): old for name, old in earlier.items()}
    chosen = {name: now for name, now in forms.items() if re.search("^(stats|loss)_(tiles|rows) ", name)}
    if typical:
        words = {re.split(r" \d", name)[0]: name for name in reversed(chosen)}  # of two with the same words, the first
        chosen = {words[name]: chosen[words[name]] for name in TYPICAL if name in words}
    return [f"| {name} | {cells(now, known.get(same_form(name)))} |" for name, now in chosen.items()]


def spilling(forms: dict[str, Any]) -> str:
    """How many forms spill."""
    spilled = [form["spills"] for form in forms.values() if form["spills"]]
    return f"{len(spilled)} of {len(forms)} forms" + (f" (at most {max(spilled):.0f} bytes)" if spilled else "")


def tables(typical: bool) -> Iterator[str]:
    """Yields a table for each recorded version and target, the newest version first."""
    for path in sorted(RESULTS.glob("triton-*.json"), reverse=True):
        counts, old = json.loads(path.read_text()), RESULTS / path.name.replace("triton", "before")
        before = json.loads(old.read_text())["targets"] if old.exists() else {}
        for target, forms in counts["targets"].items():
            earlier = before.get(target, {})
            spills = f"spills: {spilling(earlier)} before, {spilling(forms)} now"
            yield "\n".join([f"{target}, Triton {counts['triton']}; {spills}", "", HEAD, *rows(forms, earlier, typical)])


def block() -> str:
    """The tables of the page: every form of the newest sm_90, the typical ones of each target."""
    full = next(text for text in tables(typical=False) if text.startswith("sm_90"))
    return "\n\n".join([full, *tables(typical=True)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scope", choices=("main", "few", "typical", "all"), default="typical", help="forms (%(default)s)")
    parser.add_argument("--table", action="store_true", help="print the recorded counts and compile nothing")
    parser.add_argument("--write", action="store_true", help="put the recorded counts into the page; compiles nothing")
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS, help="GPUs to compile for")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile side by side (%(default)s)")
    parser.add_argument("--out", type=Path, help="file of the counts")
    options = parser.parse_args(arguments)
    if options.table:
        print("\n\n".join(tables(typical=False)))
        return 0
    if options.write:
        PAGE.write_text(harness.with_block(PAGE.read_text(), "instructions", block()))
        return 0
    import triton
    from undo_kernels.triton import aot

    began, version = time.monotonic(), ".".join(triton.__version__.split(".")[:2])
    reports = aot.compiled(options.targets, options.scope, options.processes)
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
