"""Reads what a file says without trusting it: errors are one line, sizes are limited, and a name leads to no other folder."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from undo_core.io.files import read_json

# A type; [shape] of each entry; {name: shape} of entries that must be there, or may if the name ends with "?"; {str: shape} of each
# entry whatever its name; a tuple of shapes for any of them.
Shape = Any
NUMBER = (float, int)
OPTIONAL = (*NUMBER, type(None))  # a number or null
LARGEST = 1 << 64  # beyond the seeds of the noise, and beyond what an array holds

_WORDS = {dict: "an object", list: "a list", str: "a text", int: "an integer", bool: "true or false", float: "a number"}


class Facts(dict[str, Any]):
    """An object that a file holds; to ask for an entry that it lacks is a ValueError that names the file."""

    def __init__(self, entries: dict[str, Any], where: str) -> None:
        super().__init__(entries)
        self.where = where

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self.where}: got no {name!r}, wanted one")


def read_object(path: Path, shape: Shape = dict, /, **fields: Shape) -> Facts:
    """Returns the JSON object in ``path``, which must have this :data:`Shape`, and ``fields`` of theirs.

    Raises:
        ValueError: as :func:`undo_core.io.files.read_json`, or the value is not such an object.
    """
    return Facts(checked(checked_object(read_json(path), str(path), **fields), shape, str(path)), str(path))


def checked_object(value: Any, where: str, **fields: Shape) -> dict[str, Any]:
    """Returns ``value`` if it is an object with ``fields`` of these shapes; a ValueError that begins with ``where`` if not."""
    return checked(value, fields, where)


def checked(value: Any, shape: Shape, where: str, at: str = "") -> Any:
    """Returns a JSON value if it has this :data:`Shape`, down to its innermost values.

    Args:
        value: the value.
        shape: its shape.
        where: the file, with which an error begins.
        at: place of the value in the file, for an error.

    Raises:
        ValueError: a value is of another type, is not there, or is a number that is not finite or has more than 64 bits. It names
            the place.
    """
    if isinstance(shape, tuple):
        return checked(value, next((one for one in shape if isinstance(value, _type(one))), shape[0]), where, at)
    if not isinstance(value, _type(shape)) or (isinstance(value, bool) and shape is not bool):
        raise ValueError(f"{where}: got {_kind(value)}{at and f' in {at!r}'}, wanted {_word(shape)}{at and ' there'}")
    if isinstance(value, float) and not math.isfinite(value):  # JSON has none, but Python reads them; 1e999 is one too
        raise ValueError(f"{where}: got {value}{at and f' in {at!r}'}, wanted a finite number{at and ' there'}")
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise ValueError(f"{where}: got an integer of more than 64 bits{at and f' in {at!r}'}, wanted fewer{at and ' there'}")
    if isinstance(shape, list):
        for number, entry in enumerate(value):
            checked(entry, shape[0], where, f"{at}[{number}]")
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            if name is str:
                for key, entry in value.items():
                    checked(entry, inner, where, f"{at}.{key}".lstrip("."))
            elif (key := name.removesuffix("?")) in value:
                checked(value[key], inner, where, f"{at}.{key}".lstrip("."))
            elif key == name:
                raise ValueError(f"{where}: got no {f'{at}.{key}'.lstrip('.')!r}, wanted {_word(inner)} there")
    return value


def _type(shape: Shape) -> Any:
    if isinstance(shape, tuple):
        return tuple(map(_type, shape))
    return shape if isinstance(shape, type) else type(shape)


def _word(shape: Shape) -> str:
    return _word(shape[0]) if isinstance(shape, tuple) else _WORDS[_type(shape)]


def inside(folder: Path, name: Any, where: str) -> Path:
    """Joins a name that a file gives to its folder.

    Raises:
        ValueError: ``name`` is not the relative path of something inside the folder. The message begins with ``where``.
    """
    parts = set()
    if isinstance(name, str):
        parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    rooted = isinstance(name, str) and (name.startswith(("/", "\\")) or PureWindowsPath(name).drive)
    if not parts or rooted or ".." in parts or "\0" in name:
        raise ValueError(f"{where}: got the file name {_shown(name)}, wanted the name of a file inside {folder}")
    return folder / name


@contextlib.contextmanager
def refused(what: str, *keep: type[BaseException]) -> Iterator[None]:
    """Turns any error that a library raises about a file, except ``keep`` and OSError, into a ValueError beginning with ``what``.

    An OSError that names no file begins with ``what`` too. A lack of memory is no fault of the file, and is raised as it is.
    The libraries that read models and tokenizers check little: a wrong value ends in a KeyError, a TypeError or, in Rust, in a
    PanicException, which is not even an Exception.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        said = " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename is None:
            kind = type(error) if type(error).__module__ == "builtins" else OSError  # others take other arguments
            named = kind(f"{what}: {said}")
            named.errno = error.errno  # says what can be done about it
            raise named from error
        if isinstance(error, (OSError, *keep)) or lacks_memory(error) or not (panic or isinstance(error, Exception)):
            raise
        shown = said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"
        raise ValueError(f"{what}: {shown}") from error


def lacks_memory(error: BaseException) -> bool:
    """Whether an allocation failed, or that of a thread's stack, or a file could not be mapped.

    torch raises a bare RuntimeError for the memory of the CPU, also for a file that safetensors maps through it.
    """
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    said = ("can't allocate memory", "can't start new thread", os.strerror(errno.ENOMEM))
    return known or any(part in str(error) for part in said)


def _kind(value: Any) -> str:
    return "null" if value is None else _WORDS.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
