"""The check passes what is as good as the baseline, and fails, in one line that names the number, what was made worse."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
from undo_kernels.cpu import plan as plans
from undo_kernels.cpu import vocab_loss

BENCH = Path(__file__).resolve().parents[2] / "bench"
needs_kernels = pytest.mark.skipif(vocab_loss.kernels is None, reason="no C++ kernels here")


@pytest.fixture
def regressions(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("regressions")


def test_plans_are_as_good_as_the_baseline(regressions, capsys):
    assert regressions.main(["--only", "plan"]) == 0
    assert capsys.readouterr().out == "bench-check: nothing got worse (plan)\n"


def test_a_larger_workspace_fails_and_is_named(regressions, monkeypatch, capsys):
    monkeypatch.setattr(plans, "_CHUNK", 2 * plans._CHUNK)
    assert regressions.main(["--only", "plan"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("plan: forward, cpu, float32, 1024 × 256000 × 320: workspace bytes got worse: 558,956,544 -> ")
        for line in lines
    ), lines


@needs_kernels
def test_a_pass_that_runs_twice_fails_and_is_named(regressions, monkeypatch, capsys):
    assert regressions.main(["--only", "calls"]) == 0, capsys.readouterr().out
    once = vocab_loss._Run._statistics

    def twice(self, chunks):
        for chunk in chunks:
            for first, entries in self.tiles():
                self._tile(chunk, first, entries)
        once(self, chunks)

    monkeypatch.setattr(vocab_loss._Run, "_statistics", twice)
    assert regressions.main(["--only", "calls"]) == 1
    assert "calls: kl f32: products got worse: 8 -> 12 (+50.0 %, tolerated 0 %)" in capsys.readouterr().out


@needs_kernels
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="no valgrind here")
def test_instructions_are_counted_and_more_of_them_fail(regressions, tmp_path, capsys):
    path = tmp_path / "baseline.json"
    assert regressions.main(["--only", "instructions", "--write", "--baseline", str(path)]) == 0
    baseline = json.loads(path.read_text())
    (counted,) = baseline["instructions"].values()
    assert set(counted) == set(regressions.KERNELS) and all(0.1 < value < 100 for value in counted.values())
    again = {name: value * (1.05 if "noise" in name else 1.0) for name, value in counted.items()}
    lines = regressions.worse("instructions", again, counted)
    assert len(lines) == 1 and lines[0].startswith("instructions: noise, uniform, float32 got worse")
    committed = json.loads(regressions.BASELINE.read_text())["instructions"]
    for compiler in committed.keys() & baseline["instructions"].keys():
        assert regressions.worse("instructions", counted, committed[compiler]) == []


@needs_kernels
def test_numbers_are_compared_with_those_of_the_backend_that_ran(regressions, monkeypatch, capsys):
    monkeypatch.setattr(
        regressions, "STEPS", {"kl f32": ("kl", regressions.Row("regressions", 64, 8209, 8, "float32", None, ()))}
    )
    with regressions.undo_kernels.backend("reference"):
        assert regressions.main(["--only", "calls"]) == 1
    assert "calls: not compared: the baseline is of backend cpu, this is backend reference" in capsys.readouterr().out
    monkeypatch.setattr(regressions, "ratio", lambda: {"kl": 1.0})
    small = {
        name: (suite, regressions.replace(row, tokens=64, vocabulary=8209, width=8))
        for name, (suite, row) in regressions.RATIOS.items()
    }
    monkeypatch.setattr(regressions, "RATIOS", small)
    here = regressions.harness.processor(regressions.harness.machine("cpu"))
    assert regressions.ratio_key() == here
    with regressions.undo_kernels.backend("reference"):
        assert regressions.ratio_key() == f"{here}, backend reference"
    # A step so small that dispatch uses plain PyTorch is an error, not a comparison.
    one = next(iter(small))
    monkeypatch.setitem(small, one, (small[one][0], regressions.replace(small[one][1], vocabulary=600)))
    with pytest.raises(RuntimeError, match="ran on cpu, reference of undo-core's backends, wanted one"):
        regressions.ratio_key()


def test_callgrinds_costs_leave_calls_out(regressions):
    text = "\n".join(
        [
            "ob=(1) /x/_cpu.so", "fn=(7) undo::avx2::stats", "0 5", "+3 10", "cfn=(8) memset", "calls=1 0", "* 1000", "* 2",
            "fn=(8)", "0 900", "fn=(7)", "0 1", "totals: 918",
        ]
    )  # fmt: skip
    assert regressions.self_costs(text, "undo::avx2::") == {"undo::avx2::stats": 18}


def test_another_compiler_is_not_compared_and_said(regressions, monkeypatch, tmp_path, capsys):
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps({"instructions": {"GCC: A": {"stats": 1.0}}}))
    monkeypatch.setattr(regressions, "instructions", lambda: ({"stats": 5.0}, "GCC: B"))
    assert regressions.main(["--only", "instructions", "--baseline", str(path)]) == 1
    said = capsys.readouterr().out
    assert "instructions: not compared: the baseline is of GCC: A, this is GCC: B" in said and "nothing was compared" in said
    monkeypatch.setattr(regressions, "instructions", lambda: ({"stats": 5.0}, "GCC: A"))
    assert regressions.main(["--only", "instructions", "--baseline", str(path)]) == 1


def test_a_noisy_ratio_is_measured_again(regressions):
    tries = iter([{"kl": 3.0}, {"kl": 1.1}, {"kl": 9.0}])
    assert regressions.steady_ratio({"kl": 1.0}, lambda: next(tries)) == {"kl": 1.1}
    slow = {"kl": 2.0}
    assert regressions.worse("ratio", regressions.steady_ratio({"kl": 1.0}, lambda: slow), {"kl": 1.0})


def test_a_step_made_slower_raises_the_ratio(regressions, monkeypatch):
    """An injected regression: the step computes five times."""
    name, (suite, row) = next(iter(regressions.RATIOS.items()))
    monkeypatch.setattr(regressions, "RATIOS", {name: (suite, regressions.replace(row, tokens=64, vocabulary=4000))})
    monkeypatch.setattr(regressions, "ROUNDS", 5)
    before = regressions.ratio()
    right = regressions.SUITES[suite]["undo-core"]

    def build(inputs):
        loss = right.build(inputs)
        return lambda: [loss() for _ in range(5)][-1]

    monkeypatch.setitem(regressions.SUITES[suite], "undo-core", regressions.replace(right, build=build))
    assert regressions.worse("ratio", regressions.ratio(), before)


def test_a_number_that_is_gone_fails(regressions):
    assert regressions.worse("calls", {}, {"kl: products": 4}) == [
        "calls: kl: products is no longer measured; the baseline has 4"
    ]
    assert regressions.better("calls", {"new": 1, "less": 1}, {"less": 2}) == [
        "calls: new is new: 1", "calls: less got better: 2 -> 1"
    ]  # fmt: skip
