"""The public fused ops: vocabulary losses without logits, in-place noise, RMU's activation loss.

Each checks its arguments once and hands them to the backend that ``undo_kernels.library`` chooses.
"""

from undo_core.ops.losses import (
    KLStats,
    explain,
    kl_div,
    linear_cross_entropy,
    linear_kl_div,
    linear_lse,
    linear_sparse_kl_div,
    linear_uniform_kl,
    sparse_kl_div,
)
from undo_core.ops.noise import noise_, replay
from undo_core.ops.noise_rules import NoiseRule
from undo_core.ops.rmu import misdirection, rmu_loss

__all__ = [
    "KLStats",
    "NoiseRule",
    "explain",
    "kl_div",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_lse",
    "linear_sparse_kl_div",
    "linear_uniform_kl",
    "misdirection",
    "noise_",
    "replay",
    "rmu_loss",
    "sparse_kl_div",
]
