"""The benchmark runs, records what its readers need, and times no contender that computes something else."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import undo_kernels
from rounding import PATH, gamma
from torch.utils.flop_counter import FlopCounterMode
from undo_kernels.ops.dispatch import prefers_direct

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
KERNELS = "reference" if "cpu" in undo_kernels.unavailable() else "cpu"  # what undo-core's rows must have run on


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
    assert results["format"] == 2 and results["suite"] == "kl-cpu-quick"
    assert {"name", "cpu", "cores", "memory_bytes", "vector_flags"} <= results["machine"].keys()
    (row,) = results["rows"]
    assert (row["id"], row["tokens"], row["vocabulary"], row["width"], row["dtype"]) == ("quick-f32", 64, 8209, 32, "float32")
    assert {"when", "commit", "command", "threads", "versions"} <= row["provenance"].keys()
    assert row["provenance"]["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in out.read_text()
    assert [record["name"] for record in row["contenders"]] == ["undo-core", "products"]
    for record in row["contenders"]:
        assert record["status"] == "measured", record
        for key in ("samples_s", "forward_s"):
            assert len(record[key]) == row["rounds"] == 2 and min(record[key]) > 0
        if "--no-memory" not in arguments:
            assert record["memory"]["extra_bytes"] >= 0 and record["memory"]["output_bytes"] == 4 * 32 * (64 + 8209)
            assert record["forward_memory"]["extra_bytes"] >= 0 and record["forward_memory"]["output_bytes"] == 0
        if record["name"] != "products":
            assert record["verification"]["verdict"] == "same"
    ours = row["contenders"][0]
    for mode, kept in (("both", "memory"), ("forward", "forward_memory")):
        assert {call["backend"] for call in ours["ran"][mode]} == {KERNELS}
        assert ours["ran"][mode] == ours["verification"]["ran"][mode]
        assert "--no-memory" in arguments or ours[kept]["ran"] == ours["ran"][mode]
    assert row["owed"]["both"]["flops"] == 8 * 64 * 8209 * 32 and row["owed"]["forward"]["bytes"] == 2 * 4 * 32 * 8273
    assert row["ceilings"]["flops"] > 0 and row["ceilings"]["bytes_per_s"] > 0
    assert list(tmp_path.iterdir()) == [out]

    # Rows in the file are not measured again unless asked for; another row is added.
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


def quick(suite, dtype, softcap=None):
    """Returns the inputs of a quick row."""
    problems = importlib.import_module("problems")
    row = next(row for row in suite.quick["cpu"] if row.dtype == dtype)
    return problems.draw(dataclasses.replace(row, softcap=softcap), "cpu", suite.teacher)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_contender_is_rejected(suite, dtype, fault):
    right = suite.contenders["plain"]

    def build(inputs):
        loss = right.build(inputs)
        return lambda: WRONG[fault](loss())

    inputs = quick(suite, dtype)
    assert suite.verify(right, inputs, dtype)["verdict"] in ("same", "rounded")
    assert suite.verify(dataclasses.replace(right, build=build), inputs, dtype)["verdict"] == "different"


def timed(suite, monkeypatch, tmp_path, name, build):
    """Returns the record of one contender of a quick run, built with changes."""
    monkeypatch.setitem(suite.contenders, name, dataclasses.replace(suite.contenders[name], build=build))
    out = tmp_path / "results.json"
    arguments = ["--quick", "--no-memory", "--rounds", "1", "--only", "quick-f32", "--contenders", name, "--out", str(out)]
    importlib.import_module("runner").main(suite, "", arguments)
    return json.loads(out.read_text())["rows"][0]["contenders"][0]


def test_a_wrong_contender_is_not_timed(bench_kl, monkeypatch, tmp_path):
    suite = bench_kl.SUITE
    right = suite.contenders["plain"].build

    def build(inputs):
        loss = right(inputs)
        return lambda: 1.01 * loss()

    record = timed(suite, monkeypatch, tmp_path, "plain", build)
    assert record["status"].startswith("rejected") and "samples_s" not in record
    assert record["verification"]["loss"] == pytest.approx(0.01, abs=2 * gamma(PATH))  # and the loss's own rounding


@pytest.mark.skipif(KERNELS == "reference", reason="no C++ kernels here that another path could differ from")
@pytest.mark.parametrize("calls", [3, 4], ids=["between check and time", "between two modes' times"])
def test_a_contender_that_is_timed_on_another_path_than_verified_is_no_record(bench_kl, monkeypatch, tmp_path, calls):
    """The benchmark once reported errors of plain PyTorch beside times of the kernels."""
    suite = bench_kl.SUITE
    right, done = suite.contenders["undo-core"].build, []

    def build(inputs):
        loss = right(inputs)

        def run():
            done.append(1)
            with undo_kernels.backend("reference" if len(done) > calls else "cpu"):
                return loss()

        return run

    with pytest.raises(
        SystemExit, match=r"quick-f32: undo-core, (both|forward): timed reference, direct, but verified cpu, chunk"
    ):
        timed(suite, monkeypatch, tmp_path, "undo-core", build)
    assert not (tmp_path / "results.json").exists()


def test_the_reference_contender_that_ran_something_else_has_no_verdict(bench_kl, monkeypatch, tmp_path):
    suite = bench_kl.SUITE
    record = timed(suite, monkeypatch, tmp_path, "undo-reference", suite.contenders["plain"].build)
    assert record["status"] == "failed: RuntimeError: undo-reference: ran on nothing, wanted reference"
    assert "verification" not in record


def test_every_row_is_large_enough_for_the_kernels(suite):
    """Dispatch leaves smaller problems to plain PyTorch; the warm-up of a memory measurement must run the kernels too."""
    measuring, problems = importlib.import_module("measuring"), importlib.import_module("problems")
    backends = {"cpu": "cpu", "cuda": "triton"}
    rows = [(row, backends[device]) for table in (suite.rows, suite.quick) for device in table for row in table[device]]
    assert len(rows) > 10
    for row, backend in rows:
        for tokens in (
            row.tokens,
            min(row.tokens, measuring.WARM_UP_TOKENS),
            min(row.tokens, problems.ERROR_PAIRS["cpu"] // row.vocabulary),
        ):
            assert not prefers_direct(tokens, row.vocabulary, backend), row.id


def test_a_loss_that_is_wrong_without_gradients_is_rejected(suite):
    right = suite.contenders["plain"]

    def build(inputs):
        loss = right.build(inputs)
        return lambda: loss() * (1 if torch.is_grad_enabled() else 2)

    wrong = dataclasses.replace(right, build=build)
    assert suite.verify(wrong, quick(suite, "float32"), "float32")["verdict"] == "different"


def test_reverse_divergence_is_not_forward(bench_kl):
    def build(inputs):
        def loss():
            student = inputs.student_hidden @ inputs.student_weight.T
            teacher = inputs.teacher_hidden @ inputs.teacher_weight.T
            s, t = student.log_softmax(-1), teacher.log_softmax(-1)
            return (s.exp() * (s - t)).sum(-1).mean()

        return loss

    reverse = dataclasses.replace(bench_kl.CONTENDERS["plain"], build=build)
    assert bench_kl.SUITE.verify(reverse, quick(bench_kl.SUITE, "float32"), "float32")["verdict"] == "different"


@pytest.mark.parametrize(("dtype", "softcap"), [("float32", 3.0), ("float32", 30.0), ("bfloat16", 30.0)])
def test_softcap_is_part_of_what_is_verified(suite, dtype, softcap):
    plain, inputs = suite.contenders["plain"], quick(suite, dtype, softcap)
    assert suite.verify(plain, inputs, dtype)["verdict"] in ("same", "rounded")
    deaf = dataclasses.replace(plain, build=lambda inputs: plain.build(inputs.without_softcap()))
    assert suite.verify(deaf, inputs, dtype)["verdict"] == "different"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_contender_that_is_here_computes_the_same(suite, dtype):
    inputs = quick(suite, dtype)
    for contender in suite.contenders.values():
        if contender.is_loss and not contender.compiles and contender.missing("cpu") is None:
            assert suite.verify(contender, inputs, dtype)["verdict"] in ("same", "rounded"), contender.name


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_oracles_in_blocks_are_the_definition(suite, problems, monkeypatch, softcap):
    """Compares with torch's losses in float64 on the whole problem; blocks of 3 tokens leave one token over."""
    row = problems.Row("r", 7, 50, 12, "float32", softcap, ())
    inputs = problems.draw(row, "cpu", True)
    hidden, weight, *teacher = (t.detach().double().requires_grad_() for t in inputs.heads)

    def logits(hidden, weight):
        z = hidden @ weight.T
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    z = logits(hidden, weight)
    if suite.teacher:
        loss = torch.nn.functional.kl_div(
            z.log_softmax(-1), logits(*teacher).log_softmax(-1), reduction="batchmean", log_target=True
        )
    else:
        loss = torch.nn.functional.cross_entropy(z, inputs.labels)
    wanted = loss, *torch.autograd.grad(loss, (hidden, weight))
    monkeypatch.setattr(problems, "ORACLE_PAIRS", 3 * row.vocabulary)
    room = 2 * gamma(PATH, torch.float64)  # of both
    assert max(problems.errors(suite.oracle(inputs), wanted).values()) < room
    assert float(suite.oracle(inputs, gradients=False)[0]) == pytest.approx(float(loss), rel=room)


