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
    """Dtype of the model's weights in training."""
    return torch.float32 if precision == "float32" else torch.bfloat16


@torch.no_grad()
def convert_(model: nn.Module, precision: Precision) -> None:
    """Converts every floating-point parameter, also frozen and one-dimensional ones, to the dtype of the precision, in place.

    In a model with peft adapters, which convert between their own dtype and the model's, frozen parameters keep their dtype and
    bits.

    A parameter that is not contiguous (a transposed or sliced view) gets contiguous memory of its own, so that optimizers and
    checkpoints treat it exactly as its contiguous copy; it then no longer shares memory with the tensor that it was a view of.
    Norms are converted too: a norm in float32 would promote the hidden states after it (Llama multiplies in the weight's
    dtype), and the next bfloat16 ``Linear`` would raise an error. Buffers keep their dtype, because rotary frequencies in
    bfloat16 cannot tell distant positions apart. Tied weights stay tied.
    """
    dtype, keeps = weight_dtype(precision), has_adapters(model)
    for parameter in model.parameters():
        if parameter.is_floating_point() and not (keeps and not parameter.requires_grad):
            parameter.grad = None
            parameter.data = parameter.data.to(
                dtype
            ).contiguous()  # `to` with a memory format does not copy a view that has the dtype already


@contextlib.contextmanager
def converted(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Context in which ``model`` is converted by :func:`convert_`; restores the original tensors on exit.

    Memory: where the dtype changes, the original and the converted parameter both exist inside the block.
    """
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    convert_(model, precision)
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


@torch.no_grad()
def random_bits(count: int, device: torch.device) -> torch.Tensor:
    """Draws 16 bits for each of ``count`` values from the device's global generator, int16."""
    # The generator's time depends on the number of draws, so one draw of 64 bits serves four values.
    return torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None).view(torch.int16)[:count]


@torch.no_grad()
def round_stochastically_(target: torch.Tensor, value: torch.Tensor, bits: torch.Tensor | None = None) -> None:
    """Writes float32 ``value`` into bfloat16 ``target`` with stochastic rounding.

    A value is rounded away from zero with a probability equal to the fraction of the bfloat16 spacing that truncation would
    lose. The rounding is unbiased, and exact for values that bfloat16 can represent; NaN and infinity are kept, and a value
    beyond the largest bfloat16 becomes infinite. ``bits`` are :func:`random_bits`, drawn here if None; overwrites ``value``.
    Temporaries: 6 bytes per element, 11 on a GPU or if a value is not finite.
    """
    bits = random_bits(value.numel(), value.device) if bits is None else bits
    drawn = bits.view(value.shape).to(torch.int32).bitwise_and_(0xFFFF)
    # On a GPU, `isfinite` would wait for the device; on a CPU a sum is cheaper than a mask.
    nan = None if value.device.type == "cpu" and math.isfinite(value.sum()) else value.isnan()
    # Floats are sign and magnitude: random bits added to the dropped half carry into the kept half with the wanted probability.
    value.view(torch.int32).add_(drawn).bitwise_and_(-(1 << 16))
    target.copy_(value if nan is None else value.masked_fill_(nan, math.nan))  # adding to the bits of a NaN may overflow


@contextlib.contextmanager
def seeded(device: torch.device, *key: int) -> Iterator[None]:
    """Context in which the device's global generator is seeded from ``key`` alone; restores its state on exit."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
    with rewound(device) as generator:
        generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def rewound(device: torch.device) -> Iterator[torch.Generator]:
    """Context that yields the device's global generator and restores its state on exit, so that later code draws the same."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    before = generator.get_state()
    try:
        yield generator
    finally:
        generator.set_state(before)
