"""A lock that machines share through a folder: one holder at a time, dead owners replaced, slow ones left in peace."""

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from undo_core.io import locks
from undo_core.io.locks import LockLostError, Owner, locked

processes = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Claims are void after half a second; processes that are forked inherit it."""
    monkeypatch.setattr(locks, "LEASE", 0.5)
    monkeypatch.setattr(locks, "RENEWAL", 0.1)


@pytest.fixture
def start() -> Iterator[Callable]:
    """Starts a function in a process that believes to run on the machine ``host``, and ends what still runs."""
    started = []

    def begin(host: str, function: Callable, *arguments) -> multiprocessing.Process:
        def run() -> None:
            socket.gethostname = lambda: host
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
            function(*arguments)

        started.append(processes.Process(target=run))
        started[-1].start()
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.join()


def hold(path: Path, held, ended=None) -> None:
    """Holds the lock until it is killed, or interrupted, which it tells."""
    try:
        with locked(path, "waiting"):
            held.set()
            time.sleep(60)
    except LockLostError:
        ended.set()


def owned(path: Path, start: Callable, host: str, ended=None) -> multiprocessing.Process:
    """A process on the machine ``host`` that holds the lock."""
    held = processes.Event()
    owner = start(host, hold, path, held, ended)
    assert held.wait(10)
    return owner


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "stages" / ".stage.lock"


def left(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def test_it_is_waited_for_with_one_message_and_freed_by_kill(path, start, capsys, monkeypatch):
    monkeypatch.setattr(locks, "LEASE", 60.0)
    owner = owned(path, start, socket.gethostname())
    killer = start("anywhere", lambda: (time.sleep(0.3), os.kill(owner.pid, signal.SIGKILL)))
    with locked(path, "somebody has it") as hold:
        killer.join()  # the owner stays as a zombie until its parent, this process, asks for its exit code
        owner.join(10)
        assert owner.exitcode == -signal.SIGKILL, "it had the lock until then"
        assert hold.takeover == f"process {owner.pid} on {socket.gethostname()} has ended"
    assert capsys.readouterr().out == "somebody has it\n" and left(path) == []


def test_a_holder_that_fails_gives_it_up(path, capsys):
    with pytest.raises(KeyError), locked(path, "not said"):
        raise KeyError
    with locked(path, "not said either") as hold:
        assert hold.takeover is None
    assert capsys.readouterr().out == "" and left(path) == []


def count(path: Path, times: int) -> None:
    counter = path.parent / "counter"
    for _ in range(times):
        with locked(path, "waiting"):
            value = int(counter.read_text())
            time.sleep(0.002)
            counter.write_text(str(value + 1))


def test_machines_that_contend_hold_it_one_at_a_time(path, start, monkeypatch):
    """The first claim is that of a lost machine: all of them see it expire at the same time."""
    monkeypatch.setattr(locks, "LEASE", 3.0)  # a busy machine may stop a process for long
    owner = owned(path, start, "lost")
    owner.kill()
    (path.parent / "counter").write_text("0")
    contenders = [start(f"node-{index}", count, path, 5) for index in range(4)]
    for contender in contenders:
        contender.join(30)
    assert [contender.exitcode for contender in contenders] == [0] * 4
    assert (path.parent / "counter").read_text() == "20" and left(path) == [".stage.lock.21.free", "counter"]


def test_the_lock_of_a_lost_machine_expires(path, start, capsys):
    owner = owned(path, start, "lost")
    owner.kill()
    began = time.monotonic()
    with locked(path, "waiting") as hold:
        assert 0.5 <= time.monotonic() - began < 5
        assert hold.takeover == f"process {owner.pid} on lost has given no sign of life for 0.5 s" and hold.number == 2
    assert capsys.readouterr().out == "waiting\n"


def slowly(path: Path, held, clock: Callable[[int], float]) -> None:
    """Holds the lock for longer than a lease, and renews it by a clock of its own."""
    times, utime = iter(range(1000)), os.utime
    os.utime = lambda file: utime(file, (clock(next(times)),) * 2)
    with locked(path, "waiting"):
        held.set()
        time.sleep(locks.LEASE + 0.5)
        path.with_name("done").write_text("")


def test_slow_owners_keep_it_whatever_their_clocks_say(tmp_path, start, monkeypatch):
    monkeypatch.setattr(locks, "LEASE", 3.0)
    clocks = [lambda tick: time.time(), lambda tick: 4e9 - 100 * tick, lambda tick: tick]
    paths = [tmp_path / str(index) / "lock" for index in range(3)]
    for path, clock in zip(paths, clocks, strict=True):
        held = processes.Event()
        start("slow", slowly, path, held, clock)
        assert held.wait(10)
    waiting = [start("fast", wait_for, path) for path in paths]
    for process in waiting:
        process.join(30)
    assert [process.exitcode for process in waiting] == [0] * 3


def wait_for(path: Path) -> None:
    with locked(path, "waiting") as hold:
        assert path.with_name("done").exists() and hold.takeover is None


def test_an_owner_that_was_stopped_finds_it_lost(path, start):
    ended = processes.Event()
    owner = owned(path, start, "stopped", ended)
    os.kill(owner.pid, signal.SIGSTOP)
    with locked(path, "waiting") as hold:
        os.kill(owner.pid, signal.SIGCONT)
        assert ended.wait(30), "it was interrupted"
        hold.check()
    assert left(path) == [".stage.lock.2.free"]


def stopped_in_the_block(path: Path, seen) -> None:
    """Holds the lock, is stopped, and tells whether it still has the lock when it continues; nothing interrupts it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with locked(path, "waiting") as hold:
        os.kill(os.getpid(), signal.SIGSTOP)
        with contextlib.suppress(LockLostError):
            hold.check()
            seen.set()


