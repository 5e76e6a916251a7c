"""The fused ops of :mod:`undo_kernels`, under the name that users of the method import."""

from undo_kernels import LinearCrossEntropyLoss, LinearKLDivLoss
from undo_kernels.ops import *  # noqa: F403
from undo_kernels.ops import __all__ as _functions

__all__ = ["LinearCrossEntropyLoss", "LinearKLDivLoss", *_functions]
