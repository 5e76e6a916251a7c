"""The benchmark runs, records what its readers need, and times nobody who computes something else."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench_kl(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("bench_kl")


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
        assert len(record["samples_s"]) == row["rounds"] == 2 and min(record["samples_s"]) > 0
        if "--no-memory" not in arguments:
            assert record["memory"]["extra_bytes"] >= 0 and record["memory"]["output_bytes"] == 4 * 32 * (64 + 1000)
        if record["name"] != "products":
            assert record["verification"]["verdict"] == "same"
    assert row["contenders"][0]["backend"] in ("cpu", "reference")
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
    [(["--only", "f32"], "--only"), (["--contenders", "nobody"], "--contenders"), (["--rounds", "0"], "--rounds")],
    ids=str,
)
def test_a_mistake_is_one_line_that_names_the_flag(bench_kl, arguments, named, capsys):
    with pytest.raises(SystemExit):
        bench_kl.parse(["--quick", *arguments])
    assert f"error: {named}: got" in capsys.readouterr().err


WRONG = {
    "loss": lambda loss, dh, dw: (2 * loss, dh, dw),
    "d_hidden": lambda loss, dh, dw: (loss, 1.5 * dh, dw),
    "d_weight": lambda loss, dh, dw: (loss, dh, dw.flip(0)),
    "nan": lambda loss, dh, dw: (loss, dh * torch.nan, dw),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_contender_is_rejected(bench_kl, dtype, fault):
    right = bench_kl.CONTENDERS["plain"]

    def build(inputs):
        step = right.build(inputs)
        return lambda: WRONG[fault](*step())

    wrong = bench_kl.Contender("wrong", "wrong", build)
    assert bench_kl.verify(right, dtype, None, "cpu")["verdict"] in ("same", "rounded")
    assert bench_kl.verify(wrong, dtype, None, "cpu")["verdict"] == "different"
    row = next(row for row in bench_kl.QUICK["cpu"] if row.dtype == dtype)
    record = bench_kl.blank(wrong, row, "cpu", None)
    assert record["status"].startswith("rejected") and "samples_s" not in record


def test_reverse_divergence_is_not_forward(bench_kl):
    def build(inputs):
        def step():
            student = inputs.student_hidden @ inputs.student_weight.T
            teacher = inputs.teacher_hidden @ inputs.teacher_weight.T
            s, t = student.log_softmax(-1), teacher.log_softmax(-1)
            loss = (s.exp() * (s - t)).sum(-1).mean()
            return loss.detach(), *torch.autograd.grad(loss, (inputs.student_hidden, inputs.student_weight))

        return step

    assert bench_kl.verify(bench_kl.Contender("reverse", "reverse", build), "float32", None, "cpu")["verdict"] == "different"


def test_softcap_is_part_of_what_is_verified(bench_kl):
    plain = bench_kl.CONTENDERS["plain"]
    assert bench_kl.verify(plain, "float32", 3.0, "cpu")["verdict"] == "same"
    deaf = bench_kl.Contender("deaf", "deaf", lambda inputs: plain.build(inputs.without_softcap()))
    assert bench_kl.verify(deaf, "float32", 3.0, "cpu")["verdict"] == "different"


def test_a_missing_peer_is_a_row_that_says_so(bench_kl, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.kernels.chunked_divergence", None)
    record = bench_kl.blank(bench_kl.CONTENDERS["trl"], bench_kl.QUICK["cpu"][0], "cpu", None)
    assert record["status"].startswith(("not installed", "not usable"))


def test_problems_of_a_given_divergence(bench_kl):
    for dtype in ("float32", "bfloat16"):
        inputs, (loss, *_) = bench_kl.at_divergence(1e-5, dtype, "cpu", 0)
        assert abs(float(loss) / 1e-5 - 1) < 0.02
        assert inputs.student_hidden.dtype == bench_kl.DTYPES[dtype]


def test_a_record_is_replaced_whole(bench_kl, monkeypatch, tmp_path):
    path = tmp_path / "deep" / "results.json"
    bench_kl.harness.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        bench_kl.harness.write_json(path, {"a": object()})
    monkeypatch.setattr(bench_kl.harness.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        bench_kl.harness.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]
