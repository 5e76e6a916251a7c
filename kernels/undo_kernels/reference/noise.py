"""In-place noise, ``theta <- (1 - alpha) * theta + alpha * beta * N``; every backend reproduces these roundings bit for bit.

The arithmetic is in float32, also for 16-bit parameters. ``w`` is the element's 32-bit Philox word, and ``rn`` is one rounding
to float32, never contracted into a fused multiply-add::

    uniform   theta' = rn(rn(k * theta) + rn(c * n)),  n = 2 * (w >> 8) + 1 - 2**24, an odd integer, exact, mean zero
    normal    theta' = rn(rn(k * theta) + rn(c * g))
    constant  theta' = rn(rn(k * theta) + c)
    elements  theta' = rn(rn(k * theta) + c_i),  c_i = alpha * target_i, rounded like c

``k`` and ``c`` are a segment's ``keep`` and ``scale``, computed in float64 and rounded once. ``g`` is Box-Muller on the lanes
(0, 1) and (2, 3) of a Philox block:
``u = (2 * (w_even >> 9) + 1) * 2**-24``, ``v = n_odd * 2**-24``, ``r = sqrt(-2 * log(u))``, even lanes ``rn(r * cos(pi * v))``,
odd lanes ``rn(r * sin(pi * v))``. Logarithm, sine and cosine are the polynomials below in Horner form, each product and sum
rounded; the square root is correctly rounded.

Stochastic rounding to 16 bits uses the word of stream 1: it rounds up with a probability equal to the discarded fraction.
Temporaries: about 100 bytes per element for 2**16 elements at a time; nothing of the tensor's size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch

from undo_kernels.library.backends import register
from undo_kernels.noise_segments import Segment, elements
from undo_kernels.record import Call, record, recording
from undo_kernels.reference.philox import DRAW, ROUND, words

Noise = Callable[[Sequence[Segment], int, bool], torch.Tensor]
BLOCK = 1 << 16

LOG = (0.3333333134651184, -0.24999989569187164, 0.20000708103179932, -0.1666848063468933, 0.14249935746192932)
LOG += (-0.12411050498485565, 0.11661511659622192, -0.115712009370327, 0.07149753719568253)
SIN = (3.1415927410125732, -5.167712688446045, 2.5501625537872314, -0.5992020964622498, 0.08100174367427826)
COS = (1.0, -4.934802055358887, 4.058707237243652, -1.335044503211975, 0.23132924735546112)
# LN2_HIGH has 15 significant bits, so that its product with an exponent is exact in float32.
LN2_HIGH, LN2_LOW = (0.693145751953125, 1.42860682030941723212e-6)


@register("noise_", "reference")
@torch.no_grad()
def noise_(segments: Sequence[Segment], seed: int, stochastic_rounding: bool) -> torch.Tensor:
    """Adds noise to every segment in place.

    Returns:
        ``[segments, 3]`` float64: sums of squares of theta before, of ``scale * N``, and of theta after.
    """
    if recording():
        record(Call("noise_", "reference", "inplace", "", len(segments), elements(segments)))
    sums = torch.zeros(len(segments), 3, dtype=torch.float64, device=segments[0].tensor.device)
    for row, segment in zip(sums, segments, strict=True):
        flat = segment.tensor.view(-1)
        for offset, index, count in segment.runs():
            for at in range(0, count, BLOCK):
                part = flat[offset + at : offset + min(at + BLOCK, count)]
                row += _noise_part(part, segment, index + at, seed, stochastic_rounding)
    return sums


def elements_in_torch(noise: Noise) -> Noise:
    """Makes a backend's ``noise_`` run segments of the law ``elements``, which are few and small, on the reference."""

    @functools.wraps(noise)
    def both(segments: Sequence[Segment], seed: int, stochastic_rounding: bool) -> torch.Tensor:
        rows: dict[bool, list[int]] = {False: [], True: []}
        for row, segment in enumerate(segments):
            rows[segment.law == "elements"].append(row)
        if not rows[True]:
            return noise(segments, seed, stochastic_rounding)
        sums = torch.zeros(len(segments), 3, dtype=torch.float64, device=segments[0].tensor.device)
        for here, chosen in rows.items():
            if chosen:
                part = (noise_ if here else noise)([segments[row] for row in chosen], seed, stochastic_rounding)
                sums[chosen] = part.to(sums.device)
        return sums

    return both


