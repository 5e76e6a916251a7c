"""In-place noise on CPUs: ``csrc/noise_kernels.h`` over all segments in one parallel region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from undo_kernels.cpu.extension import kernels
from undo_kernels.cpu.instruction_set import vectors
from undo_kernels.library.backends import register
from undo_kernels.noise_segments import Segment, elements
from undo_kernels.record import Call, record, recording
from undo_kernels.reference.noise import elements_in_torch


@register("noise_", "cpu")
@torch.no_grad()
@elements_in_torch
def noise_(segments: Sequence[Segment], seed: int, stochastic_rounding: bool) -> torch.Tensor:
    """Computes :func:`undo_kernels.reference.noise.noise_` bit for bit; uses 24 bytes of memory per 2**16 elements."""
    form = vectors()
    if recording():
        record(Call("noise_", "cpu", "inplace", form, len(segments), elements(segments)))
    sums = kernels.noise(form, [_c(segment) for segment in segments], seed, stochastic_rounding)
    return torch.tensor(sums, dtype=torch.float64)


def _c(s: Segment) -> Any:
    count = s.tensor.numel()
    dtype, law = getattr(kernels.Type, str(s.tensor.dtype).removeprefix("torch.")), getattr(kernels.Law, s.law)
    return kernels.Segment(s.tensor.data_ptr(), count, dtype, law, s.hashed, s.keep, s.scale, s.first, s.run or count, s.stride)