@pytest.mark.parametrize("host", ["another", socket.gethostname()])
def test_an_owner_that_was_stopped_meets_no_later_claim_under_its_number(path, start, host):
    """One process takes the lock over and ends, then a third one holds it when the first continues."""
    seen = processes.Event()
    owner = start(host, stopped_in_the_block, path, seen)
    while os.waitid(os.P_PID, owner.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT) is None:
        time.sleep(0.01)
    with locked(path, "waiting") as hold:
        assert hold.number == 2
    with locked(path, "waiting") as hold:
        assert hold.number == 3 and hold.takeover is None
        os.kill(owner.pid, signal.SIGCONT)
        owner.join(10)
        assert owner.exitcode == 0 and not seen.is_set()
        hold.check()
        assert left(path) == [".stage.lock.3"]
    assert left(path) == [".stage.lock.3.free"], "the next number stays known"


def test_a_claim_that_was_exchanged_by_hand_is_neither_renewed_nor_deleted(path, monkeypatch):
    monkeypatch.setattr(locks, "RENEWAL", 60.0)
    with pytest.raises(LockLostError), locked(path, "waiting") as hold:
        hold.file.unlink()
        assert locks._create(hold.file, Owner.new())
        hold.check()
    assert left(path) == [".stage.lock.1"]

    left_alone = hold.file.stat().st_mtime_ns
    monkeypatch.setattr(locks, "RENEWAL", 0.01)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            hold = locks.Hold(hold.file, 1, Owner.new(), None)
            time.sleep(10)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert hold.lost and hold.file.stat().st_mtime_ns == left_alone


class Clock:
    """Time that passes only when a process sleeps, and jumps once, as it does for processes that are stopped together."""

    def __init__(self, jump: float) -> None:
        self.now, self.jump = 0.0, jump

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > 10:
            self.now, self.jump = self.now + self.jump, 0.0


@pytest.mark.parametrize("jump", [0.0, 1000.0])
def test_time_in_which_the_waiting_process_was_stopped_too_does_not_count(path, monkeypatch, jump):
    path.parent.mkdir()
    assert locks._create(path.with_name(f"{path.name}.1"), dataclasses.replace(Owner.new(), host="another"))
    clock = Clock(jump)
    monkeypatch.setattr(locks, "LEASE", 120.0)
    monkeypatch.setattr(locks, "time", clock)
    with locked(path, "waiting") as hold:
        assert hold.number == 2 and 120 - 6 <= clock.now - jump <= 120 + 6


def test_a_claim_that_another_machine_deletes_while_it_is_read_is_missing(path, monkeypatch):
    path.parent.mkdir()
    path.with_name(f"{path.name}.1").touch()

    def stale(file: Path, *mode: str, **options: str):
        if not mode:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return open(file, *mode, **options)

    monkeypatch.setattr(locks, "open", stale, raising=False)
    assert locks._claims(path) == []
    monkeypatch.setattr(locks, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "broken")), raising=False)
    with pytest.raises(OSError, match="broken"):
        locks._claims(path)


