"""Reads text from files. Text is UTF-8, with or without a byte-order mark, and has no NUL character.

Anything else raises an error of one line that names the file and the row.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_POINTER = b"version https://git-lfs.github.com/spec/"
_OTHER_MARKS = (
    codecs.BOM_UTF16_LE,
    codecs.BOM_UTF16_BE,
    codecs.BOM_UTF32_BE,
)  # UTF-32's little-endian mark begins with UTF-16's


def checked_text(value: Any, where: str, field: str | None = None) -> str:
    """Returns ``value`` if it is a text that UTF-8 can hold and has no NUL character.

    Args:
        value: the value to check.
        where: file and row, for the error.
        field: name of the value's field, for the error.

    Raises:
        ValueError: ``value`` is null, a number or a list, or contains a lone surrogate (half a character, as ``"\\ud800"`` in
            JSON) or a NUL.
    """
    named = "" if field is None else f" in the field {field!r}"
    if not isinstance(value, str):
        got = "null" if value is None else type(value).__name__
        raise ValueError(f"{where}: got {got}{named}, wanted text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            got = f"the lone surrogate U+{ord(value[error.start]):04X} at character {error.start + 1}"
            raise ValueError(f"{where}: got {got}{named}, wanted text that UTF-8 can hold") from None
    if "\0" in value:
        got = f"a NUL at character {value.index(chr(0)) + 1}"
        raise ValueError(f"{where}: got {got}{named}, wanted text; UTF-16 without a byte-order mark looks like this")
    return value


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields number and text of each line of a UTF-8 file, without line end (``\\n``, ``\\r\\n``, ``\\r``) or byte-order mark.

    Raises:
        ValueError: the file has another encoding, or is a pointer file of Git LFS. The error names the file and the line.
    """
    check_is_content(path)
    with open(path, "rb") as file:
        number = 0
        for raw in file:
            if number == 0:
                if raw.startswith(_OTHER_MARKS):
                    raise ValueError(f"{path}, line 1: got the byte-order mark of UTF-16 or UTF-32, wanted UTF-8")
                raw = raw.removeprefix(codecs.BOM_UTF8)
            for line in raw.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
                number += 1
                try:
                    yield number, line.decode()
                except UnicodeDecodeError as error:
                    got = f"the byte 0x{line[error.start]:02x} at {error.start + 1}"
                    raise ValueError(
                        f"{path}, line {number}: got {got}, which is not UTF-8 ({error.reason}); wanted UTF-8"
                    ) from None


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file, checked by :func:`text_lines` and :func:`checked_text`; lines end with ``\\n``."""
    return "".join(f"{checked_text(line, f'{path}, line {number}')}\n" for number, line in text_lines(path))


def check_is_content(path: Path) -> None:
    """Raises a ValueError if ``path`` is a pointer, which Git LFS leaves in place of a file that was not fetched."""
    with open(path, "rb") as file:
        if file.read(len(codecs.BOM_UTF8) + len(_POINTER)).removeprefix(codecs.BOM_UTF8).startswith(_POINTER):
            raise ValueError(f"{path}: got a pointer file of Git LFS, wanted the file that it stands for; run `git lfs pull`")
