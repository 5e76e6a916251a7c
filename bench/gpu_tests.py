"""The Triton kernels' tests on a GPU, their files side by side: ``python bench/gpu_tests.py``; prints one JSON object.

Each file is a process of its own, so that the CPUs compile side by side what one of them would compile in turn. Exit status 0: all
passed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "undo_kernels" / "triton"
# The most telling first: identical heads and vanishing divergences; every option; plans; the GPU's own.
NAMES = ("vocab_loss_numerics", "vocab_loss_options", "vocab_loss_plans", "on_gpu", "triton_noise", "triton_rmu")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run tests whose names contain this")
    parser.add_argument("--files", nargs="+", choices=NAMES, default=NAMES)
    options = parser.parse_args(arguments)
    began, running = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.files:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / f"test_{name}.py")]
            command += ["-k", options.only] if options.only else []
            said = (Path(folder) / name).open("w+")
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            running[name] = (subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env=environment), said)
        found = {}
        for name, (process, said) in running.items():
            code = process.wait()
            said.seek(0)
            lines = said.read().strip().splitlines() or [""]
            found[name] = {"status": code, "seconds": round(time.monotonic() - began, 1), "said": lines[-1]}
            if code not in (0, 5):  # 5: no test of that name
                found[name]["failures"] = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:40]
                print("\n".join(lines[-60:]), file=sys.stderr)
    print(json.dumps({"files": found}))
    return int(any(entry["status"] not in (0, 5) for entry in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
