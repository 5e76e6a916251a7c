"""Kinds of settings that are found by being there: each subclass enters the registry of its base when it is defined."""

from __future__ import annotations

from typing import TypeVar

Kind = TypeVar("Kind", bound=type)


def enter(kinds: dict[str, Kind], new: Kind) -> None:
    """Enters a class under its ``kind``; the same class, defined again, replaces itself.

    Raises:
        TypeError: the class has no ``kind``, or that of another class.
    """
    kind = vars(new).get("kind")
    if not isinstance(kind, str):
        raise TypeError(f'kind: got none in {new.__name__}, wanted a field such as kind: Literal["name"] = "name"')
    known = kinds.get(kind)
    if known is not None and (known.__module__, known.__qualname__) != (new.__module__, new.__qualname__):
        raise TypeError(f"kind: got {kind} in {new.__name__}, which is that of {known.__qualname__}; wanted another")
    kinds[kind] = new
