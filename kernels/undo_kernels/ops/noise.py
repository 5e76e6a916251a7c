"""In-place parameter noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from undo_kernels.library.noise import add_noise_
from undo_kernels.noise_segments import Segment, amplitude
from undo_kernels.ops import checks
from undo_kernels.ops.noise_rules import NoiseRule, Parameter, Policy, Setting, Toward, describe, targets
from undo_kernels.ops.sharding import Piece, add_over_shards, local_of, local_pieces


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

    ``N`` of an element depends only on the seed, the parameter's canonical name and the element's index in it (Philox-4x32-10). It
    does not depend on device, sharding, block size, dtype, order of the parameters or number of threads. Tensors of two and more
    dimensions get ``N``. Those of one or none (norms, biases, scales) get no noise and shrink toward ``toward``. Tied parameters get
    noise once, under the first of their names. :func:`undo_core.noise_` knows for a Hugging Face model which parameters are not
    matrices of a product, and what they shrink toward.

    Args:
        tensors: a module, of which the parameters that require a gradient get noise (as published), or ``{name: tensor}``. The shards
            of a ``DTensor`` get the bits of the whole tensor, in any sharding.
        alpha: strength, in [0, 1].
        beta: scale of the noise, >= 0.
        seed: in [0, 2**64).
        law: distribution of ``N``. Xavier's fans come from the full shape: those of a matrix are its extents. Further dimensions are a
            receptive field (convolutions; any tensor of a mapping), or count matrices ``[..., out, in]`` (a module's stacked experts).
        std: standard deviation of the normal law, >= 0; only for that law.
        toward: what the parameters without noise shrink toward: a number, ``{name: target}``, or a function of name and tensor. A
            target is a number, or a tensor of the full parameter's shape with a target for each element.
        rules: other settings for some parameters; later rules win.
        stochastic_rounding: whether 16-bit parameters are rounded stochastically, without bias; None: they are.

    Memory: nothing of the size of a tensor, except a copy of a non-contiguous tensor, one at a time.

    Raises:
        ValueError: an argument is wrong, a tensor is not a float tensor, a tensor holds an element twice (``expand``), or two tensors
            share memory. Nothing is changed then.
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
    found: Mapping[str, tuple[torch.Tensor, Parameter]] | None = None,
    **options: Any,
) -> dict[str, tuple[Setting, torch.Tensor]]:
    """Applies :func:`noise_` and returns, for each tensor, its setting and its sums of squares, ``[3]`` float64.

    The sums are of theta before, of the scaled noise, and of theta after. They cover the local shards, or with ``whole_sums``, on which
    all ranks must agree, the whole tensors. ``found`` replaces what :func:`undo_kernels.ops.noise_rules.describe` finds in ``tensors``.
    """
    if not isinstance(rules, Sequence):
        checks.fail("rules", type(rules).__name__, "a sequence of NoiseRule")
    policy = Policy(**options, rules=tuple(rules))
    checks.seed(seed)
    rounding = stochastic_rounding is None or checks.flag("stochastic_rounding", stochastic_rounding)
    found = describe(tensors) if found is None else found
    pieces = {name: _pieces(name, tensor) for name, (tensor, _) in found.items()}
    settings = policy.settings({name: parameter for name, (_, parameter) in found.items()}, targets(toward, found))
    sums = {name: torch.zeros(3, dtype=torch.float64, device=local_of(tensor).device) for name, (tensor, _) in found.items()}

    def noise(segments: list[Segment]) -> None:
        for piece, sums_of_piece in zip(segments, add_noise_(segments, seed, rounding), strict=True):
            sums[piece.name] += sums_of_piece

    devices: dict[torch.device, list[Segment]] = {}
    scattered = [name for name, (tensor, _) in found.items() if not local_of(tensor).is_contiguous()]
    for name, parts in pieces.items():
        for view, *where in parts if name not in scattered else ():
            devices.setdefault(view.device, []).append(segment(name, view, settings[name], *where))
    for segments in devices.values():
        noise(segments)
        for piece in segments:
            torch.autograd.graph.increment_version(piece.tensor)  # a graph that has saved it must notice
    for name in scattered:
        local = local_of(found[name][0]).detach()
        copy = local.contiguous()
        if copied := [segment(name, view, settings[name], *where) for view, *where in local_pieces(name, found[name][0], copy)]:
            noise(copied)
            local.copy_(copy)
    if whole_sums:
        for name, (tensor, _) in found.items():
            add_over_shards(tensor, sums[name])
    return {name: (settings[name], sums[name]) for name in found}


def segment(name: str, view: torch.Tensor, setting: Setting, first: int = 0, run: int = 0, stride: int = 0) -> Segment:
    """Returns a parameter, or a piece of it, as the kernels take it."""
    return Segment(view, name, setting.law, setting.keep, setting.scale, first, run, stride, setting.target)


def _pieces(name: str, tensor: torch.Tensor) -> list[Piece]:
    if tensor.is_meta:
        checks.fail(f"tensors[{name!r}]", "a meta tensor, whose values are elsewhere (offloaded)", "a tensor in memory")
    if tensor.dtype not in checks.FLOATS:
        checks.fail(f"tensors[{name!r}]", f"{tensor.dtype}, shape {tuple(tensor.shape)}", "a float tensor")
    local = local_of(tensor)
    if local.is_contiguous():
        return local_pieces(name, tensor)
    return local_pieces(name, tensor, torch.empty(local.shape, dtype=local.dtype, device="meta"))


def replay(
    name: str,
    shape: Sequence[int],
    *,
    seed: int,
    law: Literal["xavier_uniform", "xavier_normal", "normal"] = "xavier_uniform",
    std: float | None = None,
    stacked: bool = False,
) -> torch.Tensor:
    """Returns ``N`` of a whole parameter, for audit: ``shape``, float64, on the CPU; 8 bytes per element.

    Args:
        name: canonical name of the parameter.
        shape: full shape, of at least two dimensions for Xavier's laws.
        seed: in [0, 2**64).
        law: of ``N``.
        std: of the normal law.
        stacked: whether further dimensions count matrices; see :func:`noise_`.
    """
    checks.text("name", name, "the canonical name of a parameter")
    checks.seed(seed)
    checks.flag("stacked", stacked)
    Policy(1.0, 1.0, law, std)
    wanted = "two or more dimensions with Xavier's laws and with stacked, and no empty one"
    shape = checks.sizes("shape", shape, wanted)
    if (len(shape) < 2 and (law != "normal" or stacked)) or not math.prod(shape):
        checks.fail("shape", shape, wanted)
    drawn = torch.zeros(shape, dtype=torch.float64)
    kind = "uniform" if law == "xavier_uniform" else "normal"
    add_noise_([Segment(drawn, name, kind, 0.0, amplitude(law, shape, std, stacked=stacked))], seed, False)
    return drawn