def test_accuracy_is_measured_again_without_timing(bench_kl, tmp_path, capsys):
    out = tmp_path / "results.json"
    common = ["--quick", "--no-memory", "--only", "quick-f32", "--out", str(out), "--contenders"]
    bench_kl.main([*common, "undo-core", "plain", "--rounds", "1"])
    first = json.loads(out.read_text())
    spoilt = json.loads(out.read_text())
    for record in spoilt["rows"][0]["contenders"]:
        record["verification"] |= {"d_hidden": 0.5, "verdict": "different"}
    out.write_text(json.dumps(spoilt))
    bench_kl.main([*common, "undo-core", "--accuracy"])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["provenance"] == first["rows"][0]["provenance"] and "--accuracy" in row["accuracy_provenance"]["command"]
    for before, after in zip(first["rows"][0]["contenders"], row["contenders"], strict=True):
        assert after["samples_s"] == before["samples_s"] and after["status"] == "measured"
        if after["name"] == "undo-core":
            assert after == before
        else:  # it was not named
            assert after["verification"]["verdict"] == "different"
    # A row that was timed on another path does not get errors of this one.
    for call in spoilt["rows"][0]["contenders"][0]["ran"]["both"]:
        call["form"] = "another"
    out.write_text(json.dumps(spoilt))
    with pytest.raises(SystemExit, match=r"quick-f32: undo-core, both: timed .*another, but verified .* stays as it was"):
        bench_kl.main([*common, "undo-core", "--accuracy"])
    assert json.loads(out.read_text()) == spoilt
    # A row without times stays without times.
    out.unlink()
    bench_kl.main([*common, "undo-core", "--accuracy"])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["contenders"][0]["status"] == "verified" and "samples_s" not in row["contenders"][0]


