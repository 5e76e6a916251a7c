"""Runs the kernels' tests in all variations of a machine: torch's vector units, threads, C++ instruction set, MKL's code path.

    python tests/variations.py [pytest arguments]

Each line is one run of tests/undo_kernels in a separate process, one after the other; the exit status is 1 if any fails. The
runs omit ahead-of-time compilation, which depends on none of this. An instruction set that this processor lacks is named and
not run.
"""

import os
import re
import subprocess
import sys
import time

from undo_kernels import cpu

BASE = {"OMP_NUM_THREADS": "1"}
VARIATIONS = [
    {},
    *({"ATEN_CPU_CAPABILITY": level} for level in ("default", "avx2")),
    *({"OMP_NUM_THREADS": str(threads)} for threads in (2, 4)),
    *(
        {"UNDO_CPU_ISA": name}
        for name in ("plain", "avx2", "avx512", "avx512bf16", "avx512bf16-emulated", "amx", "neon", "bfmmla")
    ),
    {"MKL_CBWR": "COMPATIBLE"},
    {"ATEN_CPU_CAPABILITY": "default", "UNDO_CPU_ISA": "plain", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "4"},
]
VARIED = sorted({name for variation in VARIATIONS for name in variation})


def run(variation: dict[str, str], arguments: list[str]) -> tuple[bool, str]:
    """Runs pytest; returns whether it passed, and its closing line."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIED} | BASE | variation
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    if done.returncode:
        print("\n".join(line for line in lines if re.match("E  |FAILED|ERROR", line)), file=sys.stderr)
    return done.returncode == 0, lines[-1]


def main(arguments: list[str]) -> int:
    """Prints a line for each variation."""
    arguments = arguments or ["tests/undo_kernels", "--ignore=tests/undo_kernels/triton/test_aot.py"]
    failed = 0
    for variation in VARIATIONS:
        name = " ".join(f"{key}={value}" for key, value in variation.items()) or "the best of this machine, 1 thread"
        missing = variation.get("UNDO_CPU_ISA")
        if missing and missing not in cpu.instruction_sets() + cpu.emulations():
            print(f"not here  {name}: this processor has {', '.join(cpu.instruction_sets())}", flush=True)
            continue
        start = time.monotonic()
        passed, line = run(variation, arguments)
        failed += not passed
        print(f"{'passed' if passed else 'FAILED'}    {name}: {line} ({time.monotonic() - start:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