def _noise_part(part: torch.Tensor, segment: Segment, start: int, seed: int, stochastic: bool) -> torch.Tensor:
    before = part.double().square().sum()
    if segment.law == "elements":  # c_i is computed in float64 and rounded once, like c of a constant
        target = segment.target.detach().reshape(-1)[start : start + part.numel()]
        drawn, scale = target.to(part.device, torch.float64) * segment.scale, 1.0
    else:
        drawn, scale = standard(segment.law, seed, segment.hashed, start, part.numel(), part.device), segment.scale
    if part.dtype == torch.float64:
        added = drawn.double() * scale
        part.mul_(segment.keep).add_(added)
    else:
        keep, scale = torch.tensor([segment.keep, scale], dtype=torch.float64).float().tolist()
        added = drawn.float() * scale
        result = (part.float() * keep) + added
        if stochastic and part.dtype in (torch.bfloat16, torch.float16):
            word = words(seed, segment.hashed, ROUND, start, part.numel(), part.device)
            result = round_stochastically(result, part.dtype, word)
        part.copy_(result)
    return torch.stack([before, added.double().square().sum(), part.double().square().sum()])


def standard(law: str, seed: int, hashed: int, start: int, count: int, device: torch.device | str) -> torch.Tensor:
    """Returns ``n`` (uniform), ``g`` (normal) or 1 (constant) for the flat indices from ``start``, ``[count]`` float32."""
    if law == "constant":
        return torch.ones(count, dtype=torch.float32, device=device)
    if law == "uniform":
        return _odd_integer(words(seed, hashed, DRAW, start, count, device))
    first = start - start % 4
    lanes = words(seed, hashed, DRAW, first, (start + count - first + 3) // 4 * 4, device).view(-1, 2, 2)
    radius = square_root(_log(((lanes[..., 0] >> 9) * 2 + 1).float() * 2.0**-24) * -2.0)
    sine, cosine = _sincospi(_odd_integer(lanes[..., 1]) * 2.0**-24)
    return torch.stack([radius * cosine, radius * sine], dim=-1).view(-1)[start - first : start - first + count]


def round_stochastically(value: torch.Tensor, dtype: torch.dtype, word: torch.Tensor) -> torch.Tensor:
    """Rounds float32 values to a 16-bit ``dtype``, away from zero with a probability equal to the discarded fraction.

    Returns float32. Representable values, including subnormals, do not change. A result is infinite if and only if
    round-to-nearest would make it infinite.
    """
    info = torch.finfo(dtype)
    fraction_bits = -round(math.log2(info.eps))
    smallest = round(math.log2(info.smallest_normal))
    magnitude = value.abs()
    exponent = torch.frexp(magnitude).exponent - 1
    spacing = _power_of_two(exponent.clamp_min(smallest) - fraction_bits)
    quotient = magnitude.double() / spacing  # exact; float64 since 1 / spacing overflows float32 for bfloat16's subnormals
    low = quotient.floor()
    up = (word >> 8).double() * 2.0**-24 < quotient - low
    rounded = (low + up) * spacing
    nearest_is_finite = magnitude.to(dtype).isfinite()
    rounded = torch.where(nearest_is_finite, rounded.clamp_max(info.max), torch.full_like(rounded, math.inf))
    rounded = torch.where(value.isfinite(), rounded, magnitude.double())
    return torch.copysign(rounded, value.double()).float()


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _odd_integer(word: torch.Tensor) -> torch.Tensor:
    return ((word >> 8) * 2 + (1 - 2**24)).float()


def _horner(coefficients: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x
        value = value + coefficient
    return value


def _log(u: torch.Tensor) -> torch.Tensor:
    """Returns log of float32 ``u`` in (0, 1): ``u = m * 2**e``, ``m`` in [sqrt(1/2), sqrt(2)), and a polynomial in ``m - 1``."""
    bits = u.view(torch.int32)
    exponent = ((bits - 0x3F3504F3) >> 23).to(torch.int32)
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    square = f * f
    e = exponent.float()
    tail = f * square
    tail = tail * _horner(LOG, f)
    tail = tail + e * LN2_LOW
    tail = tail - square * 0.5
    return (tail + f) + e * LN2_HIGH


def square_root(x: torch.Tensor) -> torch.Tensor:
    """Returns the correctly rounded square root; torch's float32 one is not when MKL computes it.

    The float64 root can be rounded again safely: no root of a float32 is so near the middle of two float32 that the last bit
    matters.
    """
    return x.double().sqrt().float()


def _sincospi(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sine and cosine of ``pi * x`` for float32 ``x`` in (-1, 1)."""
    quadrant = torch.floor(x * 2.0 + 0.5)
    r = x - quadrant * 0.5
    square = r * r
    sine, cosine = r * _horner(SIN, square), _horner(COS, square)
    q = quadrant.to(torch.int64) & 3
    swapped = q & 1 == 1
    s = torch.where(swapped, cosine, sine)
    c = torch.where(swapped, sine, cosine)
    return torch.where(q >= 2, -s, s), torch.where((q == 1) | (q == 2), -c, c)
