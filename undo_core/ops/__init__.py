"""The fused ops of :mod:`undo_kernels`, under the name that users of the method import."""

from undo_kernels import LinearCrossEntropyLoss, LinearKLDivLoss
from undo_kernels.ops import (
    KLStats,
    NoiseRule,
    explain,
    kl_div,
    linear_cross_entropy,
    linear_kl_div,
    linear_lse,
    linear_sparse_kl_div,
    linear_uniform_kl,
    misdirection,
    noise_,
    replay,
    rmu_loss,
    sparse_kl_div,
)

__all__ = [
    "KLStats",
    "LinearCrossEntropyLoss",
    "LinearKLDivLoss",
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
