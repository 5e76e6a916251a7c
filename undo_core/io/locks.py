"""A lock for processes on several machines that share a folder; it needs no locks of the file system, so that it works over NFS.

A process holds the lock ``PATH`` as long as its claim, the file ``PATH.N``, has the highest number. Claims are created exclusively,
so that the file server decides which process gets the next number. A claim names its owner, and a thread of the owner renews the
file's time. Who waits looks at whether that time changes; the clocks of two machines are never compared. The next number is free

- if the owner gave its claim up, by the suffix ``.free``;
- if the owner has ended, which a process on the same machine sees at once;
- if the claim has not changed for ``LEASE`` seconds: the owner's machine is lost, or the owner is stopped.

An owner that was only stopped finds its claim removed when it continues, and fails before it publishes anything.

filelock is not used. Its native locks depend on the file server. Its leases (version 4.3) take over the lock of a dead owner by an
exchange of two names, which NFS refuses, so that the waiting process would wait forever.
"""

from __future__ import annotations

import _thread
import contextlib
import dataclasses
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

LEASE = 120.0  # seconds without renewal after which a claim is void; NFS clients cache a file's time for up to 60 s
RENEWAL = 15.0  # seconds between renewals
FREE = "free"


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
    """

    host: str
    system: str
    pid: int
    start: str
    token: str

    @classmethod
    def new(cls) -> Owner:
        """This process as the owner of a new claim."""
        return cls(socket.gethostname(), _system(), os.getpid(), _start(os.getpid()), secrets.token_hex(8))

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

    def __init__(self, file: Path, number: int, takeover: str | None) -> None:
        self.file, self.number, self.takeover, self.lost = file, number, takeover, False
        self._stopped, self._interrupts = threading.Event(), threading.current_thread() is threading.main_thread()
        self._renewing = threading.Thread(target=self._renew, daemon=True)
        self._renewing.start()

    def check(self) -> None:
        """Raises a LockLostError if another process has taken the lock over."""
        try:
            open(self.file).close()  # unlike exists(), opening it asks the file server
        except FileNotFoundError:
            self.lost = True
        if self.lost:
            raise LockLostError(f"{self.file}: got no such lock any more; this process was stopped, or the folder was moved")

    def stop(self) -> None:
        """Ends the renewal of the claim."""
        self._stopped.set()
        self._renewing.join()

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._stopped.wait(RENEWAL):
            try:
                os.utime(self.file)
                renewed = time.monotonic()
            except OSError as error:
                if not isinstance(error, FileNotFoundError) and time.monotonic() - renewed < LEASE:
                    continue  # the file server may come back
                self.lost = True
                if self._interrupts and hasattr(signal, "pthread_kill"):
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # it also ends a sleep
                elif self._interrupts:
                    _thread.interrupt_main()
                return


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[Hold]:
    """Holds the lock ``path`` inside the block; prints ``waiting`` once if another process holds it, and waits.

    The claim is deleted when the block ends normally, and given up when it raises.

    Raises:
        LockLostError: another process took the lock over, because this one was stopped. A block in the main thread is interrupted,
            unless the process ignores interrupts; another block notices when it fails or calls :meth:`Hold.check`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hold, normal = _acquire(path, waiting), False
    try:
        try:
            yield hold
            normal = True
        finally:
            hold.stop()
    except BaseException:
        hold.check()
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):  # the lock was lost
            if normal:
                hold.file.unlink()
            else:
                hold.file.rename(f"{hold.file}.{FREE}")


def _acquire(path: Path, waiting: str) -> Hold:
    seen, since, said, pause = None, 0.0, False, 0.05
    while True:
        claims = _claims(path)
        last, now = claims[-1] if claims else None, time.monotonic()
        if last != seen:
            seen, since = last, now
        reason = None if last is None else last.void(now - since)
        if last is None or reason is not None:
            number = 1 if last is None else last.number + 1
            file = _file(path, number)
            if _create(file):
                if [claim for claim in _claims(path) if _file(path, claim.number, claim.free) != file] == claims:
                    for claim in claims:
                        _file(path, claim.number, claim.free).unlink(missing_ok=True)
                    return Hold(file, number, None if last is None or last.free else reason)
                file.unlink()  # the claims had changed in the meantime: an owner was only slow, or another process was faster
        elif not said:
            print(waiting, flush=True)
            said = True
        time.sleep(pause)
        pause = min(2 * pause, 2.0)


def _create(file: Path) -> bool:
    """Makes a claim; False if another process was faster."""
    try:
        with open(file, "x") as claim:
            json.dump(dataclasses.asdict(Owner.new()), claim)
    except FileExistsError:
        return False
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
        with contextlib.suppress(FileNotFoundError), open(path.with_name(name)) as file:  # opening it asks the file server
            found.append(Claim(int(number), bool(suffix), _owner(file.read()), os.fstat(file.fileno()).st_mtime_ns))
    return sorted(found, key=lambda claim: (claim.number, claim.free))


def _owner(text: str) -> Owner | None:
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):  # not yet written as a whole
        return None


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
