"""Runs the C++ kernels for Arm in an emulator, and compares the bits of their noise with this machine's.

    python tests/arm.py

Compiles tests/cpp/kernels.cpp and csrc/ for aarch64, and for this machine, without Python or torch. The exit status is 1 if a check
fails, and 2 if a tool is missing. $CROSS names the cross compiler, $QEMU the emulator.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent / "support")

from arm_program import CROSS, PROCESSORS, QEMU, build, missing  # noqa: E402


def main() -> int:
    """Prints a line for each processor."""
    if missing():
        print(missing(), file=sys.stderr)
        return 2
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        own = build(os.environ.get("CXX", "c++"), Path(folder) / "own")
        arm = build(CROSS, Path(folder) / "arm", "-static")
        bits = None
        for name, command in {
            "this machine": [own],
            **{f"Arm, {name}": [QEMU, "-cpu", name, arm] for name in PROCESSORS},
        }.items():
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            *lines, checked = done.stdout.splitlines() or ["checked nothing"]
            noise = [line for line in lines if line.startswith("noise ")]
            bits = bits or noise
            same = noise == bits and len(noise) > 1
            failed += done.returncode != 0 or not same
            print(
                f"{name}: {checked}; {'all right' if done.returncode == 0 else 'FAILED'}; noise {'the same bits' if same else 'DIFFERS'}"
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
