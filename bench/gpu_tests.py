"""The Triton kernels' tests on a GPU, spread over many processes: ``python bench/gpu_tests.py``; prints JSON as it goes.

Each process runs every N-th test, so that all CPUs compile from the first second, and the most telling tests come first in all of
them. The last line is the result, or what there was of it when the command was stopped. Exit status 0: all passed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "undo_kernels" / "triton"
# The most telling first: vanishing divergences and spoilt memory; the GPU's own; every option; plans.
NAMES = ("vocab_loss_numerics", "on_gpu", "vocab_loss_options", "vocab_loss_plans", "triton_noise", "triton_rmu")
FIRST = ("its_teacher", "vanishes")  # identical heads, whose differences must be 0 by construction
PRINTED_EVERY = 3.0  # seconds


class Share:
    """A plugin of pytest that runs every ``count``-th test, from the ``number``-th on, and notes each in a file."""

    def __init__(self, number: int, count: int, file: Path) -> None:
        self.number, self.count, self.file = number, count, file

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: not any(word in item.name for word in FIRST))  # stable
        items[:] = items[self.number :: self.count]
        self.note(collected=len(items))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            said = str(report.longrepr)[-1500:] if report.failed else ""
            self.note(test=report.nodeid.split("/")[-1], outcome=report.outcome, seconds=report.duration, said=said)

    def note(self, **entry: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def so_far(folder: Path, began: float) -> dict[str, Any]:
    """Returns the outcomes of all processes until now."""
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines(keepends=True)
             if line.endswith("\n")]  # fmt: skip
    tests = [line for line in lines if "test" in line]
    collected = sum(line.get("collected", 0) for line in lines)
    outcomes = Counter(test["outcome"] for test in tests)
    slowest = sorted(tests, key=lambda test: -test["seconds"])[:10]
    return {
        "outcomes": dict(outcomes) | ({"not run": collected - len(tests)} if collected > len(tests) else {}),
        "failures": {test["test"]: test["said"] for test in tests if test["outcome"] == "failed"},
        "slowest": {test["test"]: round(test["seconds"], 2) for test in slowest},
        "seconds": round(time.monotonic() - began, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run tests whose names contain this")
    parser.add_argument("--files", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes (%(default)s)")
    parser.add_argument("--share", nargs=2, metavar=("NUMBER", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    files = [str(TESTS / f"test_{name}.py") for name in options.files]
    words = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", *(["-k", options.only] if options.only else []), *files]
    if options.share:
        number, file = options.share
        return int(pytest.main(words, plugins=[Share(int(number), options.workers, Path(file))]))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder, environment = Path(name), os.environ | {"OMP_NUM_THREADS": "1"}
        running = []
        for number in range(options.workers):
            command = [sys.executable, __file__, *(arguments or sys.argv[1:])]
            command += ["--share", str(number), str(folder / f"{number}.jsonl")]
            with (folder / f"{number}.said").open("w") as said:
                running.append(subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env=environment))
        while any(process.poll() is None for process in running):
            time.sleep(PRINTED_EVERY)
            print(json.dumps(so_far(folder, began)), flush=True)
        found = so_far(folder, began)
        codes = [process.returncode for process in running]
        broken = [number for number, code in enumerate(codes) if code not in (0, 1, 5)]  # 1: a test failed; 5: it had none
        for number in broken:  # a crash takes the tests behind it along
            found["failures"][f"process {number}"] = (folder / f"{number}.said").read_text()[-1500:]
    print(json.dumps(found))
    return int(bool(found["failures"]))


if __name__ == "__main__":
    raise SystemExit(main())