def test_a_claim_that_others_removed_before_it_was_held_is_not_held(path, monkeypatch):
    """Its process is stopped just after it made the claim, until others have taken it over and are done."""
    create, created = locks._create, []

    def stopped(file: Path, owner: Owner) -> bool:
        created.append(file.name)
        made = create(file, owner)
        if len(created) == 1:
            file.unlink()
        return made

    monkeypatch.setattr(locks, "_create", stopped)
    with locked(path, "waiting") as hold:
        hold.check()
    assert len(created) == 2


def test_an_owner_that_was_nearly_too_slow_keeps_it(path, start, monkeypatch):
    """It renews its claim after another process has judged it void and before that process looks again."""
    owned(path, start, "slow")
    create = locks._create
    created = []

    def late(file: Path, owner: Owner) -> bool:
        (claim,) = path.parent.iterdir()
        os.utime(claim)
        created.append(file.name)
        return create(file, owner)

    monkeypatch.setattr(locks, "_create", late)
    monkeypatch.setattr(locks.Claim, "void", lambda self, unchanged: "it seemed so" if len(created) < 3 else None)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: (_ for _ in ()).throw(TimeoutError) if len(created) == 3 else None)
    with pytest.raises(TimeoutError), locked(path, "waiting"):
        pytest.fail("two processes hold it")
    assert created == [".stage.lock.2"] * 3 and left(path) == [".stage.lock.1"]


def test_a_claim_that_was_never_written_expires(path):
    path.parent.mkdir()
    path.with_name(f"{path.name}.7").touch()
    with locked(path, "waiting") as hold:
        assert hold.takeover == "an unknown process has given no sign of life for 0.5 s" and left(path) == [".stage.lock.8"]


def test_a_folder_can_move_with_the_claim_of_a_dead_owner(path, start, monkeypatch):
    monkeypatch.setattr(locks, "LEASE", 60.0)
    owned(path, start, socket.gethostname()).kill()
    moved = path.parent.rename(path.parent.with_name("moved"))
    with locked(moved / path.name, "waiting") as hold:
        assert hold.takeover.endswith("has ended")
    with pytest.raises(LockLostError, match="the folder was moved"), locked(moved / path.name, "waiting") as hold:
        moved.rename(path.parent)
        hold.check()


def test_who_has_ended_is_told_by_more_than_a_number(monkeypatch):
    own = Owner.new()
    assert not own.ended() and str(own) == f"process {os.getpid()} on {socket.gethostname()}"
    parts = {"host": own.host, "system": own.system, "pid": own.pid, "start": own.start, "token": ""}
    assert Owner(**{**parts, "start": "1"}).ended(), "the number belongs to a later process"
    gone = processes.Process(target=int)
    gone.start()
    gone.join()
    assert Owner(**{**parts, "pid": gone.pid}).ended()
    assert not Owner(**{**parts, "pid": gone.pid, "host": "another"}).ended()
    assert not Owner(**{**parts, "pid": gone.pid, "system": "another container of the same name"}).ended()
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda pid, number: (_ for _ in ()).throw(PermissionError))
        assert not Owner(**{**parts, "start": "1"}).ended(), "a process of another user, which /proc may hide"


def test_an_interrupt_stays_one(path):
    with contextlib.suppress(KeyboardInterrupt), locked(path, "waiting"):
        raise KeyboardInterrupt
    assert left(path) == [".stage.lock.1.free"]


def test_a_worker_is_interrupted_by_a_lost_lock_alone(path, monkeypatch):
    monkeypatch.setattr(locks, "RENEWAL", 0.01)
    monkeypatch.setattr(locks, "_held", set())  # other tests leave locks that were lost
    handler = signal.signal(signal.SIGINT, locks.interrupt_if_lost)
    try:
        with pytest.raises(LockLostError), locked(path, "waiting") as hold:
            signal.raise_signal(signal.SIGINT)
            hold.check()
            hold.file.unlink()
            time.sleep(10)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert hold.lost


def test_an_error_in_the_block_is_the_one_to_report(path, monkeypatch):
    """A disk that became read-only does not let the lock be given up either."""
    with pytest.raises(ValueError, match="half way") as info, locked(path, "waiting"):
        monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
        raise ValueError("half way")
    assert "Read-only file system" in info.value.__notes__[0]


def test_a_claim_that_cannot_be_written_keeps_nobody_waiting(path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device") as info:
        patch.setattr(locks.json, "dump", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with locked(path, "waiting"):
            pytest.fail("it has no claim")
    assert info.value.filename == f"{path}.1" and left(path) == []
