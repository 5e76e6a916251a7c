"""Instruction set of the C++ kernels: the best that this processor has, or the one named by ``UNDO_CPU_ISA``.

``amx`` means the loss kernels of ``avx512``, and AMX for bfloat16 products; the other names do not use AMX.
"""

from __future__ import annotations

import functools
import os

from undo_kernels.cpu.extension import kernels

VARIABLE = "UNDO_CPU_ISA"
_VECTORS = ("avx512", "avx2", "plain")


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Returns the names that this processor supports, best first; empty without the C++ extension."""
    if kernels is None:
        return ()
    best = kernels.instruction_set("")
    return ("amx",) * kernels.amx_available() + _VECTORS[_VECTORS.index(best) :]


def forced() -> str:
    """Returns the value of ``UNDO_CPU_ISA``; empty if unset, which means the best of this processor.

    Raises:
        ValueError: this processor does not support it.
    """
    name = os.environ.get(VARIABLE, "")
    if name and name not in instruction_sets():
        raise ValueError(f"{VARIABLE}: got {name!r}, wanted one that this processor has: {', '.join(instruction_sets())}")
    return name


def vectors() -> str:
    """Returns the name of the kernels in use: avx512, avx2 or plain."""
    return kernels.instruction_set({"amx": "avx512"}.get(name := forced(), name))


def has_amx() -> bool:
    """Returns whether bfloat16 products use AMX."""
    return (forced() or instruction_sets()[0]) == "amx"
