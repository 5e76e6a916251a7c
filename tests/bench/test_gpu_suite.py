"""The GPU suite without a GPU: it goes on where it stopped, stops in time, keeps what it has, and passes only when all passed."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEY = {"commit": "a", "source": "s", "versions": {"torch": "1"}, "gpu": "g"}


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    module = importlib.import_module("gpu_suite")
    monkeypatch.setattr(module, "rows_of", lambda part: [module.Row(name, ("true",), ()) for name in ("a", "b", "c")])
    return module


class Runner:
    """Takes a hundred seconds of a clock of its own for each row."""

    def __init__(self, **statuses):
        self.statuses, self.ran, self.now = statuses, [], 0.0

    def __call__(self, row, limit):
        self.ran.append((row.id, limit))
        self.now += min(limit, 100.0)
        return {"status": self.statuses.get(row.id, "passed"), "said": "x"}

    def clock(self):
        return self.now


def run(suite, out, runner, seconds=540.0, key=KEY, earlier=()):
    return suite.run_part("tests", out, earlier, key, seconds, {"name": "m"}, runner, runner.clock, lambda line: None)


def statuses(rows):
    return [row["status"] for row in rows]


def test_rows_that_passed_are_not_run_again(suite, tmp_path):
    runner = Runner(b="failed")
    assert statuses(run(suite, tmp_path, runner)) == ["passed", "failed", "passed"]
    again = Runner()
    assert statuses(run(suite, tmp_path, again)) == ["passed"] * 3
    assert [name for name, _ in again.ran] == ["b"]
    elsewhere = Runner()
    assert statuses(run(suite, tmp_path / "new", elsewhere, earlier=[tmp_path])) == ["passed"] * 3 and elsewhere.ran == []


@pytest.mark.parametrize("change", [{"source": "t"}, {"versions": {"torch": "2"}}, {"gpu": "h"}])
def test_other_code_versions_or_gpu_run_again(suite, tmp_path, change):
    run(suite, tmp_path, Runner())
    other = Runner()
    run(suite, tmp_path, other, key=KEY | change)
    assert len(other.ran) == 3
    same = Runner()
    run(suite, tmp_path, same, key=KEY | change | {"commit": "b"})
    assert same.ran == []


def test_it_stops_in_time_and_goes_on(suite, tmp_path):
    runner = Runner()
    assert statuses(run(suite, tmp_path, runner, seconds=215.0)) == ["passed", "passed", "left"]
    assert runner.now <= 215.0
    runner = Runner()
    run(suite, tmp_path / "tight", runner, seconds=130.0)
    assert runner.ran == [("a", 125.0), ("b", 25.0)] and runner.now <= 130.0
    on = Runner()
    assert statuses(run(suite, tmp_path, on)) == ["passed"] * 3 and [name for name, _ in on.ran] == ["c"]


def test_the_file_is_whole_after_every_row(suite, tmp_path):
    class Killed(Runner):
        def __call__(self, row, limit):
            if row.id == "b":
                raise KeyboardInterrupt
            return super().__call__(row, limit)

    with pytest.raises(KeyboardInterrupt):
        run(suite, tmp_path, Killed())
    (row,) = json.loads((tmp_path / "tests.json").read_text())["rows"]
    assert row["id"] == "a" and row["status"] == "passed" and row["key"] == KEY


def test_what_is_missing_is_said_in_one_line(suite, tmp_path, monkeypatch):
    rows = [
        suite.Row("m", ("true",), ("no_such_module",)),
        suite.Row("t", ("true",), (), "no-such-tool"),
        suite.Row("c", ("true",), ()),
    ]
    monkeypatch.setattr(suite, "rows_of", lambda part: rows)
    found = run(suite, tmp_path, Runner())
    assert statuses(found) == ["skipped", "skipped", "passed"]
    assert found[0]["said"] == "no no_such_module here: pip install, or --wheels DIR" and "no-such-tool" in found[1]["said"]
    table = suite.summary({"tests": found}).splitlines()
    assert table[1].split() == ["tests", "1", "0", "0", "2", "0"] and len(table) == 4


def test_commands_are_run_and_their_results_kept(suite):
    def row(program, **options):
        return suite.Row("r", ("{python}", "-c", program, "{result}"), (), **options)

    assert suite.execute(row("print('noise'); print('{\"x\": 1}')", printed=True), 60)["result"] == {"x": 1}
    written = suite.execute(row("import sys; open(sys.argv[1], 'w').write('[2]')"), 60)
    assert written["status"] == "passed" and written["result"] == [2]
    failed = suite.execute(row("import sys; print('why'); sys.exit(3)"), 60)
    assert failed["status"] == "failed" and failed["said"] == "exit status 3\nwhy"
    assert suite.execute(row("print('no json')", printed=True), 60)["status"] == "failed"
    stopped = suite.execute(row("import time; print('begun', flush=True); time.sleep(60)"), 3)
    assert stopped["status"] == "stopped" and "begun" in stopped["said"]


def test_a_result_that_is_none_does_not_pass(suite):
    def kl(**record):
        return {"rows": [{"contenders": [{"name": "trl", "status": "not installed"}, {"name": "undo-core", **record}]}]}

    def ran(*backends):
        return {"both": [{"backend": name} for name in backends]}

    assert suite.complaint(kl(status="measured", ran=ran("triton"))) is None and suite.complaint({"rows": []}) is None
    assert suite.complaint(kl(status="failed: out of memory")) == "undo-core: failed: out of memory"
    # Noise and RMU have no status; a record that does not say what ran is none.
    for record, said in (({"ran": ran("reference")}, "reference"), ({"ran": ran("triton", "reference")}, "reference, triton")):
        assert suite.complaint(kl(**record)) == f"undo-core: ran on {said}, wanted triton"
    assert suite.complaint(kl(samples_s=[1.0])) == "undo-core: ran on nothing that was noted, wanted triton"
    step = {"mode": "leanest", "rows": 10, "ran": ran("triton")}
    assert suite.complaint(step) is None and suite.complaint(step | {"ran": ran("reference")}).startswith("leanest: ran on")
    assert suite.complaint({"mode": "plain", "rows": 10, "ran": ran()}) is None
    curve = {"name": "undo-core", "status": "measured", "ran": ran("reference")}
    assert suite.complaint({"rows": [], "error_versus_kl": {"curves": [curve]}}) == "undo-core: ran on reference, wanted triton"
    assert suite.complaint({"tried": [], "best": None}) == "no tile counts"
    row = suite.Row("r", ("{python}", "-c", 'print(\'{"tried": [], "best": null}\')'), (), printed=True)
    assert suite.execute(row, 60)["status"] == "failed"


def test_every_part_names_what_is_there(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    module = importlib.reload(importlib.import_module("gpu_suite"))
    for part in module.PARTS:
        rows = module.rows_of(part)
        assert len({row.id for row in rows}) == len(rows) > 0
        for word in (word.split("::")[0] for row in rows for word in row.command):
            if word.endswith((".py", ".yaml")):
                assert (ROOT / word).is_file(), word
    kernels = {(row.command[3], row.command[4], row.command[5]) for row in module.rows_of("tune")}
    assert len(kernels) == 24
    assert [row.id for row in module.rows_of("tiles")] == [
        f"{k}-bfloat16-{d}" for k in ("loss", "stats") for d in (2304, 768, 320)
    ]
    assert module.PARTS[:5] == ("tests", "plans", "products", "tiles", "counters")
    small = [module.rehearsal(row).command for part in module.REHEARSED for row in module.rows_of(part)]
    assert all((command[0] == "{python}" and "--rehearse" in command) or "--only" in command for command in small)
    kl, rmu, noise = (importlib.import_module(f"bench_{name}") for name in ("kl", "rmu", "noise"))
    known = {row.id for row in (*kl.ROWS["cuda"], *rmu.ROWS, *noise.ROWS)} | {"error"}
    assert {row.command[row.command.index("--only") + 1] for row in module.rows_of("bench")} <= known
    modes = importlib.import_module("bench_step_gpu").MODES
    assert [row.id for row in module.rows_of("memory")] == list(modes)


def test_without_a_gpu_it_says_so_and_fails():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one here")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_suite.py"), "--part", "tests"], capture_output=True, text=True
    )
    assert done.returncode != 0 and "sees no GPU" in done.stderr