def test_gradient_errors_are_of_the_path_of_a_row(bench_kl, monkeypatch, tmp_path):
    out = tmp_path / "results.json"
    monkeypatch.setattr(bench_kl, "ERROR_TARGETS", [1.0, 1e-5])
    monkeypatch.setitem(bench_kl.ERROR_PAIRS, "cpu", 8209 * 8)  # few enough that dispatch by itself would use plain PyTorch
    arguments = ["--quick", "--only", "error", "--contenders", "undo-core", "plain", "--out", str(out)]
    bench_kl.main(arguments)
    curves = json.loads(out.read_text())["error_versus_kl"]["curves"]
    assert [(c["name"], c["dtype"], c["row"], c["tokens"]) for c in curves] == [
        ("undo-core", "float32", "quick-f32", 8), ("undo-core", "bfloat16", "quick-bf16", 8), ("plain", "bfloat16", "quick-bf16", 8)
    ]  # fmt: skip
    for curve in curves:
        used = {call["backend"] for point in curve["points"] for run in point["seeds"] for call in run["ran"]}
        assert used == ({KERNELS} if curve["name"] == "undo-core" else set())
        # Rounding to 16 bits before the subtraction loses everything as the two meet; the kernels' error stays the same.
        errors = [point["seeds"][0]["d_hidden"] for point in curve["points"]]
        assert errors[1] > 0.3 if curve["name"] == "plain" else max(errors) < (1e-2 if curve["dtype"] == "bfloat16" else 1e-3)
    if KERNELS == "cpu":
        monkeypatch.setattr(bench_kl, "_ran_in", lambda *arguments: [])
        with pytest.raises(SystemExit, match="undo-core, float32, KL 1: ran reference, direct, wanted none"):
            bench_kl.main([*arguments, "--fresh"])


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
    """The problems have the row's shape, which decides the forms of its products."""
    for dtype in ("float32", "bfloat16"):
        student = problems.Approaching(problems.Row("r", 100, 500, 64, dtype, None, ()), 20, "cpu", 0)
        for target in (0.1, 1e-5):
            inputs, (loss, *_) = student.within(target)
            assert abs(float(loss) / target - 1) < 0.02
            assert inputs.student_hidden.dtype == inputs.teacher_weight.dtype == problems.DTYPES[dtype]
            assert inputs.student_hidden.shape == inputs.teacher_hidden.shape == (20, 64)


