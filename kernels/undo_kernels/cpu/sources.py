"""Digest of the C++ sources, by which an extension knows what it was built from. ``setup.py`` runs this file, so it imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(folder: str | Path) -> str:
    """Returns the SHA-256 of the names and contents of a folder's ``*.cpp`` and ``*.h`` files, in hexadecimal."""
    total = hashlib.sha256()
    for path in sorted(path for path in Path(folder).iterdir() if path.suffix in (".cpp", ".h")):
        total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
