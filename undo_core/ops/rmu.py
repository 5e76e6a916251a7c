"""RMU: the loss that pushes activations toward a target."""

from __future__ import annotations

from typing import Literal

import torch
from undo_kernels import reference
from undo_kernels.library import implementation

from undo_core.ops import checks


def rmu_loss(
    hidden: torch.Tensor,
    target: torch.Tensor,
    *,
    coefficient: float = 1.0,
    mask: torch.Tensor | None = None,
    normalize: Literal["all", "masked", "sequence"] = "all",
) -> torch.Tensor:
    """Mean of ``(hidden - coefficient * target)**2`` (Li et al., "The WMDP Benchmark", 2024; arXiv 2506.06278).

    Args:
        hidden: ``[..., d]`` float; gradient.
        target: ``[d]``, the misdirection, or ``[..., d]``, the frozen activations; no gradient.
        coefficient: factor on the target.
        mask: ``[...]`` bool, True counts; None counts everything.
        normalize: ``all``: over every element, masked ones included (as published); ``masked``: over counted tokens;
            ``sequence``: over each sequence's counted tokens (the last leading dimension), then over the sequences that have any.

    Returns:
        A scalar in float32 (float64 for float64 hidden states); 0 where nothing counts. Memory: two arrays like ``hidden``.

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
    return implementation("rmu_loss", hidden.device)(hidden, target, float(coefficient), mask, normalize)


def misdirection(width: int, seed: int, law: Literal["gaussian", "uniform"] = "gaussian") -> torch.Tensor:
    """RMU's fixed direction: a unit vector ``[width]`` float32 on the CPU, the same from a seed on every machine.

    Args:
        width: hidden size.
        seed: any integer in [0, 2**64).
        law: of the entries before normalisation: gaussian (as published for UNDO) or uniform on (0, 1) (the original RMU).
    """
    if width < 1:
        checks.fail("width", width, "an integer >= 1")
    checks.choice("law", law, ("gaussian", "uniform"))
    return reference.rmu.misdirection(width, seed, law)
