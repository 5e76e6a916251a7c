"""A lock for processes on several machines that share a folder; it needs no locks of the file system, so that it works over NFS.

A process holds the lock ``PATH`` as long as its claim, the file ``PATH.N``, has the highest number. Claims are created exclusively,
so that the file server decides which process gets the next number. A claim names its owner, and a thread of the owner renews the
file's time. Who waits looks at whether that time changes; the clocks of two machines are never compared. The next number is free

- if the owner gave its claim up, by the suffix ``.free``;
- if the owner has ended, which a process on the same machine sees at once;
- if the claim has not changed for ``LEASE`` seconds: the owner's machine is lost, or the owner is stopped.

An owner that was only stopped finds its claim removed when it continues, and fails before it publishes anything. It must not meet a
later claim under its own number: once a claim was taken over from an owner that may continue, numbers only grow, and the last claim stays
in the folder, given up, when its owner is done. Before an owner touches its claim it also reads it, in case the folder was changed by hand.

filelock is not used. Its native locks depend on the file server. Its leases (version 4.3) take over the lock of a dead owner by an
exchange of two names, which NFS refuses, so that the waiting process would wait forever.
"""

from __future__ import annotations

import _thread
import contextlib
import dataclasses
import errno
import functools
import json
import os
import secrets
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from undo_core.io.files import errors_named

LEASE = 120.0  # seconds without renewal after which a claim is void; NFS clients cache a file's time for up to 60 s
RENEWAL = 15.0  # seconds between renewals
FREE = "free"
CLAIM_CHARACTERS = 1 << 16  # more are never read of a claim, which has a few hundred


class LockLostError(OSError):
    """The lock of this process was taken over by another process."""


@dataclass(frozen=True)
class Owner:
    """The process that made a claim.

    Attributes:
        host: name of the machine.
        system: identity of the machine's boot and of the namespace to which ``pid`` belongs.
        pid: number of the process.
        start: time at which the process started, in ticks since the boot; empty if the system does not tell.
        token: random; no two claims are equal.
        follows: whether an earlier owner lost the lock and may still continue.
    """

    host: str
    system: str
    pid: int
    start: str
    token: str
    follows: bool = False

    @classmethod
    def new(cls, follows: bool = False) -> Owner:
        """This process as the owner of a new claim."""
        return cls(socket.gethostname(), _system(), os.getpid(), _start(os.getpid()), secrets.token_hex(8), follows)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def ended(self) -> bool:
        """Whether the process has certainly ended; False for a process on another machine, of which nothing is known."""
        if (self.host, self.system) != (socket.gethostname(), _system()) or os.name == "nt":
            return False
        try:
            os.kill(self.pid, 0)  # signal 0 only asks whether the process exists
        except ProcessLookupError:
            return True
        except PermissionError:  # it exists and belongs to another user
            return False
        return _start(self.pid) != self.start


@dataclass(frozen=True)
class Claim:
    """A claim as one process sees it.

    Attributes:
        number: its number.
        free: whether its owner gave it up.
        owner: its owner; None while the file is being written, and if that was interrupted.
        renewed: time of its last renewal, by the file server's or the owner's clock.
    """

    number: int
    free: bool
    owner: Owner | None
    renewed: int

    @property
    def may_return(self) -> bool:
        """Whether its owner, or an earlier one that lost the lock, may continue after another process has taken it over."""
        return self.owner is None or self.owner.follows or not (self.free or self.owner.ended())

    def void(self, unchanged: float) -> str | None:
        """Says why the claim is void, after it has not changed for ``unchanged`` seconds; None if it is valid."""
        owner = str(self.owner or "an unknown process")
        if self.free:
            return f"{owner} gave it up"
        if self.owner is not None and self.owner.ended():
            return f"{owner} has ended"
        return f"{owner} has given no sign of life for {LEASE:g} s" if unchanged >= LEASE else None


class Hold:
    """A lock that this process holds.

    Attributes:
        number: number of the claim; it grows with each takeover.
        takeover: says from which process the lock was taken over, and why; None if no process left it behind.
    """

    def __init__(self, file: Path, number: int, owner: Owner, takeover: str | None) -> None:
        self.file, self.number, self.owner, self.takeover, self.lost = file, number, owner, takeover, False
        self._stopped, self._interrupts = threading.Event(), threading.current_thread() is threading.main_thread()
        _held.add(self)
        self._renewing = threading.Thread(target=self._renew, daemon=True)
        self._renewing.start()

    def check(self) -> None:
        """Raises a LockLostError if another process has taken the lock over."""
        self.lost = self.lost or not self._own()
        if self.lost:
            raise LockLostError(f"{self.file}: got no such lock any more; this process was stopped, or the folder was moved")

    def stop(self) -> None:
        """Ends the renewal of the claim."""
        self._stopped.set()
        self._renewing.join()
        _held.discard(self)

    def release(self, normal: bool) -> None:
        """Deletes the claim after a ``normal`` end, unless its number must stay known; else gives it up. A lost one is left alone."""
        if not self._own():
            return
        with contextlib.suppress(FileNotFoundError):  # the lock was lost at this moment
            if normal and not self.owner.follows:
                self.file.unlink()
            else:
                self.file.rename(f"{self.file}.{FREE}")

    def _own(self) -> bool:
        """Whether the claim exists and is this one."""
        read = _read(self.file)
        return read is not None and _owner(read[0]) == self.owner

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._stopped.wait(RENEWAL):
            try:
                if own := self._own():
                    os.utime(self.file)
                    renewed = time.monotonic()
            except OSError:
                own = time.monotonic() - renewed < LEASE  # the file server may come back
            if not own:
                self.lost = True
                if self._interrupts and hasattr(signal, "pthread_kill"):
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # it also ends a sleep
                elif self._interrupts:
                    _thread.interrupt_main()
                return


