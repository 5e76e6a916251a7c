"""The C++ kernels under address, undefined-behaviour and thread sanitizers: random calls, alone and behind their Python.

Alone: tests/cpp/random_calls.cpp, in several threads at once. Under ThreadSanitizer, tests/cpp/team.cpp takes the place of libgomp, whose
synchronisation the tool does not see; the kernels' own code and loops are the same. Behind Python: the extension is compiled by setup.py
with UNDO_SANITIZE, and tests/support/random_calls.py calls it with torch's own memory, which the preloaded library surrounds by borders. All
of torch, not compiled so, is outside of what is shown; so are races of its threads with the kernels', which run one after the other.
"""

import os
import shutil
import subprocess
import sys

import pytest
from arm_program import ROOT, build

COMPILER = os.environ.get("CXX", "g++")
REPORTED = ("ERROR: AddressSanitizer", "runtime error:", "WARNING: ThreadSanitizer")
# Leaks of Python's own start are none of ours; the first report ends the program.
QUIET = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
WAYS = {"address,undefined": ("address", "undefined"), "thread": ("thread",)}


def run(command, **variables):
    """Returns exit status and what was written."""
    environment = os.environ | QUIET | {"OMP_NUM_THREADS": "2"} | variables
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, errors="replace")
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def compiler():
    if shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} is not at hand; $CXX names a compiler")
    return COMPILER


@pytest.mark.parametrize("sanitizer", WAYS)
def test_the_kernels_alone(compiler, sanitizer, tmp_path, tries, account):
    count, threads = tries(0, 20_000), 3
    programs = ("random_calls", "team") if sanitizer == "thread" else ("random_calls",)
    flags = (f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer", "-g1", "-O1")
    program = build(compiler, tmp_path / "program", programs=programs, flags=flags)
    for fault in WAYS[sanitizer]:
        status, said = run([program, "planted", fault])
        assert any(report in said for report in REPORTED), f"a planted fault of {fault} was not found: {status} {said[-2000:]}"
    status, said = run([program, 0, count, threads])
    assert status == 0 and f"called {threads * count}" in said and not any(report in said for report in REPORTED), said[-8000:]
    account(f"random kernels under {sanitizer}", tried=threads * count, survived=threads * count)


def test_the_extension_behind_python(compiler, tmp_path, tries, account):
    count = tries(0, 20_000)
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"],
        cwd=ROOT, env=os.environ | {"UNDO_SANITIZE": "address,undefined"}, capture_output=True, text=True,
    )  # fmt: skip
    (extension,) = (tmp_path / "lib").rglob("_cpu*.so")
    assert built.returncode == 0, built.stderr[-4000:]
    # The C++ library too: the tool looks for its functions once, at the start of a program that does not have it yet.
    found = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    program = [sys.executable, "-W", "ignore", ROOT / "tests" / "support" / "random_calls.py", 0, count, extension]
    status, said = run(program, LD_PRELOAD=" ".join(found))
    assert status == 0 and "losses" in said and not any(report in said for report in REPORTED), said[-8000:]
    account("random calls of ops under address,undefined", tried=count, survived=count)
