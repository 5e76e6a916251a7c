"""The folder of a stage that several machines build at once, or that one takes over from another."""

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from stage_kinds import Counted

from undo_core.io import locks
from undo_core.io.locks import LockLostError
from undo_core.pipeline.stage import Stage
from undo_core.pipeline.store import OneFolder, Store, unfinished_folder

processes = multiprocessing.get_context("fork")


def build(host: str, root: Path, stage: Stage, code: int = 0) -> None:
    socket.gethostname = lambda: host
    try:
        Store(root).ensure(stage)
    except LockLostError as error:
        assert "this process was stopped" in str(error)
        os._exit(7)


@pytest.fixture
def machines(monkeypatch):
    """Starts a build on a machine of a name; leases are short."""
    monkeypatch.setattr(locks, "LEASE", 2.5)
    monkeypatch.setattr(locks, "RENEWAL", 0.1)
    started = []

    def start(host: str, root: Path, stage: Stage) -> multiprocessing.Process:
        started.append(processes.Process(target=build, args=(host, root, stage)))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def wait_for_lines(root: Path, stage: Stage, count: int) -> None:
    lines = root / f".{stage.name}.partial" / "lines"
    until = time.monotonic() + 20
    while not (lines.exists() and len(lines.read_text().splitlines()) >= count):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_two_machines_build_a_stage_once(tmp_path, machines):
    stage = Counted(pause=0.1)
    builders = [machines(host, tmp_path, stage) for host in ("a", "b", "c")]
    for builder in builders:
        builder.join(30)
    assert [builder.exitcode for builder in builders] == [0] * 3
    lines = (tmp_path / stage.name / "lines").read_text().splitlines()
    assert len(lines) == 3 and len({line.split()[1] for line in lines}) == 1
    assert [path.name for path in tmp_path.iterdir()] == [stage.name]


def test_another_machine_continues_the_work_of_a_lost_one(tmp_path, machines, capfd):
    stage = Counted(pause=0.2, steps=6)
    lost = machines("lost", tmp_path, stage)
    wait_for_lines(tmp_path, stage, 2)
    lost.kill()
    other = machines("other", tmp_path, stage)
    other.join(30)
    hosts = [line.split()[1] for line in (tmp_path / stage.name / "lines").read_text().splitlines()]
    assert hosts[:2] == ["lost"] * 2 and hosts[-1] == "other" and len(hosts) == 6
    said = capfd.readouterr().out.splitlines()
    assert said == [
        f"{stage.name}: another process is building it; waiting",
        f"{stage.name}: process {lost.pid} on lost has given no sign of life for 2.5 s; this process continues its work",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{stage.name}.lock.2.free", stage.name]


def test_a_builder_that_was_stopped_publishes_nothing(tmp_path, machines):
    stage = Counted(pause=0.2, steps=8)
    stopped = machines("stopped", tmp_path, stage)
    wait_for_lines(tmp_path, stage, 2)
    os.kill(stopped.pid, signal.SIGSTOP)
    other = machines("other", tmp_path, stage)
    until = time.monotonic() + 20
    while not (tmp_path / f".{stage.name}.partial.1").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(stopped.pid, signal.SIGCONT)
    for process in (stopped, other):
        process.join(30)
    assert (stopped.exitcode, other.exitcode) == (7, 0)
    hosts = [line.split()[1] for line in (tmp_path / stage.name / "lines").read_text().splitlines()]
    assert len(hosts) == 8 and set(hosts[3:]) == {"other"}


def test_no_later_claim_builds_in_the_folder_of_an_owner_that_may_continue(tmp_path):
    """It may have been stopped before it made the folder, or the folder was finished and the result deleted since."""
    final = tmp_path / "stage"
    for number, folder in ((1, ".stage.partial"), (2, ".stage.partial.1"), (5, ".stage.partial.4")):
        assert unfinished_folder(final, Mock(number=number, takeover=None)).name == folder
    (tmp_path / ".stage.partial.1").mkdir()
    assert unfinished_folder(final, Mock(number=5, takeover=None)).name == ".stage.partial.1", (
        "given up, or its owner has ended"
    )
    assert unfinished_folder(final, Mock(number=6, takeover="lost")).name == ".stage.partial.5"
    assert unfinished_folder(final, Mock(number=2, takeover="files of the locks were deleted")).name == ".stage.partial.6"


def test_a_lock_lost_at_the_last_moment_publishes_nothing(tmp_path, monkeypatch):
    stage, store = Counted(), Store(tmp_path)
    monkeypatch.setattr("undo_core.pipeline.store.versions", lambda: (tmp_path / f".{stage.name}.lock.1").unlink() or {})
    with pytest.raises(LockLostError):
        store.ensure(stage)
    assert not store.done(stage) and [path.name for path in tmp_path.iterdir()] == [f".{stage.name}.partial"]


def test_names_that_begin_alike_are_kept_apart(tmp_path):
    stage = Counted()
    for name in (f".{stage.name}.partial.x", f".{stage.name}.partial.2.partial", f".{stage.name}.partials"):
        (tmp_path / name).mkdir()
    Store(tmp_path).ensure(stage)
    assert len(list(tmp_path.iterdir())) == 4


def test_what_a_kill_after_the_publishing_left_is_removed(tmp_path):
    done, begun, store = Counted(), Counted(steps=4), Store(tmp_path)
    store.ensure(done)
    for stage in (done, begun):
        (tmp_path / f".{stage.name}.partial" / "checkpoint").mkdir(parents=True)
    store.tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{begun.name}.partial", done.name]
    (tmp_path / f".{done.name}.partial.2").mkdir()
    OneFolder(tmp_path / done.name).tidy()
    OneFolder(tmp_path / begun.name).tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{begun.name}.partial", done.name]


@pytest.mark.parametrize("threads", [[1, 1], [2, 1]])
def test_a_stage_that_continues_with_other_threads_says_so(tmp_path, capsys, monkeypatch, threads):
    store, stage = Store(tmp_path), Counted(title="counting")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(Counted, "run", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.ensure(stage)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[1])
    store.ensure(stage)
    printed, other = capsys.readouterr().out, threads[0] != threads[1]
    assert ("counting: continues with 1 threads, began with 2" in printed) == other
    assert store.manifest(stage).get("threads_used") == (threads if other else None)
