"""The C++ kernels as one program without Python or torch, and the emulator that runs it for Arm."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CROSS, QEMU = os.environ.get("CROSS", "aarch64-linux-gnu-g++"), os.environ.get("QEMU", "qemu-aarch64")
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fopenmp", f"-I{ROOT / 'csrc'}"]
PROCESSORS = {"max": "every extension that the emulator has", "cortex-a72": "no bfloat16"}
PRODUCTS = {"max": ["bfmmla"], "cortex-a72": []}  # of bfloat16, that each of them has


def build(
    compiler: str, folder: Path, *link: str, programs: tuple[str, ...] = ("kernels",), flags: tuple[str, ...] = ()
) -> Path:
    """Compiles the kernels with files of tests/cpp, the first of which names the program; returns it."""
    sources = [path for path in sorted(ROOT.glob("csrc/*.cpp")) if path.stem != "module"]
    sources += [ROOT / "tests/cpp" / f"{name}.cpp" for name in programs]
    folder.mkdir()

    def compiled(path: Path) -> Path:
        made = folder / f"{path.stem}.o"
        subprocess.run([compiler, *FLAGS, *flags, "-c", path, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    # A static libgomp warns that it would need the same glibc to load a device's plugin, which it never does.
    subprocess.run(
        [compiler, *FLAGS, *flags, *link, *objects, "-o", folder / programs[0]],
        check=True,
        stderr=subprocess.DEVNULL if link else None,
    )
    return folder / programs[0]


def missing() -> str:
    """Names the tools that are not here and how to get them; empty if all are."""
    tools = [tool for tool in (CROSS, QEMU) if shutil.which(tool) is None]
    return f"not at hand: {' and '.join(tools)}; on Debian: apt-get install g++-aarch64-linux-gnu qemu-user" if tools else ""
