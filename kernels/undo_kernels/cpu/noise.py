"""In-place noise on CPUs: ``csrc/noise_rows.h`` over all segments in one parallel region."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from undo_kernels.library import register
from undo_kernels.record import Call, record, recording
from undo_kernels.segment import Segment, elements

try:
    from undo_kernels import _cpu
except ImportError:
    _cpu = None  # marked unavailable by the package

INSTRUCTION_SET = ""  # avx512, avx2 or plain; empty for the best of this machine


@register("noise_", "cpu")
@torch.no_grad()
def noise_(segments: Sequence[Segment], seed: int, stochastic_rounding: bool) -> torch.Tensor:
    """:func:`undo_kernels.reference.noise.noise_`, bit for bit; 24 bytes of memory for each 2**16 elements."""
    if recording():
        form = _cpu.instruction_set(INSTRUCTION_SET)
        record(Call("noise_", "cpu", "inplace", form, len(segments), elements(segments)))
    sums = _cpu.noise(INSTRUCTION_SET, [_c(segment) for segment in segments], seed, stochastic_rounding)
    return torch.tensor(sums, dtype=torch.float64)


def _c(s: Segment) -> _cpu.Segment:
    count = s.tensor.numel()
    dtype, law = getattr(_cpu.Type, str(s.tensor.dtype).removeprefix("torch.")), getattr(_cpu.Law, s.law)
    return _cpu.Segment(s.tensor.data_ptr(), count, dtype, law, s.hashed, s.keep, s.scale, s.first, s.run or count, s.stride)
