"""Precision of a training stage: the dtype of the model's weights, and how a float32 value becomes bfloat16."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from undo_core.models.adapters import has_adapters

Precision = Literal["float32", "bfloat16-master", "bfloat16-stochastic", "bfloat16"]
PRECISIONS = ("float32", "bfloat16-master", "bfloat16-stochastic", "bfloat16")


def weight_dtype(precision: Precision) -> torch.dtype:
    """The dtype of the weights in the model."""
    return torch.float32 if precision == "float32" else torch.bfloat16


@torch.no_grad()
def convert_(model: nn.Module, precision: Precision) -> None:
    """Put every floating-point parameter in the precision's dtype, in place, frozen and one-dimensional ones too.

    In a model with adapters of peft, which convert between their own dtype and the model's, the frozen parameters keep their bits.

    A parameter that is not contiguous (a transposed or sliced view) gets contiguous memory of its own: optimizers and checkpoints
    then treat it exactly as they would its contiguous copy, and the tensor that it was a view of no longer follows it.
    A norm kept in float32 would promote the hidden states behind it (Llama multiplies in the weight's dtype), which a bfloat16
    ``Linear`` then refuses. Buffers keep their dtype: rotary frequencies lose positions in bfloat16. Tied weights stay tied.
    """
    dtype, keeps = weight_dtype(precision), has_adapters(model)
    for parameter in model.parameters():
        if parameter.is_floating_point() and not (keeps and not parameter.requires_grad):
            parameter.grad = None
            parameter.data = parameter.data.to(
                dtype
            ).contiguous()  # `to` with a memory format leaves a view of this dtype as it is


@contextlib.contextmanager
def converted(model: nn.Module, precision: Precision) -> Iterator[None]:
    """:func:`convert_` inside the ``with`` block, the same tensors as before afterwards; both exist meanwhile where the dtype differs."""
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    convert_(model, precision)
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


@torch.no_grad()
def round_stochastically_(target: torch.Tensor, value: torch.Tensor) -> None:
    """Write float32 ``value`` into bfloat16 ``target``, away from zero with the probability of the part that is lost.

    Without bias, exact on the grid; NaN and infinity are kept, and beyond the largest bfloat16 the result is infinite. Draws from the
    global generator of the device; ``value`` is overwritten. Temporaries: 6 bytes an element, 11 on a GPU or where a value is no number.
    """
    # A generator's time goes by the draw: one of 64 bits serves four values.
    drawn = torch.empty(-(-value.numel() // 4), dtype=torch.int64, device=value.device).random_(-(2**63), None)
    drawn = drawn.view(torch.int16)[: value.numel()].view(value.shape).to(torch.int32).bitwise_and_(0xFFFF)
    # A GPU's answer would have to be waited for; on a CPU a sum is cheaper than a mask.
    nan = None if value.device.type == "cpu" and math.isfinite(value.sum()) else value.isnan()
    # Sign and magnitude: 16 random bits added below the last kept one carry into it with the wanted probability.
    value.view(torch.int32).add_(drawn).bitwise_and_(-(1 << 16))
    target.copy_(value if nan is None else value.masked_fill_(nan, math.nan))  # the sum of a NaN's bits may wrap


@contextlib.contextmanager
def seeded(device: torch.device, *key: int) -> Iterator[None]:
    """The device's global generator in a state that ``key`` alone gives, and afterwards as it was."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
    with rewound(device) as generator:
        generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def rewound(device: torch.device) -> Iterator[torch.Generator]:
    """The device's global generator, after the ``with`` block as it was before: what comes next draws the same again."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    before = generator.get_state()
    try:
        yield generator
    finally:
        generator.set_state(before)
