"""Which instruction set the C++ kernels use: the best of this processor, or the one that ``UNDO_CPU_ISA`` names.

``amx`` means the row kernels of ``avx512`` and AMX tiles for bfloat16 products; the other names use no tiles.
"""

from __future__ import annotations

import functools
import os

from undo_kernels.cpu.extension import kernels

VARIABLE = "UNDO_CPU_ISA"
_VECTORS = ("avx512", "avx2", "plain")


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """The names that this processor can be asked for, best first; none without the C++ extension."""
    if kernels is None:
        return ()
    best = kernels.instruction_set("")
    return ("amx",) * kernels.amx_available() + _VECTORS[_VECTORS.index(best) :]


def forced() -> str:
    """What ``UNDO_CPU_ISA`` says, empty for the best of this processor.

    Raises:
        ValueError: this processor lacks it.
    """
    name = os.environ.get(VARIABLE, "")
    if name and name not in instruction_sets():
        raise ValueError(f"{VARIABLE}: got {name!r}, wanted one that this processor has: {', '.join(instruction_sets())}")
    return name


def vectors() -> str:
    """Name of the row kernels that run: avx512, avx2 or plain."""
    return kernels.instruction_set({"amx": "avx512"}.get(name := forced(), name))


def has_amx() -> bool:
    """Whether bfloat16 products run on AMX tiles here."""
    return (forced() or instruction_sets()[0]) == "amx"
