"""In-place noise as a ``torch.library`` op: ``undo::noise_`` changes all tensors of a device in one call.

The arguments are the fields of :class:`~undo_kernels.noise_segments.Segment`, one list each. The op returns ``[segments, 3]`` float64:
the sums of squares of theta before, of the scaled noise, and of theta after. It has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from undo_kernels.library.backends import choose, implementation_on
from undo_kernels.noise_segments import Segment

torch.library.define(
    "undo::noise_",
    "(Tensor(a!)[] tensors, Tensor?[] targets, *, str[] names, str[] laws, float[] keep, float[] scale, int[] first, int[] run, "
    "int[] stride, int seed, bool stochastic_rounding, str backend) -> Tensor",
)


@torch.library.impl("undo::noise_", ("cpu", "cuda"))
def _noise_(
    tensors: list[torch.Tensor],
    targets: list[torch.Tensor | None],
    *,
    names: list[str],
    laws: list[str],
    keep: list[float],
    scale: list[float],
    first: list[int],
    run: list[int],
    stride: list[int],
    seed: int,
    stochastic_rounding: bool,
    backend: str,
) -> torch.Tensor:
    fields = zip(tensors, names, laws, keep, scale, first, run, stride, targets, strict=True)
    return implementation_on("noise_", backend)([Segment(*values) for values in fields], seed % 2**64, stochastic_rounding)


@torch.library.register_fake("undo::noise_")
def _fake(tensors: list[torch.Tensor], targets: list[torch.Tensor | None], **options: object) -> torch.Tensor:
    return tensors[0].new_empty((len(tensors), 3), dtype=torch.float64)


def add_noise_(segments: Sequence[Segment], seed: int, stochastic_rounding: bool) -> torch.Tensor:
    """Adds noise to segments of one device in place, on the device's backend; returns their sums of squares."""
    return torch.ops.undo.noise_(
        [s.tensor for s in segments],
        [s.target for s in segments],
        names=[s.name for s in segments],
        laws=[s.law for s in segments],
        keep=[s.keep for s in segments],
        scale=[s.scale for s in segments],
        first=[s.first for s in segments],
        run=[s.run for s in segments],
        stride=[s.stride for s in segments],
        seed=seed if seed < 2**63 else seed - 2**64,  # the op's integers are signed
        stochastic_rounding=stochastic_rounding,
        backend=choose("noise_", segments[0].tensor.device),
    )
