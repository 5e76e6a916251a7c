"""Reads settings in YAML; an error is one line that names the file.

A file of settings is data. The parser of the command line, jsonargparse, would import the class that a value names by
``class_path``, and build it where any value is accepted; here such a value is an error, also on the command line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader
from jsonargparse.typing import Path_fr

from undo_core.io.text_files import checked_text, read_text

SETTINGS_BYTES = 1 << 20  # a larger file of settings is refused
MOST_VALUES = 100_000  # so many values may a file have once its aliases are written out
PARSER_MODE = "undo"  # jsonargparse's name of :func:`parse_value`


class SettingsParser(ArgumentParser):
    """Reads settings by :func:`parse_value`, and files of them as UTF-8; the locale's encoding is another one on Windows."""

    reading: ClassVar[list[str]] = []  # absolute paths; a file can name another one as its config

    def __init__(self, *arguments: Any, **values: Any) -> None:
        super().__init__(*arguments, **{"exit_on_error": False, "parser_mode": PARSER_MODE, **values})

    def parse_path(self, path: str | os.PathLike, *arguments: Any, **values: Any) -> Namespace:
        file = Path_fr(path)
        if file.absolute in self.reading:
            raise ValueError(f"{path}: got a config that leads back to this file, wanted none")
        self.reading.append(file.absolute)
        try:
            with file.relative_path_context():
                return self.parse_string(read_text(Path(file.absolute)), os.path.basename(path), *arguments, **values)
        finally:
            self.reading.pop()


class SettingsError(ValueError):
    """Settings that are YAML, but not allowed."""


def read_settings(path: str | Path, argument: str = "config") -> dict[str, Any]:
    """Reads the settings in a YAML file, whose text must pass :func:`undo_core.io.text_files.checked_text`.

    Raises:
        FileNotFoundError: there is no such file; the message names ``argument``.
        ValueError: the file is not text, not valid YAML, or not a mapping, or :func:`check_values` refuses it; the message names
            the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{argument}: got {path}, which is not a file; wanted a YAML file such as configs/arithmetic-cpu.yaml"
        )
    if (size := path.stat().st_size) > SETTINGS_BYTES:
        raise ValueError(f"{path}: got {size:,} bytes, wanted settings of at most {SETTINGS_BYTES:,}")
    text = read_text(path)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        check_values(root)
        settings = None if root is None else loader.construct_document(root)
        written = json.dumps(settings, default=str, ensure_ascii=False)  # raises for a mapping that contains itself
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: invalid YAML: {' '.join(str(error).split())}") from None
    checked_text(written, f"{path}")
    if not isinstance(settings, dict):
        got = "nothing" if settings is None else type(settings).__name__
        raise ValueError(f"{path}: got {got}, wanted a mapping of settings")
    return settings


def parse_value(text: str) -> Any:
    """Returns the value that jsonargparse reads in ``text``, a file of settings or the value of a flag.

    Raises:
        SettingsError: :func:`check_values` refuses it.
    """
    check_values(yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))  # as jsonargparse chooses
    return get_loader("yaml")(text)


def check_sections(values: Namespace, owner: type, at: str = "") -> None:
    """Raises a ValueError if a section of parsed settings is not a mapping.

    The parser would take the section's defaults, or raise a TypeError.

    Args:
        values: the settings that were parsed for ``owner``.
        owner: a dataclass; fields that are dataclasses are its sections.
        at: the names of the outer sections, for an error.
    """
    for name, kind in typing.get_type_hints(owner).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and name in values:
            if not isinstance(values[name], Namespace):
                got = "nothing" if values[name] is None else f"{values[name]!r:.60}"
                raise ValueError(f"{at}{name}: got {got}, wanted settings, each as NAME: VALUE")
            check_sections(values[name], kind, f"{at}{name}.")


def check_values(root: yaml.Node | None) -> None:
    """Raises a SettingsError if a YAML document names a class, sets a value twice, or stands for more than :data:`MOST_VALUES` values.

    Aliases let a text of a few lines stand for billions of values, which come into being when it is copied or printed.
    """
    sizes: dict[int, int] = {}  # by node: how many values it stands for; a node within itself counts as one
    todo = [] if root is None else [(root, False)]
    while todo:
        node, counted = todo.pop()
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = [] if isinstance(inner, str) else inner
        if counted:
            sizes[id(node)] = min(1 + sum(sizes[id(part)] for part in inner), MOST_VALUES + 1)
        elif id(node) not in sizes:
            sizes[id(node)] = 1
            todo += [(node, True), *((part, False) for part in inner)]
        if isinstance(node, yaml.MappingNode):
            names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if "class_path" in names:
                raise SettingsError("got class_path, which names code; wanted the settings themselves")
            if repeated := next((name for name, count in names.items() if count > 1), None):
                raise SettingsError(f"got {repeated!r} more than once in a mapping, wanted it once: only the last would count")
    if root is not None and sizes[id(root)] > MOST_VALUES:
        raise SettingsError(f"got aliases that stand for more than {MOST_VALUES:,} values, wanted at most so many")


set_loader(PARSER_MODE, parse_value, exceptions=(yaml.YAMLError,))
