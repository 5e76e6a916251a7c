"""Thin bindings to the C++ kernels of ``csrc/``; torch must be imported first, for its OpenMP threads to be shared.

The vocabulary losses are in ``losses.py``. Of the noise, C++ covers Xavier-uniform on float32 so far; other laws and dtypes are
defined by the reference and run there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from undo_kernels import reference
from undo_kernels.cpu import losses
from undo_kernels.library import mark_unavailable, register
from undo_kernels.segment import Segment

try:
    from undo_kernels import _cpu
except ImportError as error:
    _cpu = None
    mark_unavailable("cpu", f"the C++ extension was not built ({error}); install a C++17 compiler and run pip install again")

__all__ = ["losses"]


@register("noise_", "cpu")
@torch.no_grad()
def noise_(segments: Sequence[Segment], seed: int, stochastic_rounding: bool) -> torch.Tensor:
    """:func:`undo_kernels.reference.noise.noise_`, bit for bit."""
    return reference.noise.noise_(segments, seed, stochastic_rounding)
