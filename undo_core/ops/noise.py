"""In-place parameter noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from undo_kernels.library import implementation
from undo_kernels.segment import Segment, amplitude

from undo_core.ops import checks
from undo_core.ops.noise_rules import NoiseRule, Policy, Setting, Toward, describe, targets
from undo_core.ops.sharding import Piece, add_over_shards, is_sharded, local_of, local_pieces


def noise_(
    tensors: nn.Module | Mapping[str, torch.Tensor],
    *,
    alpha: float,
    beta: float,
    seed: int,
    law: Literal["xavier_uniform", "xavier_normal", "normal"] = "xavier_uniform",
    std: float | None = None,
    toward: Toward = 0.0,
    rules: Sequence[NoiseRule] = (),
    stochastic_rounding: bool | None = None,
) -> None:
    """``theta <- (1 - alpha) * theta + alpha * beta * N`` in place (arXiv 2506.06278, its only numbered equation).

    ``N`` of an element depends only on the seed, the parameter's canonical name and the element's index in it (Philox-4x32-10):
    not on device, sharding, block size, dtype, order of the parameters or number of threads. Tensors of two and more dimensions get
    ``N``; one-dimensional ones (norms, biases) get none and shrink toward ``toward``. Tied parameters are noised once, under the
    first of their names. :func:`undo_core.noise_` finds ``toward`` for a Hugging Face model.

    Args:
        tensors: a module, whose parameters that require a gradient are taken (as published), or ``{name: tensor}``. A ``DTensor``'s
            shards get the bits of the whole tensor, in any sharding.
        alpha: strength, in [0, 1].
        beta: scale of the noise, >= 0.
        seed: in [0, 2**64).
        law: of ``N``. Xavier's fans come from the full shape: of a matrix its extents; further dimensions are a receptive field
            (convolutions; any tensor of a mapping) or count matrices ``[..., out, in]`` (a module's stacked experts).
        std: of the normal law, >= 0; for that law alone.
        toward: what one-dimensional parameters shrink toward: a number, ``{name: number}``, or a function of name and tensor.
        rules: other settings for some parameters; later rules win.
        stochastic_rounding: of 16-bit parameters; None rounds them stochastically, which has no bias.

    Memory: nothing of a tensor's size.

    Raises:
        ValueError: an argument is wrong; a tensor is not a contiguous float tensor, or has no dimension and no rule with alpha=0; two
            tensors share a part of their memory. Nothing is changed.
    """
    apply(
        tensors,
        alpha=alpha,
        beta=beta,
        seed=seed,
        law=law,
        std=std,
        toward=toward,
        rules=rules,
        stochastic_rounding=stochastic_rounding,
        whole_sums=False,
    )


def apply(
    tensors: nn.Module | Mapping[str, torch.Tensor],
    *,
    seed: int,
    toward: Toward = 0.0,
    rules: Sequence[NoiseRule] = (),
    stochastic_rounding: bool | None = None,
    whole_sums: bool = True,
    **options: Any,
) -> dict[str, tuple[Setting, torch.Tensor]]:
    """:func:`noise_`; returns for each tensor what happened to it, and the sums of squares of theta before, of the noise as it
    was scaled and of theta after, ``[3]`` float64; of the shards here alone unless ``whole_sums``, which all ranks must agree on.
    """
    policy = Policy(**options, rules=tuple(rules))
    checks.seed(seed)
    found = describe(tensors)
    pieces = {name: _pieces(name, tensor) for name, (tensor, _) in found.items()}
    settings = policy.settings({name: parameter for name, (_, parameter) in found.items()}, targets(toward, found))
    devices: dict[torch.device, list[Segment]] = {}
    for name, parts in pieces.items():
        setting = settings[name]
        for view, first, run, stride in parts:
            segment = Segment(view, name, setting.law, setting.keep, setting.scale, first, run, stride)
            devices.setdefault(view.device, []).append(segment)
    rounding = True if stochastic_rounding is None else bool(stochastic_rounding)
    sums = {name: torch.zeros(3, dtype=torch.float64, device=local_of(tensor).device) for name, (tensor, _) in found.items()}
    for device, segments in devices.items():
        rows = implementation("noise_", device)(segments, seed, rounding)
        for segment, row in zip(segments, rows, strict=True):
            sums[segment.name] += row
            torch.autograd.graph.increment_version(segment.tensor)  # a graph that has saved it must notice
    if whole_sums:
        for name, (tensor, _) in found.items():
            add_over_shards(tensor, sums[name])
    return {name: (settings[name], sums[name]) for name in found}


def _pieces(name: str, tensor: torch.Tensor) -> list[Piece]:
    if tensor.is_meta:
        checks.fail(f"tensors[{name!r}]", "a meta tensor, whose values are elsewhere (offloaded)", "a tensor in memory")
    whole = is_sharded(tensor) or tensor.is_contiguous()
    if tensor.dtype not in checks.FLOATS or not whole:
        got = f"{tensor.dtype}, shape {tuple(tensor.shape)}, {'' if whole else 'not '}contiguous"
        checks.fail(f"tensors[{name!r}]", got, "a contiguous float tensor")
    return local_pieces(name, tensor)


def replay(
    name: str,
    shape: Sequence[int],
    *,
    seed: int,
    law: Literal["xavier_uniform", "xavier_normal", "normal"] = "xavier_uniform",
    std: float | None = None,
    stacked: bool = False,
) -> torch.Tensor:
    """``N`` of a whole parameter, for audit: ``shape``, float64, on the CPU; 8 bytes an element.

    Args:
        name: canonical name of the parameter.
        shape: full shape, of at least two dimensions for Xavier's laws.
        seed: in [0, 2**64).
        law: of ``N``.
        std: of the normal law.
        stacked: whether further dimensions count matrices; see :func:`noise_`.
    """
    checks.seed(seed)
    Policy(1.0, 1.0, law, std)
    if (len(shape) < 2 and law != "normal") or not math.prod(shape):
        checks.fail("shape", tuple(shape), "two or more dimensions with Xavier's laws, and no empty one")
    drawn = torch.zeros(tuple(shape), dtype=torch.float64)
    kind = "uniform" if law == "xavier_uniform" else "normal"
    implementation("noise_", drawn.device)(
        [Segment(drawn, name, kind, 0.0, amplitude(law, shape, std, stacked=stacked))], seed, False
    )
    return drawn
