"""The benchmark runs, records what its readers need, and times nobody who computes something else."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"


@pytest.fixture
def bench_kl(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("bench_kl")


@pytest.fixture
def problems(bench_kl):
    return importlib.import_module("problems")


@pytest.fixture
def runner(bench_kl):
    return importlib.import_module("runner")


@pytest.fixture(params=["bench_kl", "bench_cross_entropy"])
def suite(request, bench_kl):
    return importlib.import_module(request.param).SUITE


def test_a_quick_run_records_everything(bench_kl, tmp_path):
    out = tmp_path / "results.json"
    arguments = ["--quick", "--threads", "1", "--only", "quick-f32", "--contenders", "undo-core", "products", "--out", str(out)]
    if not sys.platform.startswith("linux"):
        arguments.append("--no-memory")
    command = [sys.executable, str(BENCH / "bench_kl.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results["format"] == 1 and results["suite"] == "kl-cpu-quick"
    assert {"name", "cpu", "cores", "memory_bytes", "vector_flags"} <= results["machine"].keys()
    (row,) = results["rows"]
    assert (row["id"], row["tokens"], row["vocabulary"], row["width"], row["dtype"]) == ("quick-f32", 64, 1000, 32, "float32")
    assert {"when", "commit", "command", "threads", "versions"} <= row["provenance"].keys()
    assert row["provenance"]["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in out.read_text()
    assert [record["name"] for record in row["contenders"]] == ["undo-core", "products"]
    for record in row["contenders"]:
        assert record["status"] == "measured", record
        for key in ("samples_s", "forward_s"):
            assert len(record[key]) == row["rounds"] == 2 and min(record[key]) > 0
        if "--no-memory" not in arguments:
            assert record["memory"]["extra_bytes"] >= 0 and record["memory"]["output_bytes"] == 4 * 32 * (64 + 1000)
            assert record["forward_memory"]["extra_bytes"] >= 0 and record["forward_memory"]["output_bytes"] == 0
        if record["name"] != "products":
            assert record["verification"]["verdict"] == "same"
    assert row["contenders"][0]["backend"] in ("cpu", "reference")
    assert row["owed"]["both"]["flops"] == 8 * 64 * 1000 * 32 and row["owed"]["forward"]["bytes"] == 2 * 4 * 32 * 1064
    assert row["ceilings"]["flops"] > 0 and row["ceilings"]["bytes_per_s"] > 0
    assert list(tmp_path.iterdir()) == [out]

    # What the file has is not measured again, unless asked for; another row is added to it.
    before = json.loads(out.read_text())["rows"]
    bench_kl.main(
        ["--quick", "--no-memory", "--rounds", "1", "--contenders", "undo-core", "--only", "quick-bf16", "--out", str(out)]
    )
    after = json.loads(out.read_text())["rows"]
    assert after[0] == before[0]
    assert [(row["id"], row["rounds"]) for row in after] == [("quick-f32", 2), ("quick-bf16", 1)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--only", "f32"], "--only"),
        (["--contenders", "nobody"], "--contenders"),
        (["--rounds", "0"], "--rounds"),
        (["--activations", "tests"], "--activations"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_that_names_the_flag(bench_kl, arguments, named, capsys):
    with pytest.raises(SystemExit):
        bench_kl.main(["--quick", *arguments])
    assert f"error: {named}: got" in capsys.readouterr().err


WRONG = {
    "loss": lambda loss: 2 * loss,
    "gradient": lambda loss: 1.5 * loss - 0.5 * loss.detach(),
    "nan": lambda loss: loss * torch.nan,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_contender_is_rejected(suite, dtype, fault):
    right = suite.contenders["plain"]

    def build(inputs):
        loss = right.build(inputs)
        return lambda: WRONG[fault](loss())

    wrong = dataclasses.replace(right, build=build)
    assert suite.verify(right, dtype, None, "cpu")["verdict"] in ("same", "rounded")
    assert suite.verify(wrong, dtype, None, "cpu")["verdict"] == "different"
    row = next(row for row in suite.quick["cpu"] if row.dtype == dtype)
    record = suite.blank(wrong, row, "cpu", None)
    assert record["status"].startswith("rejected") and "samples_s" not in record


def test_a_loss_that_is_wrong_without_gradients_is_rejected(suite):
    right = suite.contenders["plain"]

    def build(inputs):
        loss = right.build(inputs)
        return lambda: loss() * (1 if torch.is_grad_enabled() else 2)

    assert suite.verify(dataclasses.replace(right, build=build), "float32", None, "cpu")["verdict"] == "different"


def test_reverse_divergence_is_not_forward(bench_kl):
    def build(inputs):
        def loss():
            student = inputs.student_hidden @ inputs.student_weight.T
            teacher = inputs.teacher_hidden @ inputs.teacher_weight.T
            s, t = student.log_softmax(-1), teacher.log_softmax(-1)
            return (s.exp() * (s - t)).sum(-1).mean()

        return loss

    reverse = dataclasses.replace(bench_kl.CONTENDERS["plain"], build=build)
    assert bench_kl.SUITE.verify(reverse, "float32", None, "cpu")["verdict"] == "different"


def test_softcap_is_part_of_what_is_verified(suite):
    plain = suite.contenders["plain"]
    assert suite.verify(plain, "float32", 3.0, "cpu")["verdict"] == "same"
    deaf = dataclasses.replace(plain, build=lambda inputs: plain.build(inputs.without_softcap()))
    assert suite.verify(deaf, "float32", 3.0, "cpu")["verdict"] == "different"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_contender_that_is_here_computes_the_same(suite, dtype):
    for contender in suite.contenders.values():
        if contender.is_loss and not contender.compiles and contender.missing("cpu") is None:
            assert suite.verify(contender, dtype, None, "cpu")["verdict"] in ("same", "rounded"), contender.name


def test_what_a_row_owes_is_what_the_products_compute(suite):
    row = suite.quick["cpu"][0]
    ceilings, measuring = importlib.import_module("ceilings"), importlib.import_module("measuring")
    owed = ceilings.owed(row.tokens, row.vocabulary, row.width, 4, 1 + suite.teacher)
    inputs = measuring.draw(row, "cpu", suite.teacher)
    for mode in ("both", "forward"):
        with FlopCounterMode(display=False) as counter:
            suite.contenders["products"].step(inputs, mode)()
        assert counter.get_total_flops() == owed[mode]["flops"]


def test_the_floor_is_the_longer_of_two_times(bench_kl):
    ceilings = importlib.import_module("ceilings")
    row = {"owed": {"both": {"flops": 100.0, "bytes": 10.0}}, "ceilings": {"flops": 50.0, "bytes_per_s": 1.0}}
    assert ceilings.floor_seconds(row) == 10.0
    assert ceilings.of_floor(row, {"samples_s": [20.0]}) == 0.5 and ceilings.of_floor(row, {}) is None
    row["ceilings"]["bytes_per_s"] = 100.0
    assert ceilings.floor_seconds(row) == 2.0 and ceilings.floor_seconds({}) is None


def test_a_missing_peer_is_a_row_that_says_so(bench_kl, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.kernels.chunked_divergence", None)
    row = bench_kl.QUICK["cpu"][0]
    record = bench_kl.SUITE.blank(bench_kl.CONTENDERS["trl"], row, "cpu", None)
    assert record["status"].startswith(("not installed", "not usable"))
    record = bench_kl.SUITE.blank(bench_kl.CONTENDERS["liger-triton"], row, "cpu", None)
    assert record["status"] == "GPU only: it has no CPU path"


def test_problems_of_a_given_divergence(problems):
    for dtype in ("float32", "bfloat16"):
        inputs, (loss, *_) = problems.at_divergence(1e-5, dtype, "cpu", 0)
        assert abs(float(loss) / 1e-5 - 1) < 0.02
        assert inputs.student_hidden.dtype == problems.DTYPES[dtype]


def test_rounds_stop_when_their_time_is_over(bench_kl, monkeypatch):
    harness = importlib.import_module("harness")
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(harness.time, "monotonic", lambda: next(clock))
    steps = {"a": lambda: None, "b": lambda: None}
    assert [name for name, _ in harness.interleave(steps, 9, "cpu", 3, 5.0)] == ["a", "b"] * 3
    assert len(list(harness.interleave(steps, 4, "cpu"))) == 8


WITHOUT_COMPILER = "quick and not bf16 and not compile and not liger"


def test_pytest_benchmark_runs_the_same_contenders(tmp_path):
    arguments = [
        "--benchmark-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        WITHOUT_COMPILER,
        f"--benchmark-json={tmp_path / 'b.json'}",
    ]
    command = [sys.executable, "-m", "pytest", str(BENCH), *arguments]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of this run
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    found = json.loads((tmp_path / "b.json").read_text())["benchmarks"]
    assert {"kl quick-f32 both", "cross-entropy quick-f32 forward"} <= {one["group"] for one in found}
    assert {"noise", "rmu"} <= {one["group"].split()[0] for one in found}


def test_another_machines_rows_are_not_taken_for_this_ones(bench_kl, tmp_path):
    runner = importlib.import_module("runner")
    options = runner.parse(bench_kl.SUITE, "", ["--out", str(tmp_path / "rows.json")])
    record = runner.load(options.out, "kl", options, {})
    options.out.write_text(json.dumps({**record, "machine": {**record["machine"], "name": "another"}}))
    with pytest.raises(SystemExit, match="rows of another, wanted"):
        runner.load(options.out, "kl", options, {})


def test_a_record_is_replaced_whole(bench_kl, monkeypatch, tmp_path):
    harness = importlib.import_module("harness")
    path = tmp_path / "deep" / "results.json"
    harness.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        harness.write_json(path, {"a": object()})
    monkeypatch.setattr(harness.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        harness.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]
