"""Fast kernels for unlearning and distillation: losses over large vocabularies, in-place noise, and RMU's activation loss.

>>> from undo_kernels.ops import linear_kl_div, linear_cross_entropy, noise_

``undo_kernels.ops`` holds the public functions; ``LinearKLDivLoss`` and ``LinearCrossEntropyLoss`` are their module forms. The
package needs torch and numpy, and uses triton if it is installed. It handles tensors only: it knows no models, configurations
or datasets.

- ``backend("reference")`` is a context manager that sets the backend of the calls inside it; the variable ``UNDO_BACKEND`` sets
  it globally.
- ``recorded()`` is a context manager that lists the backend and the plan of each call inside it.
- ``release_workspace()`` frees the memory that is kept for later calls on a CPU.
- ``backends_of(op)`` and ``unavailable()`` list what can run here, and why the rest cannot.
"""

from undo_kernels import cpu, library, ops, reference, triton
from undo_kernels.cpu.workspace import release as release_workspace
from undo_kernels.library.backends import (
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
    "library",
    "ops",
    "recorded",
    "reference",
    "registered",
    "release_workspace",
    "requested_backend",
    "triton",
    "unavailable",
]
