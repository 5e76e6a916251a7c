"""RMU's activation loss and its direction in plain PyTorch."""

from __future__ import annotations

import torch

from undo_kernels.library import register
from undo_kernels.reference.noise import standard
from undo_kernels.reference.philox import DRAW, words
from undo_kernels.segment import name_hash

_STREAM = name_hash("rmu direction")


@register("rmu_loss", "reference")
def rmu_loss(
    hidden: torch.Tensor, target: torch.Tensor, coefficient: float, mask: torch.Tensor | None, normalize: str
) -> torch.Tensor:
    """Mean of ``(hidden - coefficient * target)**2``; see :func:`undo_core.ops.rmu_loss`."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    wanted = coefficient * target.detach().to(dtype)
    if mask is None or normalize == "all":
        return (hidden.to(dtype) - wanted).square().mean() if hidden.numel() else hidden.to(dtype).sum()
    difference = hidden.to(dtype) - wanted
    difference = torch.where(mask[..., None], difference, torch.zeros_like(difference))
    per_token = difference.square().mean(-1)
    if normalize == "masked":
        return per_token.sum() / mask.sum().clamp_min(1)
    counted = mask.sum(-1)
    per_sequence = per_token.sum(-1) / counted.clamp_min(1)
    return per_sequence.sum() / (counted > 0).sum().clamp_min(1)


def misdirection(width: int, seed: int, law: str) -> torch.Tensor:
    """Unit vector ``[width]`` float32 that depends on the seed alone: gaussian entries, or uniform ones in (0, 1)."""
    if law == "gaussian":
        direction = standard("normal", seed, _STREAM, 0, width, "cpu").double()
    else:
        direction = ((words(seed, _STREAM, DRAW, 0, width) >> 8).double() + 0.5) * 2.0**-24
    return (direction / direction.norm()).float()
