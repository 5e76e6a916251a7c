"""Fast kernels for unlearning and distillation: losses over large vocabularies, in-place noise, and RMU's activation loss.

>>> from undo_kernels.ops import linear_kl_div, linear_cross_entropy, noise_

``undo_kernels.ops`` holds the public functions, and ``LinearKLDivLoss`` and ``LinearCrossEntropyLoss`` are their module forms. Importing this package needs torch and numpy, and triton where there is one. The
package knows tensors, and no model, configuration or dataset.

- ``backend("reference")`` is a context manager that chooses the backend of the calls inside; so does ``UNDO_BACKEND``.
- ``recorded()`` lists the backend and the plan of the calls inside.
- ``release_workspace()`` frees the memory that this thread keeps for its next call.
- ``backends_of(op)`` and ``unavailable()`` say what can run here, and why something cannot.
"""

from undo_kernels import cpu, ops, reference, torch_ops, triton
from undo_kernels.cpu.workspace import release as release_workspace
from undo_kernels.library import (
    BackendWarning,
    backend,
    backends_of,
    implementation,
    registered,
    requested_backend,
    unavailable,
)
from undo_kernels.modules import LinearCrossEntropyLoss, LinearKLDivLoss
from undo_kernels.record import Call, recorded

__all__ = [
    "BackendWarning",
    "Call",
    "LinearCrossEntropyLoss",
    "LinearKLDivLoss",
    "backend",
    "backends_of",
    "cpu",
    "implementation",
    "ops",
    "recorded",
    "reference",
    "registered",
    "release_workspace",
    "requested_backend",
    "torch_ops",
    "triton",
    "unavailable",
]