_held: set[Hold] = set()


def interrupt_if_lost(number: int, _: object) -> None:
    """Handler of SIGINT for a process that leaves Ctrl-C to another one: only a lock that was lost interrupts it."""
    if any(hold.lost for hold in _held):
        raise KeyboardInterrupt(number)


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[Hold]:
    """Holds the lock ``path`` inside the block; prints ``waiting`` once if another process holds it, and waits.

    When the block ends normally, the claim is deleted, unless a process that lost the lock may still continue; otherwise it is given up.

    Raises:
        LockLostError: another process took the lock over, because this one was stopped. A block in the main thread is interrupted,
            unless the process ignores interrupts; another block notices when it fails or calls :meth:`Hold.check`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hold = _acquire(path, waiting)
    try:
        try:
            yield hold
        finally:
            hold.stop()
    except BaseException as error:
        _let_go(hold, error)
        raise
    hold.release(normal=True)


def _let_go(hold: Hold, error: BaseException) -> None:
    """Gives up a lock whose block ended with ``error``; raises only a LockLostError, since that is the cause of the other one."""
    try:
        hold.check()
        hold.release(normal=False)
    except LockLostError:
        raise
    except OSError as other:  # the file system that failed in the block may fail here too
        error.add_note(f"The lock could not be given up either: {other}")


def _acquire(path: Path, waiting: str) -> Hold:
    seen, silent, looked, said, pause = None, 0.0, time.monotonic(), False, 0.05
    while True:
        claims = _claims(path)
        last, now = claims[-1] if claims else None, time.monotonic()
        # of the time since the last look no more counts than a look takes: this process may have been stopped together with the owner
        silent = silent + min(now - looked, 2 * pause + 1) if last == seen else 0.0
        seen, looked = last, now
        reason = None if last is None else last.void(silent)
        if last is None or reason is not None:
            number, owner = (1, Owner.new()) if last is None else (last.number + 1, Owner.new(last.may_return))
            file = _file(path, number)
            if _create(file, owner):
                found = _claims(path)
                others = [claim for claim in found if claim.owner != owner]
                if others == claims and len(found) == len(claims) + 1:
                    for claim in claims:
                        _file(path, claim.number, claim.free).unlink(missing_ok=True)
                    return Hold(file, number, owner, None if last is None or last.free else reason)
                # the claims had changed in the meantime: an owner was only slow, or another process was faster
                if len(others) < len(found):
                    file.unlink(missing_ok=True)
        elif not said:
            print(waiting, flush=True)
            said = True
        time.sleep(pause)
        pause = min(2 * pause, 2.0)


def _create(file: Path, owner: Owner) -> bool:
    """Makes a claim; False if another process was faster."""
    with errors_named(file):
        try:
            claim = open(file, "x")  # noqa: SIM115
        except FileExistsError:
            return False
        try:
            with claim:
                json.dump(dataclasses.asdict(owner), claim)
        except OSError:
            with contextlib.suppress(OSError):  # others would wait for the owner of half a claim
                file.unlink()
            raise
    return True


def _file(path: Path, number: int, free: bool = False) -> Path:
    return path.with_name(f"{path.name}.{number}" + free * f".{FREE}")


def _claims(path: Path) -> list[Claim]:
    """Every claim on the lock, by number."""
    found = []
    for name in os.listdir(path.parent):
        number, _, suffix = name.removeprefix(f"{path.name}.").partition(".")
        if not name.startswith(f"{path.name}.") or not number.isdecimal() or suffix not in ("", FREE):
            continue
        if (read := _read(path.with_name(name))) is not None:
            found.append(Claim(int(number), bool(suffix), _owner(read[0]), read[1]))
    return sorted(found, key=lambda claim: (claim.number, claim.free))


def _read(file: Path) -> tuple[str, int] | None:
    """Text and time of a claim; None if it does not exist."""
    try:
        with open(file, encoding="utf-8", errors="replace") as claim:  # unlike exists(), opening it asks the file server
            return claim.read(CLAIM_CHARACTERS), os.fstat(claim.fileno()).st_mtime_ns
    except OSError as error:
        if os.path.islink(file):  # a link that leads nowhere: it takes its number, and nobody owns it
            return "", 0
        if error.errno not in (
            errno.ENOENT,
            errno.ESTALE,
        ):  # so says NFS of a file that another machine deletes after it was opened here
            raise
        return None


def _owner(text: str) -> Owner | None:
    """The owner that a claim names; None if the claim is not yet written as a whole, or is not one of ours."""
    try:
        owner = Owner(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = {"pid": int, "follows": bool}
    if any(type(value) is not kinds.get(name, str) for name, value in vars(owner).items()) or not 0 < owner.pid < 1 << 31:
        return None
    return owner


def _start(pid: int) -> str:
    """When a process started, in ticks since the boot; "ended" if it has ended, and empty if the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, *fields = file.read().rpartition(")")[2].split()
    except FileNotFoundError:
        return "ended" if os.path.exists("/proc/self/stat") else ""
    return "ended" if state in "ZX" else fields[18]  # a killed process stays as a zombie until its parent asks for its end


@functools.cache
def _system() -> str:
    """Identity of this machine's boot and of the namespaces in which its process numbers and start times count."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
    except OSError:
        boot = f"{uuid.getnode():x}"
    return " ".join(
        [boot, *(os.readlink(path) for path in ("/proc/self/ns/pid", "/proc/self/ns/time") if os.path.exists(path))]
    )
