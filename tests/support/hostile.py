"""Files from strangers: mutations of valid files, and a watch under which a reader reads them.

The watch fails a reader that starts a program, connects, unpickles, imports or runs what the file names, writes outside the file's
folder, takes more memory than :data:`ROOM` or more time than :data:`SECONDS`, or ends with anything but an error that the command
line shows in one line.
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutations import MODULE, mutated

from undo_core.cli import FAILED, REFUSED

ROOM = 1 << 30  # bytes of address space that reading one small file may add
SECONDS = 60.0


class Escaped(BaseException):
    """A reader did what no file may make it do; not an Exception, so that no reader handles it."""


@dataclass(frozen=True)
class Reader:
    """An entry point that reads files.

    Attributes:
        name: its row in the table.
        file: the file that is mutated, in a folder of its own.
        read: calls the entry point.
        form: form of the file, as in :func:`mutated`.
        quick, full: number of inputs.
        named: what an error must name, any of these; empty for the errors of settings, which name their key.
    """

    name: str
    file: Path
    read: Callable[[], Any]
    form: str
    quick: int
    full: int
    named: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "valid", self.file.read_bytes())


_PROGRAMS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.fork", "subprocess.Popen", "pty.spawn"}
_NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"}
_CHANGES = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
}
_FOLLOWING = {"open", "os.truncate", "os.chmod", "os.chown", "os.utime"}
_state = threading.local()
_hooked = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    folder = getattr(_state, "folder", None)
    if folder is None:
        return
    if event in _PROGRAMS or event in _NETWORK or event == "pickle.find_class":
        _escaped(f"{event} {arguments!r}")
    elif event == "import" and arguments[0].split(".")[0] == MODULE:
        _escaped(f"import of {arguments[0]}")
    elif event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        _stays(event, arguments[0], folder)
    elif event in _CHANGES:
        for path in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
            _stays(event, path, folder)


def _stays(event: str, path: Any, folder: str) -> None:
    """Fails for a change outside ``folder``; a link counts as what it leads to if the event follows it."""
    if isinstance(path, (str, bytes, os.PathLike)):
        parent, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        there = os.path.join(os.path.realpath(parent), name)
        if event in _FOLLOWING:
            there = os.path.realpath(there)
        if there != os.devnull and os.path.commonpath([there, folder]) != folder:
            _escaped(f"{event} of {there}, outside {folder}")


def _escaped(what: str) -> None:
    _state.escapes.append(what)
    raise Escaped(what)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Watches this thread: yields what it did that no file may make it do, which is also raised as :class:`Escaped`."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_audit)  # it cannot be removed, and does nothing outside this block
        _hooked = True
    _state.escapes = []
    _state.folder = os.path.realpath(folder)
    try:
        yield _state.escapes
    finally:
        _state.folder = None


@contextlib.contextmanager
def limited() -> Iterator[Callable[[], None]]:
    """Limits the address space of this process to what it has and :data:`ROOM`; yields a call that begins the time of one input."""

    def late(*_: object) -> None:
        raise Escaped(f"more than {SECONDS:g} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else 0
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    before, compiled = signal.signal(signal.SIGALRM, late), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield lambda: signal.setitimer(signal.ITIMER_REAL, SECONDS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.dont_write_bytecode = compiled
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attack(reader: Reader, count: int, only: int | None = None) -> tuple[int, int]:
    """Gives a reader ``count`` mutations of its file, or the one of the seed ``only``; returns how many it read and refused.

    Raises:
        AssertionError: for each different fault its first seed, and the file that shows it.
    """
    data, folder = reader.valid, reader.file.parent
    reader.file.write_bytes(data)
    reader.read()  # an error here is not the mutation's
    faults: dict[str, str] = {}
    seen, refused = 0, 0
    with limited() as begin:
        for seed in range(count) if only is None else (only,):
            chance = random.Random(f"{reader.name}/{seed}")
            content = mutated(chance, data, reader.form)
            reader.file.write_bytes(content)
            begin()
            try:
                with watched(folder) as escapes:
                    fault = outcome(reader)
            except Escaped as error:
                fault = f"escaped: {error}"
            fault = f"escaped: {escapes[0]}" if escapes else fault
            seen, refused = seen + 1, refused + (fault == "refused")
            if fault not in ("", "refused"):
                kept = folder.parent / f"fault-{reader.name.replace(' ', '-')}-{seed}-{reader.file.name}"
                kept.write_bytes(content)
                faults.setdefault(fault.partition("\n")[0][:160], f"seed {seed}, {kept}: {fault}")
            if len(faults) > 12:
                break
    reader.file.write_bytes(data)
    test = f"{Path(__file__).parents[1] / 'harden' / 'test_hostile_files.py'}::test_no_mutated_file_does_more_than_be_refused"
    hint = f"repeat one with UNDO_HOSTILE_SEED=SEED pytest '{test}[{reader.name}]'"
    assert not faults, f"{reader.name}: {len(faults)} kinds of fault among {seen} inputs; {hint}\n" + "\n".join(faults.values())
    return seen - refused, refused


def outcome(reader: Reader) -> str:
    """Calls the entry point: "" if it read the file, "refused" if it ended with a clear error of one line, else what is wrong."""
    try:
        reader.read()
    except (*REFUSED, *FAILED) as error:
        said = " ".join(str(error).split())
        if not said or (reader.named and not any(name in said for name in reader.named)):
            return f"{type(error).__name__} without {' or '.join(reader.named)}: {said[:200]!r}\n{_where(error)}"
        return "refused"
    except Escaped:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}\n{_where(error)}"
    return ""


def _where(error: BaseException) -> str:
    return "".join(traceback.format_tb(error.__traceback__)[-6:])


def odd_places(reader: Reader) -> Iterator[tuple[str, str]]:
    """Puts a folder, a dangling link, a link to itself and a link to a file elsewhere in the file's place; yields each outcome."""
    data, elsewhere = reader.valid, reader.file.parent.parent / "elsewhere"
    reader.file.write_bytes(data)
    elsewhere.write_bytes(data)
    for kind in ("folder", "dangling link", "link to itself", "link to a file elsewhere"):
        reader.file.unlink()
        if kind == "folder":
            reader.file.mkdir()
        else:
            reader.file.symlink_to({"dangling link": "nothing", "link to itself": reader.file.name}.get(kind, elsewhere))
        try:
            with limited() as begin, watched(reader.file.parent):
                begin()
                found = outcome(reader)
        except Escaped as error:
            found = f"escaped: {error}"
        yield kind, found
        if elsewhere.read_bytes() != data:
            yield kind, "escaped: the file elsewhere was changed"
        shutil.rmtree(reader.file) if reader.file.is_dir() and not reader.file.is_symlink() else reader.file.unlink(
            missing_ok=True
        )
        reader.file.write_bytes(data)
