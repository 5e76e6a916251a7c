"""RMU's activation loss and its direction in plain PyTorch."""

from __future__ import annotations

import torch

from undo_kernels.library.backends import register
from undo_kernels.noise_segments import name_hash
from undo_kernels.record import Call, record_autograd, recording
from undo_kernels.reference.noise import standard
from undo_kernels.reference.philox import DRAW, words

_STREAM = name_hash("rmu direction")


def token_factor(mask: torch.Tensor | None, normalize: str, dtype: torch.dtype) -> torch.Tensor | None:
    """Returns the factor of each token's mean square, shaped like ``mask``; 0 where masked. None: 1 / tokens each."""
    if mask is None or normalize == "all":
        return None
    if normalize == "masked":
        return mask.to(dtype) / mask.sum().clamp_min(1)
    counted = mask.sum(-1, keepdim=True)
    return mask.to(dtype) / (counted.clamp_min(1) * (counted > 0).sum().clamp_min(1))


@register("rmu_loss", "reference")
def rmu_loss(hidden: torch.Tensor, target: torch.Tensor, factor: torch.Tensor | None, coefficient: float) -> torch.Tensor:
    """Returns ``sum_i factor_i mean_j (hidden_ij - coefficient target_ij)**2`` of ``[tokens, d]``; tokens of factor 0 are ignored."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    difference = hidden.to(dtype) - coefficient * target.detach().to(dtype)
    if factor is None:
        loss = difference.square().mean() if difference.numel() else difference.sum()
    else:
        difference = torch.where(factor[:, None] == 0, 0.0, difference)
        loss = (factor * difference.square().mean(-1)).sum()
    if recording():
        record_autograd(Call("rmu_loss", "reference", "direct", "", *hidden.shape), [loss])
    return loss


def misdirection(width: int, seed: int, law: str) -> torch.Tensor:
    """Returns a unit vector ``[width]`` float32, a function of the seed: gaussian entries, or uniform ones in (0, 1)."""
    if law == "gaussian":
        direction = standard("normal", seed, _STREAM, 0, width, "cpu").double()
    else:
        direction = ((words(seed, _STREAM, DRAW, 0, width) >> 8).double() + 0.5) * 2.0**-24
    return (direction / direction.norm()).float()
