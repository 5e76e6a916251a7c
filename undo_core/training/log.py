"""The log of a training stage, as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from undo_core.io.files import write_text


class StageLog:
    """Log of a stage in ``folder``, or nowhere if that is None.

    Entries after ``step`` are dropped: a killed run wrote them after its last checkpoint.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self.path = None if folder is None else folder / "log.jsonl"
        if self.path is not None:
            folder.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
            kept = [line for line in lines if 0 <= _step_of(line) <= step]
            write_text(self.path, "".join(line + "\n" for line in kept))  # a new file, also in place of a link to another one

    def write(self, entry: dict[str, Any]) -> None:
        """Appends an entry, which has its ``step``."""
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def _step_of(line: str) -> int:
    """The step of a line of the log; -1 if the line is not whole."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1
    return step if isinstance(step, int) else -1
