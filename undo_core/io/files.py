"""Crash-safe writes to disk: write under a temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

JSON_BYTES = 1 << 28  # a larger JSON file is refused: in memory it takes about ten times its size
_RUST = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Adds ``path`` to an error of the operating system that names no file, and makes those of Rust an OSError.

    A failed write or flush names no file. safetensors raises its own error for it, and tokenizers a bare Exception.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        if not (number := _RUST.search(str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text``, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces ``path`` by ``data``, atomically."""
    # several processes may write the same file, and on two machines, or in two containers, they may have the same number
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with errors_named(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the error that is raised is the one to report
                temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replaces ``path`` by ``value`` as JSON, atomically."""
    if place := _not_finite(value):
        raise ValueError(f"{path.name}: got {place}, wanted finite numbers: weights or losses hold NaN or infinity")
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _not_finite(value: Any, at: str = "") -> str:
    """Returns number and place of the first number in a JSON value that JSON cannot hold; empty if there is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} in {at!r}"
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return next(filter(None, (_not_finite(entry, f"{at}.{name}".lstrip(".")) for name, entry in entries)), "")


def read_json(path: Path) -> Any:
    """Returns the JSON value in ``path``.

    Raises:
        ValueError: the file is larger than :data:`JSON_BYTES`, is not UTF-8 or not JSON, or is nested too deeply.
    """
    check_size(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON, or torn ({error})") from None


def check_size(path: Path) -> None:
    """Raises a ValueError unless a file that is read as a whole is an ordinary one, which has an end, of at most :data:`JSON_BYTES`."""
    found = path.stat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # to open a folder is an error
        raise ValueError(f"{path}: got a pipe, a socket or a device, wanted a file")
    if found.st_size > JSON_BYTES:
        raise ValueError(f"{path}: got {found.st_size:,} bytes, wanted at most {JSON_BYTES:,}")


def publish(folder: Path, final: Path, check: Callable[[], None] = lambda: None) -> None:
    """Flushes every file of ``folder`` to disk and renames the folder to ``final``, which must not exist.

    Whoever may read the folder may then read its files: safetensors writes them for their owner alone, whatever the umask.
    ``check`` is called just before the renaming, which it can prevent by raising.
    """
    permissions = folder.stat().st_mode & 0o666  # those of a new file, since the umask has made those of the new folder
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with errors_named(path), open(path, "r+b") as file:  # Windows flushes only files that are open for writing
                os.fsync(file.fileno())
            if path.stat().st_mode & 0o666 != permissions:
                path.chmod(permissions)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)
    check()
    os.rename(folder, final)
    sync_folder(final.parent)


def replace_folder(folder: Path, final: Path) -> None:
    """Publishes ``folder`` as ``final`` and deletes the folder that was there before.

    The old folder is renamed just before the new one takes its name, and renamed back if that fails. A process killed between the
    two renamings leaves the old folder beside, as ``.NAME.*.old``.
    """
    old = final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}.old")

    def move_aside() -> None:
        if final.exists():
            os.rename(final, old)

    try:
        publish(folder, final, move_aside)
    except BaseException:
        if old.exists() and not final.exists():
            os.rename(old, final)
        raise
    if old.exists():
        shutil.rmtree(old)


def fresh(folder: Path) -> Path:
    """Deletes ``folder`` if it exists, creates it empty, and returns it."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def sync_folder(folder: Path) -> None:
    """Flushes the directory entries of ``folder`` to disk; does nothing on Windows, where a folder cannot be opened."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with errors_named(folder):
            os.fsync(handle)
    finally:
        os.close(handle)


def see_changes(folder: Path) -> None:
    """Makes files visible that other machines have put into ``folder``.

    An NFS client remembers for up to a minute which files a folder lacks, unless it changes the folder itself.
    """
    handle, name = tempfile.mkstemp(prefix=".", dir=folder)
    os.close(handle)
    os.unlink(name)


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """Returns the SHA-256 of a value's canonical JSON, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
