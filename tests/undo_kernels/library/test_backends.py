"""The choice of a backend: by name, by device, and the warning of a fallback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rounding import assert_as_exact_as, probability_error
from undo_kernels import BackendWarning, backend
from undo_kernels.library import backends
from vocab_losses import draw

from undo_core import ops

ROOT = Path(__file__).resolve().parents[3]


def test_without_a_compiler_the_install_goes_on_and_says_so(tmp_path):
    environment = {**os.environ, "CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "temp")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "NO C++ KERNELS" in done.stderr and "reference backend" in done.stderr


def test_without_openmp_the_install_says_so_and_compiles_for_one_thread(tmp_path):
    """As with Apple's compiler. The stand-in compiles nothing but the probe, so that this takes no minute."""
    compiler, log = tmp_path / "c++", tmp_path / "commands"
    compiler.write_text(f"""#!/bin/sh
echo "$@" >> {log}
case "$*" in *-fopenmp*) echo "unsupported option '-fopenmp'" >&2; exit 1;; *csrc*) exit 1;; esac
exec c++ "$@"
""")
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "CC": str(compiler)}
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "temp")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("NO OPENMP: the compiler rejects -fopenmp") == 1, done.stderr
    commands = log.read_text().splitlines()
    assert "-fopenmp" in commands[0] and any("csrc" in line for line in commands)
    assert all("-fopenmp" not in line for line in commands if "csrc" in line)


def test_without_the_extension_the_reference_runs_and_warns_once():
    program = """
import sys, warnings
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "undo_kernels._cpu":
            raise ImportError("not built")
sys.meta_path.insert(0, Refuse())
import torch
from undo_core import ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        ops.noise_({"w": torch.ones(3, 3)}, alpha=0.5, beta=0.1, seed=0)
assert len(caught) == 1 and "not built" in str(caught[0].message), [str(c.message) for c in caught]
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_the_cpu_backend_is_not_given_another_devices_tensors(monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    with backend("cpu"), pytest.warns(BackendWarning, match="not on cuda"):
        assert backends.choose("noise_", torch.device("cuda")) == "reference"


def test_backend_is_chosen_by_name_and_a_fallback_is_loud(monkeypatch):
    h, w, th, tw = draw(7, 53, 5, 5)
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setitem(backends._unavailable, "cpu", "taken away by the test")
    with pytest.warns(BackendWarning, match="vocab_loss runs on the reference backend, not cpu: taken away"):
        ops.linear_kl_div(h, w, th, tw, plan="chunk")
    monkeypatch.delitem(backends._unavailable, "cpu")
    with backend("reference"):
        a = ops.linear_kl_div(h, w, th, tw)
    exact = ops.linear_kl_div(*(t.double() for t in (h, w, th, tw)), plan="direct")
    assert_as_exact_as(ops.linear_kl_div(h, w, th, tw, plan="chunk"), a, exact, probability_error(h, w))
