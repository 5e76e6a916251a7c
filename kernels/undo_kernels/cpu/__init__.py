"""Thin bindings to the C++ kernels of ``csrc/``; torch must be imported first, for its OpenMP threads to be shared."""

from undo_kernels.cpu import losses, noise, rmu
from undo_kernels.cpu.instruction_set import instruction_sets
from undo_kernels.library import mark_unavailable

try:
    from undo_kernels import _cpu as _cpu
except ImportError as error:
    mark_unavailable("cpu", f"the C++ extension was not built ({error}); install a C++17 compiler and run pip install again")

__all__ = ["instruction_sets", "losses", "noise", "rmu"]
