"""Instruction set of the C++ kernels: the best that this processor has, or the one named by ``UNDO_CPU_ISA``.

Names of vector units, ``avx512``, ``avx2``, ``neon`` and ``plain``, mean that heads in bfloat16 are converted to float32. Names of
bfloat16 products, such as ``amx``, mean these products and the vector units that go with them.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from undo_kernels.cpu.extension import kernels

VARIABLE = "UNDO_CPU_ISA"
_VECTORS = {"avx512": ("avx512", "avx2", "plain"), "avx2": ("avx2", "plain"), "neon": ("neon", "plain"), "plain": ("plain",)}


@functools.cache
def _products() -> dict[str, Any]:
    """Returns the bfloat16 products that this processor can run, by name, best first; also the emulated ones, which are for tests."""
    return {} if kernels is None else {product.name: product for product in kernels.bf16_products()}


@functools.cache
def vector_units() -> tuple[str, ...]:
    """Returns the names of this processor's vector units, best first; empty without the C++ extension."""
    return () if kernels is None else _VECTORS[kernels.instruction_set("")]


def instruction_sets() -> tuple[str, ...]:
    """Returns the names that this processor supports, best first; empty without the C++ extension."""
    return tuple(name for name in bfloat16_products() if name not in emulations()) + vector_units()


def bfloat16_products() -> tuple[str, ...]:
    """Returns the names of the bfloat16 products that this processor can run, best first; emulated ones are last."""
    return tuple(_products())


def emulations() -> tuple[str, ...]:
    """Returns the names of bfloat16 products whose instructions are emulated: for tests, and in use only where they are named."""
    return tuple(name for name, product in _products().items() if product.emulated)


def forced() -> str:
    """Returns the value of ``UNDO_CPU_ISA``; empty if unset, which means the best of this processor.

    Raises:
        ValueError: this processor does not support it.
    """
    name = os.environ.get(VARIABLE, "")
    if name and name not in instruction_sets() + emulations():
        raise ValueError(f"{VARIABLE}: got {name!r}, wanted one that this processor has: {', '.join(instruction_sets())}")
    return name


def vectors() -> str:
    """Returns the name of the kernels in use: avx512, avx2, neon or plain."""
    name = forced()
    return kernels.instruction_set(_products()[name].vectors if name in _products() else name)


def bfloat16_product() -> str:
    """Returns the name of the product for heads in bfloat16; empty if they are converted to float32."""
    name = forced() or instruction_sets()[0]
    return name if name in _products() else ""