def test_rounds_stop_when_their_time_is_over(bench_kl, monkeypatch):
    harness = importlib.import_module("harness")
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(harness.time, "monotonic", lambda: next(clock))
    steps = {"a": lambda: None, "b": lambda: None}
    assert [name for name, _ in harness.interleave(steps, 9, "cpu", 3, 5.0)] == ["a", "b"] * 3
    assert len(list(harness.interleave(steps, 4, "cpu"))) == 8


WITHOUT_COMPILER = "quick and not bf16 and not compile and not chunker and not liger"


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
    with pytest.raises(SystemExit, match=r"rows of another-.*, wanted"):
        runner.load(options.out, "kl", options, {})
    # In clouds, several processors have the same name.
    facts = {**record["machine"], "cpu_family_model_stepping": ["6", "1", "0"]}
    options.out.write_text(json.dumps({**record, "machine": facts}))
    with pytest.raises(SystemExit, match=f"rows of {facts['name']}-6-1-0, wanted"):
        runner.load(options.out, "kl", options, {})


def test_every_contender_has_a_colour(suite):
    assert set(suite.contenders) <= set(importlib.import_module("plot").COLOURS)


def test_a_graph_that_the_auto_chunker_left_whole_is_no_contender(bench_kl, monkeypatch):
    contenders, metrics = importlib.import_module("contenders"), importlib.import_module("torch._inductor.metrics")
    monkeypatch.setattr(torch, "compile", lambda loss, **options: loss)
    hidden = torch.ones(3, requires_grad=True)
    whole = contenders.auto_chunked(torch.sum)
    assert whole(hidden.detach()) == 3, "without gradients there is nothing to chunk"
    with pytest.raises(RuntimeError, match="left the graph whole"):
        whole(hidden)

    def chunked(tensor):
        monkeypatch.setattr(metrics, "num_auto_chunking", metrics.num_auto_chunking + 1)
        return tensor.sum()

    assert contenders.auto_chunked(chunked)(hidden) == 3


@pytest.mark.skipif(KERNELS == "reference", reason="no C++ kernels here")
def test_a_machines_name_tells_instruction_sets_apart(bench_kl, monkeypatch):
    harness, extension = importlib.import_module("harness"), importlib.import_module("undo_kernels.cpu.extension")
    names, emulated = set(), SimpleNamespace(name="avx512bf16-emulated", emulated=True)

    def stand_in(best, own):
        return SimpleNamespace(instruction_set=lambda wanted: best, bf16_products=lambda: [*own, emulated])

    for best in ("avx512", "avx2", "plain"):
        for own in ([], [SimpleNamespace(name="amx", emulated=False)]):
            monkeypatch.setattr(extension, "kernels", stand_in(best, own))
            names.add(harness.machine("cpu")["name"])
    assert len(names) == 6 and any(name.endswith("-avx512-amx") for name in names)


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
