"""Runs the C++ kernels for Arm in an emulator, and compares the bits of their noise with this machine's.

    python tests/arm.py

Compiles tests/cpp/kernels.cpp and csrc/ for aarch64, and for this machine, without Python or torch. The exit status is 1 if a check
fails, and 2 if a tool is missing. $CROSS names the cross compiler, $QEMU the emulator.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CROSS, QEMU = os.environ.get("CROSS", "aarch64-linux-gnu-g++"), os.environ.get("QEMU", "qemu-aarch64")
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fopenmp", f"-I{ROOT / 'csrc'}"]
PROCESSORS = {"max": "every extension that the emulator has", "cortex-a72": "no bfloat16"}


def build(compiler: str, folder: Path, *link: str) -> Path:
    """Compiles the kernels and their checks; returns the program."""
    sources = [ROOT / "tests/cpp/kernels.cpp", *(path for path in sorted(ROOT.glob("csrc/*.cpp")) if path.stem != "module")]
    folder.mkdir()

    def compiled(path: Path) -> Path:
        made = folder / f"{path.stem}.o"
        subprocess.run([compiler, *FLAGS, "-c", path, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    # A static libgomp warns that it would need the same glibc to load a device's plugin, which it never does.
    subprocess.run(
        [compiler, *FLAGS, *link, *objects, "-o", folder / "kernels"], check=True, stderr=subprocess.DEVNULL if link else None
    )
    return folder / "kernels"


def main() -> int:
    """Prints a line for each processor."""
    missing = [tool for tool in (CROSS, QEMU) if shutil.which(tool) is None]
    if missing:
        print(f"not here: {' and '.join(missing)}; on Debian: apt-get install g++-aarch64-linux-gnu qemu-user", file=sys.stderr)
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
            *noise, checked = done.stdout.splitlines() or ["checked nothing"]
            bits = bits or noise
            same = noise == bits and len(noise) > 1
            failed += done.returncode != 0 or not same
            print(
                f"{name}: {checked}; {'all right' if done.returncode == 0 else 'FAILED'}; noise {'the same bits' if same else 'DIFFERS'}"
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
