"""Kernels for UNDO: vocabulary losses without logits, in-place parameter noise, RMU activation losses.

Knows tensors; knows no model, no configuration and no dataset. Arguments are checked by the public face,
``undo_core.ops``; the functions here may assume that they are right.
"""

from undo_kernels import cpu, reference, torch_ops, torch_rmu, triton
from undo_kernels.cpu.workspace import release as release_workspace
from undo_kernels.library import BackendWarning, backend, backends_of, implementation, ops, requested_backend, unavailable
from undo_kernels.record import Call, recorded

__all__ = [
    "BackendWarning",
    "Call",
    "backend",
    "backends_of",
    "cpu",
    "implementation",
    "ops",
    "recorded",
    "reference",
    "release_workspace",
    "requested_backend",
    "torch_ops",
    "torch_rmu",
    "triton",
    "unavailable",
]
