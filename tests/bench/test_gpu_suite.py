"""The GPU suite without a GPU: it goes on where it stopped, stops in time, keeps what it has, and passes only when all passed."""

import importlib
import itertools
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from triton.runtime.errors import OutOfResources

ROOT = Path(__file__).resolve().parents[2]
KEY = {"commit": "a", "source": "s", "versions": {"torch": "1"}, "gpu": "g"}


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("gpu_suite")


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


def run(suite, out, runner, seconds=540.0, key=KEY, earlier=(), rows=None):
    rows = rows or [suite.Row(name, ("true",), ()) for name in ("a", "b", "c")]
    book = suite.Book(out, earlier, key, {"machine": {"name": "m"}})
    return suite.run_part("tests", rows, book, seconds, runner, runner.clock, lambda line: None)


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
    assert statuses(run(suite, tmp_path, runner, seconds=208.0)) == ["passed", "passed", "left"]
    assert runner.now <= 208.0
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
    found = json.loads((tmp_path / "gpu.json").read_text())
    (row,) = found["parts"]["tests"]
    assert row["id"] == "a" and row["status"] == "passed" and row["key"] == KEY and found["machine"] == {"name": "m"}


def test_all_parts_are_in_one_file(suite, tmp_path):
    book = suite.Book(tmp_path, [], KEY, {})
    for part in ("tests", "plans"):
        suite.run_part(part, [suite.Row("a", ("true",), ())], book, 100.0, Runner(), lambda: 0.0, lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    assert list(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == ["tests", "plans"]


def test_what_is_missing_is_said_in_one_line(suite, tmp_path):
    rows = [
        suite.Row("m", ("true",), ("no_such_module",)),
        suite.Row("t", ("true",), (), "no-such-tool"),
        suite.Row("c", ("true",), ()),
    ]
    found = run(suite, tmp_path, Runner(), rows=rows)
    assert statuses(found) == ["skipped", "skipped", "passed"]
    assert found[0]["said"] == "no no_such_module here: pip install, or --wheels DIR" and "no-such-tool" in found[1]["said"]
    table = suite.summary({"tests": found}).splitlines()
    assert table[1].split() == ["tests", "1", "0", "0", "2", "0"] and len(table) == 4


def test_a_wheel_that_does_not_install_takes_no_other_with_it(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(suite.sys, "path", list(suite.sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(suite.tempfile, "gettempdir", lambda: str(tmp_path / "site"))
    for name in ("a-1-py3-none-any.whl", "b-1-py3-none-any.whl"):
        (tmp_path / name).write_text("no zip")
    refused = suite.install(tmp_path)
    assert [line.split(":")[0] for line in refused] == ["a-1-py3-none-any.whl", "b-1-py3-none-any.whl"]
    assert all(len(line.splitlines()) == 1 for line in refused)


def test_the_limits_of_the_first_parts_fit_in_ten_minutes(suite):
    ends = suite.deadlines(suite.PARTS, 558.0)
    order = ["tests", "plans", "products", "tiles", "counters", "peers", "memory"]
    assert [part for part in ends][:7] == order
    assert [ends[part] for part in order] == sorted(ends[part] for part in order) and ends["memory"] == pytest.approx(558.0)
    assert ends["sanitize"] == ends["pipeline"] == 558.0
    assert suite.deadlines(suite.PARTS, 54.0)["memory"] == pytest.approx(54.0)  # less time, the same proportions
    assert suite.deadlines(["tests", "memory"], 900.0) == {"tests": 420.0, "memory": 900.0}
    assert sum(importlib.import_module("gpu_parts").SECONDS.values()) <= 558.0
    assert suite.deadlines(["tune"], 500.0) == {"tune": 500.0}


def test_commands_are_run_and_their_results_kept(suite):
    def row(program, **options):
        return suite.Row("r", ("{python}", "-c", program, "{result}"), (), **options)

    assert suite.execute(row("print('noise'); print('{\"x\": 1}')", printed=True), 60)["result"] == {"x": 1}
    written = suite.execute(row("import sys; open(sys.argv[1], 'w').write('[2]')"), 60)
    assert written["status"] == "passed" and written["result"] == [2]
    failed = suite.execute(row("import sys; print('why'); sys.exit(3)"), 60)
    assert failed["status"] == "failed" and failed["said"] == "exit status 3: why\nwhy"
    assert suite.execute(row("print('no json')", printed=True), 60)["status"] == "failed"
    both = suite.execute(row("import sys; print('{\"x\": 1}'); sys.exit(1)", printed=True), 60)
    assert both["status"] == "failed" and both["result"] == {"x": 1}
    late = "import time; print('{\"x\": 1}', flush=True); print('{\"x\": ', flush=True); time.sleep(60)"
    stopped = suite.execute(row(late, printed=True), 3)
    assert stopped["status"] == "stopped" and stopped["result"] == {"x": 1}


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
    plans = {"plans": [{"plan": "chunk", "ms": 1.0}, {"plan": "recompute", "failed": "OutOfResources: shared memory"}]}
    assert suite.complaint(plans) == "1 failed, the first: OutOfResources: shared memory"


def test_a_result_that_is_none_is_kept_but_does_not_pass(suite, tmp_path):
    def runner(row, limit):
        return {"status": "passed", "said": "", "result": {"tried": [], "best": None, "default": []}}

    book = suite.Book(tmp_path, [], KEY, {})
    (row,) = suite.run_part("tiles", [suite.Row("r", ("true",), ())], book, 99.0, runner, lambda: 0.0, lambda line: None)
    assert row["status"] == "failed" and row["said"] == "no tile counts" and row["result"]["tried"] == []


def test_every_part_names_what_is_there(suite):
    parts = importlib.import_module("gpu_parts")
    for part, rehearse in itertools.product(parts.PARTS, (False, True)):
        rows = parts.rows_of(part, rehearse)
        assert len({row.id for row in rows}) == len(rows) > 0
        for word in (word.split("::")[0] for row in rows for word in row.command):
            if word.endswith((".py", ".yaml")):
                assert (ROOT / word).is_file(), word
    kernels = {(row.command[3], row.command[4], row.command[5]) for row in parts.rows_of("tune")}
    assert len(kernels) == 24
    assert [row.id for row in parts.rows_of("tiles")] == [
        f"{k}-bfloat16-{d}" for k in ("stats", "loss") for d in (2304, 768, 320)
    ]
    kl, rmu, noise = (importlib.import_module(f"bench_{name}") for name in ("kl", "rmu", "noise"))
    known = {row.id for row in (*kl.ROWS["cuda"], *rmu.ROWS, *noise.ROWS)} | {"error"}
    measured = [row.command for part in ("bench", "peers") for row in parts.rows_of(part)]
    assert {command[command.index("--only") + 1] for command in measured} <= known
    assert set(parts.PEERS) <= set(kl.CONTENDERS)
    assert {row.id for row in parts.rows_of("memory")} == set(importlib.import_module("bench_step_gpu").MODES)


def test_a_kernel_that_cannot_be_launched_is_an_entry_that_says_so(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    kernels = importlib.import_module("gpu_kernels")

    def measure():
        raise OutOfResources(300_000, 232_448, "shared memory")

    (failed,) = [kernels.attempt({"plan": "recompute"}, measure)]
    assert failed["plan"] == "recompute" and failed["failed"].startswith("OutOfResources: out of resource: shared memory")
    assert kernels.attempt({"plan": "chunk"}, lambda: {"ms": 1.0}) == {"plan": "chunk", "ms": 1.0}


def test_a_tool_that_refuses_the_machine_is_one_line(suite, tmp_path, monkeypatch):
    ncu = tmp_path / "ncu"
    ncu.write_text(
        '#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\necho "==ERROR== LibraryNotLoaded" > "$2"\nexit 1\n'
    )
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{suite.os.environ['PATH']}")
    record = suite.execute(suite.Row("c", ("{python}", "bench/gpu_counters.py"), (), "ncu", printed=True), 60)
    assert record["status"] == "failed" and record["result"] == {"counted": {}}
    first = "exit status 1: no counters of stats_rows, loss_rows, stats_tiles, loss_tiles: ==ERROR== LibraryNotLoaded"
    assert record["said"].splitlines()[0] == first


def test_counters_are_of_the_first_launch_of_each_kernel(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    counters = importlib.import_module("gpu_counters")
    head = '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"'
    lines = [
        "==PROF== Connected to process 7",
        head,
        '"0","7","stats_rows","GPU Speed Of Light Throughput","Duration","ms","1.25",""',
        '"0","7","stats_rows","Instruction Statistics","Executed Instructions","inst","1,024",""',
        '"0","7","stats_rows","Occupancy","","","","TheoreticalOccupancy"',
        '"1","7","loss_rows","GPU Speed Of Light Throughput","Duration","ms","2",""',
        '"2","7","stats_rows","GPU Speed Of Light Throughput","Duration","ms","9",""',
    ]
    assert counters.counted(lines) == {
        "stats_rows": {"Duration": "1.25 ms", "Executed Instructions": "1,024 inst"},
        "loss_rows": {"Duration": "2 ms"},
    }
    assert counters.counted(["==ERROR== no permission"]) == {}


def test_the_workers_of_the_tests_share_them_and_say_what_is_left(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    tests = importlib.import_module("gpu_tests")
    names = ["test_a[1]", "test_a[2]", "test_its_teacher", "test_b", "test_c"]
    found = []
    for number in range(2):
        items = [types.SimpleNamespace(name=name) for name in names]
        share = tests.Share(number, 2, tmp_path / f"{number}.jsonl")
        share.pytest_collection_modifyitems(items)
        found.append([item.name for item in items])
    assert found == [["test_its_teacher", "test_a[2]", "test_c"], ["test_a[1]", "test_b"]]
    share.note(test="test_b", outcome="failed", seconds=2.0, said="why")
    with (tmp_path / "1.jsonl").open("a") as file:
        file.write('{"test": "test_a[1]", "outc')  # being written
    result = tests.so_far(tmp_path, 0.0)
    assert result["outcomes"] == {"failed": 1, "not run": 4} and result["failures"] == {"test_b": "why"}


def test_without_a_gpu_it_says_so_and_fails():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one here")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_suite.py"), "--part", "tests"], capture_output=True, text=True
    )
    assert done.returncode != 0 and "sees no GPU" in done.stderr
