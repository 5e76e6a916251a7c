"""Two builds of one state give the same bytes, whatever the folder, its times, the umask and the time zone are."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["LICENSE", "README.md", "csrc", "kernels", "pyproject.toml", "setup.py", "undo_core"]
ELSEWHERE = [  # how the two builds differ
    {"folder": "one", "umask": 0o022, "age": 0, "TZ": "UTC", "PYTHONHASHSEED": "1"},
    {"folder": "another folder", "umask": 0o077, "age": 86_400, "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "2"},
]


def build(kind, source, out, where, compiler):
    """Returns the file that setuptools builds of ``source``."""
    variables = {"SOURCE_DATE_EPOCH": "1700000000", "TZ": where["TZ"], "PYTHONHASHSEED": where["PYTHONHASHSEED"], **compiler}
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({os.fspath(out)!r})"
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**os.environ, **variables},
        umask=where["umask"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("NO C++ KERNELS" in done.stderr) == (kind == "wheel" and bool(compiler))
    (built,) = out.iterdir()
    return built


def copied(folder, where):
    """Returns a copy of what a source archive is made of, with other times."""
    for name in PARTS:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info"))
        else:
            shutil.copy(source, target)
    for path in folder.rglob("*"):
        os.utime(path, (path.stat().st_mtime - where["age"],) * 2)
    return folder


def test_builds_have_the_same_bytes(tmp_path, tries, account):
    """In the quick part there is no compiler; the full part compiles the extension twice."""
    compiler, bytes_of = {} if tries(1, 2) > 1 else {"CC": "false", "CXX": "false"}, []
    for where in ELSEWHERE:
        folder = tmp_path / where["folder"]
        archive = build("sdist", copied(folder / "tree", where), folder / "sdist", where, compiler)
        with tarfile.open(archive) as packed:  # as `python -m build` does
            packed.extractall(folder / "unpacked", filter="data")
        (source,) = (folder / "unpacked").iterdir()
        wheel = build("wheel", source, folder / "wheel", where, compiler)
        bytes_of.append({"sdist": archive.read_bytes(), "wheel": wheel.read_bytes()})
    one, other = bytes_of
    assert {kind: one[kind] == other[kind] for kind in one} == {"sdist": True, "wheel": True}
    account("builds with the same bytes", tried=2, survived=2)
