"""Reads YAML files of settings; an error is one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from undo_core.io.text_files import checked_text, read_text


def read_settings(path: str | Path, argument: str = "config") -> dict[str, Any]:
    """Reads the settings in a YAML file, whose text must pass :func:`undo_core.io.text_files.checked_text`.

    Raises:
        FileNotFoundError: there is no such file; the message names ``argument``.
        ValueError: the file is not text, not valid YAML, or not a mapping; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{argument}: got {path}, which is not a file; wanted a YAML file such as configs/arithmetic-cpu.yaml"
        )
    text = read_text(path)
    try:
        settings = yaml.safe_load(text)
        written = json.dumps(settings, default=str, ensure_ascii=False)  # raises for a mapping that contains itself
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: invalid YAML: {' '.join(str(error).split())}") from None
    checked_text(written, f"{path}")
    if not isinstance(settings, dict):
        got = "nothing" if settings is None else type(settings).__name__
        raise ValueError(f"{path}: got {got}, wanted a mapping of settings")
    return settings
