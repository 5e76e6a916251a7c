"""Files that fail: every operation on a file under a folder has a number, and one of them can fail or be the last thing that happens.

Hooked are Python's open and the functions of ``os``, wherever they are called, and the two writers that are written in Rust:
safetensors' and tokenizers'. A write that fails has written half of its bytes.
"""

from __future__ import annotations

import builtins
import errno
import io
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tokenizers
from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT)
ERRORS = (*FULL, errno.EROFS, errno.EIO, errno.EMFILE, errno.EACCES)
_TAKES_ROOM = ("open", "write", "save", "mkdir", "link", "symlink")  # what a full disk refuses
_OPENS = ("open", "read", "save")  # what a process without free handles cannot do
_BY_HANDLE = ("fsync", "pwrite", "write", "ftruncate", "sendfile", "copy_file_range")
_BY_TWO_PATHS = ("rename", "replace", "link", "symlink")
_BY_PATH = ("mkdir", "rmdir", "unlink", "remove", "utime", "truncate", "chmod")


class Ended(BaseException):
    """The process has ended; whoever catches this and touches a file gets it again."""


@dataclass(frozen=True)
class Fault:
    """What happens at one operation.

    Attributes:
        at: number of the operation.
        error: number of the error that it raises, which stays if it is that of a full or read-only disk; None ends the process.
    """

    at: int
    error: int | None

    def hits(self, number: int, kind: str) -> bool:
        """Whether this operation fails."""
        if number < self.at or (number > self.at and self.error not in (*FULL, errno.EROFS)):
            return False
        if self.error in FULL:
            return kind in _TAKES_ROOM
        return kind in _OPENS if self.error == errno.EMFILE else self.error != errno.EROFS or kind != "read"


class FaultyFiles:
    """Context in which the operations on files under ``root`` are counted, and ``fault`` happens.

    Attributes:
        operations: kind and path of each operation so far.
        struck: those that failed.
    """

    def __init__(self, root: Path, fault: Fault | None = None, end: Callable[[], None] | None = None) -> None:
        self.root, self.fault, self.end = os.path.abspath(root), fault, end
        self.operations: list[tuple[str, str]] = []
        self.struck: list[tuple[str, str]] = []
        self.ended = False

    def __enter__(self) -> FaultyFiles:
        self._patch = pytest.MonkeyPatch()
        self._real = {name: getattr(os, name) for name in (*_BY_HANDLE, *_BY_TWO_PATHS, *_BY_PATH) if hasattr(os, name)}
        self._open, self._open_handle = builtins.open, os.open
        for module in (builtins, io):
            self._patch.setattr(module, "open", self._opened)
        self._patch.setattr(os, "open", self._opened_handle)
        for name in self._real:
            self._patch.setattr(os, name, self._function(name))
        self._patch.setattr(mmap, "mmap", _mapped(self))
        self._save, self._save_tokenizer = safetensors.torch.serialize_file, tokenizers.Tokenizer.save
        self._patch.setattr(safetensors.torch, "serialize_file", self._saved)
        self._patch.setattr(tokenizers.Tokenizer, "save", lambda *given, **named: self._tokenizer(*given, **named))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def act(
        self, kind: str, path: Any, do: Callable[[], Any], half: Callable[[], Any] = lambda: None, failing: Any = None
    ) -> Any:
        """Does one operation, or what ``fault`` makes of it; ``failing`` makes the error of a writer that raises its own."""
        if not self._inside(path):
            return do()
        if self.ended:
            raise Ended
        number, operation = len(self.operations), (kind, os.path.relpath(path, self.root))
        self.operations.append(operation)
        if self.fault is None or not self.fault.hits(number, kind):
            return do()
        self.struck.append(operation)
        half()
        if self.fault.error is None:
            self.ended = True
            if self.end is not None:
                self.end()
            raise Ended
        text = os.strerror(self.fault.error)
        if failing is not None:
            raise failing(f"{text} (os error {self.fault.error})")
        raise OSError(self.fault.error, text, *(() if kind in ("write", "fsync", "flush") else (os.fspath(path),)))

    def _inside(self, path: Any) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(self.root)

    def _opened(
        self, file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, *more: Any, **named: Any
    ) -> Any:
        if isinstance(file, int) or not self._inside(file):
            return self._open(file, mode, buffering, encoding, *more, **named)
        if not set(mode) & set("wax+"):
            return self.act("read", file, lambda: self._open(file, mode, buffering, encoding, *more, **named))
        raw = self.act("open", file, lambda: _Raw(self, file, mode.replace("b", "").replace("t", "")))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, *more, **named)

    def _opened_handle(self, path: Any, flags: int, *more: Any, dir_fd: int | None = None) -> int:
        kind = "open" if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) else "read"
        return self.act(kind, _where(path, dir_fd), lambda: self._open_handle(path, flags, *more, dir_fd=dir_fd))

    def _function(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(*given: Any, **named: Any) -> Any:
            do = lambda: real(*given, **named)  # noqa: E731
            place = given[1] if name in _BY_TWO_PATHS else given[0]
            path = _where(place, named.get("dir_fd"))
            if name in ("pwrite", "write"):
                return self.act("write", path, do, lambda: real(given[0], given[1][: len(given[1]) // 2], *given[2:]))
            if name in ("sendfile", "copy_file_range"):
                return self.act("write", path, do)
            return self.act({"replace": "rename", "remove": "unlink"}.get(name, name), path, do)

        return call

    def _saved(self, tensors: Any, path: Any, metadata: Any = None) -> None:
        write = lambda: self._save(tensors, path, metadata=metadata)  # noqa: E731
        self.act(
            "save",
            path,
            write,
            lambda: self._half(write, path),
            lambda text: SafetensorError(f"Error while serializing: {text}"),
        )

    def _tokenizer(self, tokenizer: Any, path: str, pretty: bool = True) -> None:
        write = lambda: self._save_tokenizer(tokenizer, path, pretty)  # noqa: E731
        self.act("save", path, write, lambda: self._half(write, path), Exception)

    def _half(self, write: Callable[[], None], path: Any) -> None:
        write()
        self._real["truncate"](path, os.path.getsize(path) // 2)


class _Raw(io.FileIO):
    """A file whose writes are operations, also those that happen when a buffer is flushed."""

    def __init__(self, files: FaultyFiles, path: Any, mode: str) -> None:
        self.files = files
        super().__init__(path, mode)

    def write(self, data: Any) -> int:
        write = super().write
        return self.files.act("write", self.name, lambda: write(data), lambda: write(memoryview(data)[: len(data) // 2]))


def _mapped(files: FaultyFiles) -> type[mmap.mmap]:
    class Mapped(mmap.mmap):
        """A mapped file whose flush is an operation."""

        def __new__(cls, handle: int, *given: Any, **named: Any) -> Mapped:
            made = super().__new__(cls, handle, *given, **named)
            made.path = _where(handle, None)
            return made

        def flush(self, *given: Any) -> None:
            flush = super().flush
            files.act("flush", self.path, lambda: flush(*given))

    return Mapped


def _where(place: Any, folder: int | None) -> str:
    """Path of a file that is given by its path, its handle, or its name in an open folder."""
    if isinstance(place, int):
        return os.readlink(f"/proc/self/fd/{place}")
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), place) if folder is not None else os.fspath(place)
