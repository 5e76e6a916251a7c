"""The compiled extension, and the constants of its headers as Python enumerations.

Every module takes both from here, so that no number of ``csrc/`` is written twice. Without the extension ``kernels`` is None
and the backend is marked unavailable.
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import Any

from undo_kernels.cpu.sources import digest
from undo_kernels.library.backends import mark_unavailable

_SOURCES = Path(__file__).resolve().parents[3] / "csrc"  # in a checkout; an installed wheel has none


def _outdated(built_from: str | None) -> bool:
    """Whether the extension was built from other sources than the checkout has now, as after ``git pull``."""
    return _SOURCES.is_dir() and built_from != digest(_SOURCES)


kernels: Any = None
try:
    from undo_kernels import _cpu
except ImportError as error:
    mark_unavailable("cpu", f"the C++ extension was not built ({error}); install a C++17 compiler and run pip install again")
else:
    if _outdated(getattr(_cpu, "SOURCES", None)):
        mark_unavailable("cpu", "the C++ extension was built from other sources than csrc/ has now; run pip install -e . again")
    else:
        kernels = _cpu


def _enumeration(name: str) -> Any:
    members = {} if kernels is None else getattr(kernels, name).__members__
    return IntEnum(name, {key: int(value) for key, value in members.items()})


Field = _enumeration("Field")  # of a chunk's state, ``csrc/vocab_loss.h``
Target = _enumeration("Target")  # of the losses' kernels, likewise
Kind = _enumeration("Kind")  # dtypes of ``csrc/rmu.h``
