"""The smaller benchmarks run, record what they measured, and have a table each."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import undo_kernels

ROOT = Path(__file__).resolve().parents[2]
KERNELS = "reference" if "cpu" in undo_kernels.unavailable() else "cpu"
SUITES = {
    "noise": (["--quick", "--rounds", "2", "--only", "f32-uniform"], "xavier-uniform, float32"),
    "rmu": (["--quick", "--rounds", "2"], "layers 1 to 2 of 4"),
    "step": (["--quick", "--steps", "2", "--modes", "lean-stochastic"], "lean: bfloat16, stochastic"),
}


@pytest.mark.parametrize("suite", SUITES)
def test_a_quick_run_gives_a_table(suite, tmp_path, monkeypatch):
    arguments, expected = SUITES[suite]
    results, document = tmp_path / "results.json", tmp_path / "page.md"
    command = [sys.executable, str(ROOT / "bench" / f"bench_{suite}.py"), *arguments, "--out", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    document.write_text(f"<!-- bench:{suite}-cpu -->\n<!-- /bench:{suite}-cpu -->\n")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    tables = importlib.import_module("tables")
    assert tables.main([str(document), str(results)]) == 0
    text = document.read_text()
    assert expected in text and text.count("\n| ") >= 2 and "None" not in text
    assert tables.main([str(document), "--check"]) == 0
    for row in json.loads(results.read_text())["rows"]:
        assert row["provenance"]["command"].startswith(f"python bench/bench_{suite}.py")
        for record in row["contenders"]:
            assert record["samples_s"] and all(sample > 0 for sample in record["samples_s"])
            used = {call["backend"] for calls in record["ran"].values() for call in calls}
            assert used == (set() if record["name"] in ("torch", "usual", "plain") else {KERNELS}), record["name"]
            if "verification" in record:
                assert record["verification"]["ran"] == record["ran"]


def test_the_modes_learn_what_the_plain_loop_learns(tmp_path):
    results = tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "bench" / "bench_step.py"), "--quick", "--steps", "3", "--modes", "float32", "cached"]
    subprocess.run([*command, "--out", str(results)], check=True, capture_output=True, timeout=300)
    records = json.loads(results.read_text())["rows"][0]["contenders"]
    assert {call["backend"] for record in records for call in record["ran"]["both"]} == {KERNELS}
    losses = {record["name"]: record["loss"] for record in records}
    assert losses["float32"] == losses["cached"] == pytest.approx(losses["plain"], rel=1e-4)
