"""RMU: the loss that pushes activations toward a target, and the target's direction."""

from __future__ import annotations

from typing import Literal

import torch

from undo_kernels import reference
from undo_kernels.library.backends import choose, implementation_on
from undo_kernels.ops import checks
from undo_kernels.reference.rmu import token_factor


def rmu_loss(
    hidden: torch.Tensor,
    target: torch.Tensor,
    *,
    coefficient: float = 1.0,
    mask: torch.Tensor | None = None,
    normalize: Literal["all", "masked", "sequence"] = "all",
) -> torch.Tensor:
    """Computes the mean of ``(hidden - coefficient * target)**2`` (Li et al., "The WMDP Benchmark", 2024; arXiv 2506.06278).

    Args:
        hidden: ``[..., d]`` float; gradient.
        target: ``[d]``, the misdirection, or ``[..., d]``, the frozen activations; no gradient.
        coefficient: factor of the target.
        mask: ``[...]`` bool, True counts; None counts everything.
        normalize: what the mean runs over. ``all``: every element, masked ones included (as published). ``masked``: counted tokens.
            ``sequence``: the counted tokens of each sequence (the last leading dimension), then the sequences that have any.

    Returns:
        A scalar in float32 (float64 for float64 hidden states); 0 where nothing counts.

    Dtypes: float32, bfloat16, float16 or float64 for either tensor. The arithmetic is float32 at least, and the gradient takes the
    dtype of ``hidden``. The forward computes it and the backward scales it in place, so a second backward raises. With ``masked`` and
    ``sequence``, masked tokens have no influence and zero gradient, even where they hold NaN. Inside activation checkpointing, name
    ``torch.ops.undo.rmu_loss.default`` as an op to be saved.

    Memory: the gradient (for float16 in float32, because it may exceed float16's range until a loss scale is applied) and a few
    floats per token. Rows without a common stride, and a float64 target ``[..., d]``, are copied. Plain PyTorch (float64, or no
    kernel for the device) allocates several arrays like ``hidden``.

    Raises:
        ValueError: a wrong shape, dtype, device or value.
    """
    checks.float_tensor("hidden", hidden, "[..., d]")
    checks.float_tensor("target", target, "[d] or [..., d]")
    if target.shape not in (hidden.shape, hidden.shape[-1:]):
        checks.fail("target", f"shape {tuple(target.shape)}", f"{tuple(hidden.shape[-1:])} or {tuple(hidden.shape)}")
    checks.same_device("target", target, hidden)
    checks.number("coefficient", coefficient, "a finite number")
    checks.choice("normalize", normalize, ("all", "masked", "sequence"))
    if mask is not None:
        checks.per_token("mask", mask, hidden.shape[:-1], "bool", hidden.device)
    elif normalize != "all":
        mask = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    if normalize == "sequence" and hidden.ndim < 2:
        checks.fail("hidden", f"shape {tuple(hidden.shape)}", "[..., tokens, d] with normalize='sequence'")
    width = hidden.shape[-1]
    if not width:
        checks.fail("hidden", f"shape {tuple(hidden.shape)}", "[..., d] with d >= 1")
    wide = hidden.dtype == torch.float64
    factor = token_factor(mask, normalize, torch.float64 if wide else torch.float32)
    factor = None if factor is None else factor.reshape(-1)
    flat, target = hidden.reshape(-1, width), target.detach()
    target = target if target.ndim == 1 and hidden.ndim > 1 else target.reshape(-1, width)
    backend = "reference" if wide else choose("rmu_loss", hidden.device)
    if backend == "reference":
        return implementation_on("rmu_loss", backend)(flat, target, factor, float(coefficient))
    needs = torch.is_grad_enabled() and hidden.requires_grad
    return torch.ops.undo.rmu_loss(_dense(flat), _dense(target), factor, float(coefficient), needs, backend)[0]


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Returns ``tensor`` in float32 at most, with a contiguous last dimension."""
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def misdirection(width: int, seed: int, law: Literal["gaussian", "uniform"] = "gaussian") -> torch.Tensor:
    """Returns RMU's fixed direction, a unit vector ``[width]`` float32 on the CPU; a seed gives the same one on every machine.

    Args:
        width: hidden size.
        seed: an integer in [0, 2**64).
        law: of the entries before normalisation: gaussian (as published for UNDO) or uniform on (0, 1) (the original RMU).
    """
    checks.integer("width", width, "an integer in [1, 2**31)", 1, 2**31 - 1)
    checks.seed(seed)
    checks.choice("law", law, ("gaussian", "uniform"))
    return reference.rmu.misdirection(width, seed, law)
