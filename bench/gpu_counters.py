"""Hardware counters of one launch of each of four kernels: ``python bench/gpu_counters.py``; prints one JSON object.

Nsight Compute's ``ncu`` runs ``bench/gpu_kernels.py once``, whose launches are one of each kernel, and leaves the clocks alone.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ("stats_rows", "loss_rows", "stats_tiles", "loss_tiles")
SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "InstructionStats", "SchedulerStats", "WarpStateStats",
    "Occupancy", "LaunchStats",
)  # fmt: skip


def counted(lines: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns the metrics of each kernel's first launch, with their units, from ncu's table of details in CSV."""
    table = [line for line in lines if line.startswith('"')]  # the rest is what ncu says about its progress
    found: dict[str, dict[str, str]] = {}
    launch: dict[str, str] = {}
    for row in csv.DictReader(table):
        if row["Metric Name"] and launch.setdefault(row["Kernel Name"], row["ID"]) == row["ID"]:
            value = f"{row['Metric Value']} {row['Metric Unit']}".strip()
            found.setdefault(row["Kernel Name"], {})[row["Metric Name"]] = value
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = ["ncu", "--csv", "--page", "details", "--clock-control", "none", "--log-file", str(log)]
        command += [word for section in SECTIONS for word in ("--section", section)]
        command += ["--kernel-name", f"regex:^({'|'.join(KERNELS)})$", "--launch-count", str(len(KERNELS))]
        command += [sys.executable, str(ROOT / "bench" / "gpu_kernels.py"), "once", "768"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        text = log.read_text() if log.exists() else ""
    found = counted(text.splitlines())
    print(json.dumps({"counted": found}))
    missing = [name for name in KERNELS if name not in found]
    if missing:
        said = [line for line in text.splitlines() if line.startswith("==ERROR==")] or (done.stdout + done.stderr).splitlines()[
            -5:
        ]
        print(f"no counters of {', '.join(missing)}: {' '.join(said)}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
