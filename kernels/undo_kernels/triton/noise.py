"""In-place noise on GPUs: one launch for all parameters of a device and dtype, equal to the reference bit for bit.

    theta <- rn(rn(k * theta) + rn(c * N))

A program processes ``BLOCKS`` times ``BLOCK`` elements of one segment, which it finds by bisection in a table with 120 bytes
per segment. It iterates over the segment's Philox blocks; each is computed once and gives all four lanes. If segment, runs and
memory are aligned to Philox blocks, memory is accessed 16 bytes at a time; other segments, and ends, use masks.

Fused multiply-adds would change the rounding, so launches set ``enable_fp_fusion=False``; the sums of squares use explicit
ones. bfloat16 is converted to and from float32 with integer operations.

Bytes per element: 8 for float32, 4 for bfloat16. Philox takes 20 wide products and 20 three-input logical operations per block
of four elements; ``python -m undo_kernels.triton.aot sm_90`` prints each form's registers and 16-byte accesses. Rejected:
joining words into element order before use, and one Philox block per 16 bytes of 16-bit elements; both convert layouts through
shared memory.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from undo_kernels.library.backends import register
from undo_kernels.noise_segments import Segment, elements
from undo_kernels.record import Call, record, recording
from undo_kernels.reference import noise as reference
from undo_kernels.triton import tile_table
from undo_kernels.triton.device import current

INTERPRETED = triton.knobs.runtime.interpret
BLOCK, BLOCKS, BLOCK_P, THREADS = 1024, 8, 256, 128  # a thread processes 16 bytes of a block, 32 for 32-bit types
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}

# Columns of the table: int64, or the bits of a float64.
_COLUMNS = (
    "begin", "address", "count", "first", "run", "stride", "width", "total", "even", "hash", "seed", "keep", "scale", "law", "row",
)  # fmt: skip
_BEGIN, _ADDRESS, _COUNT, _FIRST, _RUN, _STRIDE, _WIDTH, _TOTAL, _EVEN, _HASH, _SEED, _KEEP, _SCALE, _LAW, _ROW = map(
    tl.constexpr, range(len(_COLUMNS))
)
_FIELDS = tl.constexpr(len(_COLUMNS))
_LAWS = {"uniform": 0, "normal": 1, "constant": 2}
_UNIFORM, _NORMAL = tl.constexpr(0), tl.constexpr(1)

_M0, _M1, _W0, _W1 = map(tl.constexpr, (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85))
_LOG, _SIN, _COS = map(tl.constexpr, (reference.LOG, reference.SIN, reference.COS))
_LN2_HIGH, _LN2_LOW = tl.constexpr(reference.LN2_HIGH), tl.constexpr(reference.LN2_LOW)


@register("noise_", "triton")
@torch.no_grad()
@reference.elements_in_torch
def noise_(segments: Sequence[Segment], seed: int, stochastic_rounding: bool) -> torch.Tensor:
    """Adds noise to every segment in place.

    Returns:
        ``[segments, 3]`` float64: sums of squares of theta before, of ``scale * N``, and of theta after. Squares are taken in
        float32 (float64 for float64 parameters), which is valid for magnitudes from 1e-19 to 1e19.

    Memory: 120 bytes per segment, and 12 (float64: 24) per 8192 elements.
    """
    first = segments[0].tensor.device
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for row, segment in enumerate(segments):
        device = segment.tensor.device
        if device.type != ("cpu" if INTERPRETED else "cuda"):
            wanted = "CPU tensors under TRITON_INTERPRET=1" if INTERPRETED else "a GPU or TRITON_INTERPRET=1"
            raise RuntimeError(f"backend: got triton for tensors on {device}, wanted {wanted}")
        if segment.tensor.numel():
            groups.setdefault((device, segment.tensor.dtype), []).append(row)
    if recording():
        form = "interpreted" if INTERPRETED else ""
        record(Call("noise_", "triton", "inplace", form, len(segments), elements(segments)))
    sums = {device: torch.zeros(len(segments), 3, dtype=torch.float64, device=device) for device, _ in groups}
    for (device, dtype), rows in groups.items():
        chosen, target = [(row, segments[row]) for row in rows], tile_table.target_of(device)
        launch(chosen, device, dtype, seed, stochastic_rounding, sums[device], target)
    total = sums.pop(first, None)
    if total is None:
        total = torch.zeros(len(segments), 3, dtype=torch.float64, device=first)
    for others in sums.values():
        total += others.to(first)
    return total


def warps(target: str) -> int:
    """Returns the warps of a program; an AMD warp has 64 threads."""
    return THREADS // (64 if target.startswith("gfx") else 32)


def launch(
    chosen: list[tuple[int, Segment]],
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    stochastic: bool,
    sums: torch.Tensor,
    target: str,
) -> None:
    """Launches the kernels for the parameters of one device and dtype, given with their rows of ``sums``."""
    table, programs = _table(chosen, seed)
    wide = dtype == torch.float64
    stochastic = stochastic and dtype in (torch.bfloat16, torch.float16)
    options = {"num_warps": warps(target), "num_stages": 1, "enable_fp_fusion": False}
    with current(device):
        if device.type == "cuda":
            table = table.pin_memory().to(device, non_blocking=True)
        partial = torch.empty(programs, 3, dtype=torch.float64 if wide else torch.float32, device=device)
        noise_blocks[(programs,)](
            table, partial, len(chosen), DTYPE=DTYPES[dtype], STOCHASTIC=stochastic, BLOCK=BLOCK, BLOCKS=BLOCKS, **options
        )
        noise_sums[(len(chosen),)](table, partial, sums, programs, len(chosen), WIDE=wide, BLOCK_P=BLOCK_P, **options)


def _table(chosen: list[tuple[int, Segment]], seed: int) -> tuple[torch.Tensor, int]:
    """Returns the table of segments, ``[segments, columns]`` int64 on the CPU, and the number of programs."""
    lines, programs = [], 0
    for row, segment in chosen:
        count, first, stride = segment.tensor.numel(), segment.first, segment.stride
        run = segment.run or count
        address = segment.tensor.data_ptr()
        even = address % 16 == 0 and first % 4 == 0
        if run >= count:
            width = total = (first % 4 + count + 3) // 4
        elif even := even and run % 4 == 0 and stride % 4 == 0:
            width, total = run // 4, (count + 3) // 4
        else:  # as many Philox blocks as a run can touch
            width = (run + 6) // 4
            total = width * (-(-count // run))
        values: dict[str, Any] = {
            "begin": programs, "address": address, "count": count, "first": first, "run": run, "stride": stride, "width": width,
            "total": total, "even": even, "hash": _signed(segment.hashed), "seed": _signed(seed), "keep": _bits(segment.keep),
            "scale": _bits(segment.scale), "law": _LAWS[segment.law], "row": row,
        }  # fmt: skip
        lines.append([int(values[column]) for column in _COLUMNS])
        programs += -(-total // (BLOCK // 4 * BLOCKS))
    return torch.tensor(lines, dtype=torch.int64), programs


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


@triton.jit
def philox(block, hashed, seed, STREAM: tl.constexpr):
    """Returns the four Philox-4x32-10 words, uint32, of int64 ``block``; 64-bit products give the high halves."""
    c0, c1 = block.to(tl.uint32), ((block >> 32) & 0xFFFFFF | (STREAM << 24)).to(tl.uint32)
    c2, c3 = hashed.to(tl.uint32), (hashed >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * tl.full([], _M0, tl.uint64)
        p1 = c2.to(tl.uint64) * tl.full([], _M1, tl.uint64)
        c0, c1, c2, c3 = (
            (p1 >> 32).to(tl.uint32) ^ c1 ^ k0,
            p1.to(tl.uint32),
            (p0 >> 32).to(tl.uint32) ^ c3 ^ k1,
            p0.to(tl.uint32),
        )
        k0, k1 = k0 + tl.full([], _W0, tl.uint32), k1 + tl.full([], _W1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def odd_integer(word):
    """``2 * (w >> 8) + 1 - 2**24``, int32."""
    return ((word >> 8) * 2).to(tl.int32) - 16777215


@triton.jit
def horner(x, COEFFICIENTS: tl.constexpr, COUNT: tl.constexpr):
    value = x * COEFFICIENTS[COUNT - 1] + COEFFICIENTS[COUNT - 2]
    for i in tl.static_range(COUNT - 2):
        value = value * x + COEFFICIENTS[COUNT - 3 - i]
    return value


@triton.jit
def log(u):
    """The reference's logarithm of float32 ``u`` in (0, 1)."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    e = exponent.to(tl.float32)
    tail = f * square * horner(f, _LOG, 9) + e * _LN2_LOW - square * 0.5
    return (tail + f) + e * _LN2_HIGH


@triton.jit
def sincospi(n):
    """The reference's sine and cosine of ``pi * n / 2**24`` for odd ``n``: its quadrant and remainder are exact in integers."""
    q = (n + 4194304) >> 23
    r = (n - (q << 23)).to(tl.float32) * 5.9604644775390625e-08
    square = r * r
    sine, cosine = r * horner(square, _SIN, 5), horner(square, _COS, 5)
    swapped = (q & 1) == 1
    s, c = tl.where(swapped, cosine, sine), tl.where(swapped, sine, cosine)
    return tl.where((q & 2) != 0, -s, s), tl.where(((q + 1) & 2) != 0, -c, c)


@triton.jit
def box_muller(even, odd):
    """Computes two standard normals from two words, like the reference."""
    u = ((even >> 9) * 2 + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    radius = tl.sqrt_rn(log(u) * -2.0)
    sine, cosine = sincospi(odd_integer(odd))
    return radius * cosine, radius * sine


@triton.jit
def standard(block, law, hashed, seed):
    """Returns ``n``, ``g`` or 1 for the four lanes of Philox blocks, float32."""
    n0 = tl.full(block.shape, 1.0, tl.float32)
    n1, n2, n3 = n0, n0, n0
    if law <= _NORMAL:
        w0, w1, w2, w3 = philox(block, hashed, seed, STREAM=0)
        if law == _UNIFORM:
            n0, n1 = odd_integer(w0).to(tl.float32), odd_integer(w1).to(tl.float32)
            n2, n3 = odd_integer(w2).to(tl.float32), odd_integer(w3).to(tl.float32)
        else:
            n0, n1 = box_muller(w0, w1)
            n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def narrow_bfloat16(value, word, STOCHASTIC: tl.constexpr):
    """Rounds float32 to the bits of bfloat16, uint16: to nearest even, or up if the 16 lost bits exceed the word's high 16.

    From the largest finite bfloat16 on it always rounds to nearest, so a result is infinite exactly if round-to-nearest makes
    it so. NaNs become the smallest quiet NaN; arithmetic yields no other kind.
    """
    bits = value.to(tl.uint32, bitcast=True)
    size = tl.minimum(bits & 0x7FFFFFFF, 0x7FC00000)
    half = 0x7FFF + ((size >> 16) & 1)
    more = tl.where(size > 0x7F7F0000, 0x8000, (word >> 16) ^ 0xFFFF) if STOCHASTIC else half
    return (((size + more) >> 16) | ((bits >> 16) & 0x8000)).to(tl.uint16)


@triton.jit
def narrow_float16(value, word):
    """Rounds float32 to the bits of float16, uint16, stochastically: compares the 13 lost bits with the word's high 13.

    Below 2**-14 the spacing is 2**-24 and more bits are lost; the fraction is compared in float32 there, which represents it
    exactly.
    """
    bits = value.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    kept = tl.minimum(((size + ((word >> 19) ^ 0x1FFF)) >> 13) - 0x1C000, 0x7BFF)
    units = tl.minimum(tl.abs(value), 6.103515625e-05) * 16777216.0
    whole = units.to(tl.int32)
    up = (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 < units - whole.to(tl.float32)
    kept = tl.where(size < 0x38800000, (whole + up.to(tl.int32)).to(tl.uint32), kept)
    kept = tl.where(size >= 0x477FF000, 0x7C00, kept)
    kept = tl.where(size > 0x7F800000, 0x7E00, kept)
    return (kept | ((bits >> 16) & 0x8000)).to(tl.uint16)


@triton.jit
def noised(held, drawn, word, keep, scale, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Returns the new elements in their storage format, and the old and the new ones as numbers."""
    if DTYPE == "bfloat16":
        theta = (held.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        stored = narrow_bfloat16(theta * keep + drawn * scale, word, STOCHASTIC)
        return stored, theta, (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == "float16":
        theta = held.to(tl.float32)
        result = theta * keep + drawn * scale
        stored = narrow_float16(result, word).to(tl.float16, bitcast=True) if STOCHASTIC else result.to(tl.float16)
        return stored, theta, stored.to(tl.float32)
    else:
        stored = held * keep + drawn.to(held.dtype) * scale
        return stored, held, stored


@triton.jit
def squares(a, b, c, d):
    """Returns a sum of squares, with fused multiply-adds: these sums need not equal the reference bit for bit."""
    return tl.fma(d, d, tl.fma(c, c, tl.fma(b, b, a * a)))


@triton.jit
def noised_four(
    t0, t1, t2, t3, in_0, in_1, in_2, in_3, block, law, hashed, seed, keep, scale,
    MASKED: tl.constexpr, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Returns the four lanes of Philox blocks in their storage format, and the blocks' sums of squares."""
    n0, n1, n2, n3 = standard(block, law, hashed, seed)
    if MASKED:
        n0, n1 = tl.where(in_0, n0, 0.0), tl.where(in_1, n1, 0.0)
        n2, n3 = tl.where(in_2, n2, 0.0), tl.where(in_3, n3, 0.0)
    w0, w1, w2, w3 = block, block, block, block  # not used
    if STOCHASTIC:
        w0, w1, w2, w3 = philox(block, hashed, seed, STREAM=1)
    t0, a0, b0 = noised(t0, n0, w0, keep, scale, DTYPE, STOCHASTIC)
    t1, a1, b1 = noised(t1, n1, w1, keep, scale, DTYPE, STOCHASTIC)
    t2, a2, b2 = noised(t2, n2, w2, keep, scale, DTYPE, STOCHASTIC)
    t3, a3, b3 = noised(t3, n3, w3, keep, scale, DTYPE, STOCHASTIC)
    return t0, t1, t2, t3, squares(a0, a1, a2, a3), squares(n0, n1, n2, n3), squares(b0, b1, b2, b3)


@triton.jit
def noised_even(x, block, law, hashed, seed, keep, scale, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Adds noise to whole Philox blocks, ``[4 * blocks]``, in registers."""
    BLOCKS: tl.constexpr = block.shape[0]
    even, odd = tl.split(tl.reshape(x, [2 * BLOCKS, 2]))
    t0, t2 = tl.split(tl.reshape(even, [BLOCKS, 2]))
    t1, t3 = tl.split(tl.reshape(odd, [BLOCKS, 2]))
    t0, t1, t2, t3, before, added, after = noised_four(
        t0, t1, t2, t3, t0, t0, t0, t0, block, law, hashed, seed, keep, scale, False, DTYPE, STOCHASTIC
    )
    return tl.interleave(tl.interleave(t0, t2), tl.interleave(t1, t3)), before, added, after


@triton.jit
def noised_cut(
    theta_ptr, offset, o_b, run, count, block, law, hashed, seed, keep, scale, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr
):
    """Adds noise to Philox blocks that a run or the tensor cuts; lane 0 is at ``offset`` in its run, ``o_b`` in memory."""
    theta_ptr += o_b
    in_0 = (offset >= 0) & (offset < run) & (o_b < count)
    in_1 = (offset >= -1) & (offset < run - 1) & (o_b < count - 1)
    in_2 = (offset >= -2) & (offset < run - 2) & (o_b < count - 2)
    in_3 = (offset >= -3) & (offset < run - 3) & (o_b < count - 3)
    t0, t1 = tl.load(theta_ptr, mask=in_0, other=0.0), tl.load(theta_ptr + 1, mask=in_1, other=0.0)
    t2, t3 = tl.load(theta_ptr + 2, mask=in_2, other=0.0), tl.load(theta_ptr + 3, mask=in_3, other=0.0)
    t0, t1, t2, t3, before, added, after = noised_four(
        t0, t1, t2, t3, in_0, in_1, in_2, in_3, block, law, hashed, seed, keep, scale, True, DTYPE, STOCHASTIC
    )
    tl.store(theta_ptr, t0, mask=in_0)
    tl.store(theta_ptr + 1, t1, mask=in_1)
    tl.store(theta_ptr + 2, t2, mask=in_2)
    tl.store(theta_ptr + 3, t3, mask=in_3)
    return before, added, after


@triton.jit
def place(i_b, first, run, stride, width, run_0, block_0, left, period):
    """Returns the index of a program's Philox blocks, and lane 0's position in its run and in memory."""
    crossed = ((i_b + (period - left)) // period).to(tl.int64)
    i_r = run_0 + crossed
    start = first + i_r * stride
    i_b = block_0 + i_b - crossed * width  # in the run
    offset = 4 * i_b - (start & 3)
    return (start >> 2) + i_b, offset, i_r * run + offset


@triton.jit(do_not_specialize=["segments"])
def noise_blocks(
    table_ptr,  # [segments, columns] int64
    partial_ptr,  # [programs, 3]: a program's sums of squares, of scale * N in units of scale
    segments,
    DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    QUARTER: tl.constexpr = BLOCK // 4
    PAIR: tl.constexpr = 2 if DTYPE == "bfloat16" or DTYPE == "float16" else 1  # Philox blocks in 16 bytes
    GROUPS: tl.constexpr = QUARTER // PAIR
    i_p = tl.program_id(0).to(tl.int64)
    low, high = i_p * 0, i_p * 0 + segments  # the segment is the last one that begins at or before the program
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(table_ptr + middle * _FIELDS + _BEGIN) <= i_p:
            low = middle
        else:
            high = middle
    at_ptr = table_ptr + low * _FIELDS

    # Where the program begins: run, Philox block of the run; how far, of a program's length at most, the run goes on.
    begin = (i_p - tl.load(at_ptr + _BEGIN)) * (QUARTER * BLOCKS)
    width = tl.load(at_ptr + _WIDTH)
    run_0 = begin // width
    block_0 = begin - run_0 * width
    left = tl.minimum(width - block_0, QUARTER * BLOCKS).to(tl.int32)
    period = tl.minimum(width, QUARTER * BLOCKS).to(tl.int32)
    end = tl.minimum(tl.load(at_ptr + _TOTAL) - begin, QUARTER * BLOCKS).to(tl.int32)

    address = tl.load(at_ptr + _ADDRESS)
    count = tl.load(at_ptr + _COUNT)
    first = tl.load(at_ptr + _FIRST)
    run = tl.load(at_ptr + _RUN)
    stride = tl.load(at_ptr + _STRIDE)
    even = tl.load(at_ptr + _EVEN)
    hashed = tl.load(at_ptr + _HASH)
    seed = tl.load(at_ptr + _SEED)
    law = tl.load(at_ptr + _LAW)
    keep = tl.load(at_ptr + _KEEP).to(tl.float64, bitcast=True)
    scale = tl.load(at_ptr + _SCALE).to(tl.float64, bitcast=True)
    if DTYPE != "float64":
        keep, scale = keep.to(tl.float32), scale.to(tl.float32)
    ELEMENT: tl.constexpr = tl.float64 if DTYPE == "float64" else tl.float32
    before = tl.zeros([GROUPS], ELEMENT)
    added = tl.zeros([GROUPS], tl.float32)
    after = tl.zeros([GROUPS], ELEMENT)
    POINTER: tl.constexpr = tl.pointer_type(tl.uint16 if DTYPE == "bfloat16" else getattr(tl, DTYPE))
    for at in range(0, end, QUARTER):
        i_b = at + tl.arange(0, GROUPS) * PAIR
        if (even != 0) & (4 * (begin + at + QUARTER) <= count):
            block = ((first + run_0 * stride) >> 2) + block_0 + i_b
            other = block + 1
            if left < at + QUARTER:
                block, _, _ = place(i_b, first, run, stride, width, run_0, block_0, left, period)
                other, _, _ = place(i_b + 1, first, run, stride, width, run_0, block_0, left, period)
            here_ptr = tl.multiple_of(address.to(POINTER), 16) + 4 * (begin + at) + tl.arange(0, BLOCK)
            x = tl.load(here_ptr)
            if PAIR == 2:
                x, y = tl.split(tl.permute(tl.reshape(x, [GROUPS, 2, 4]), (0, 2, 1)))
                x, y = tl.reshape(x, [4 * GROUPS]), tl.reshape(y, [4 * GROUPS])
                x, a, b, c = noised_even(x, block, law, hashed, seed, keep, scale, DTYPE, STOCHASTIC)
                y, d, e, f = noised_even(y, other, law, hashed, seed, keep, scale, DTYPE, STOCHASTIC)
                x = tl.join(tl.reshape(x, [GROUPS, 4]), tl.reshape(y, [GROUPS, 4]))
                x = tl.reshape(tl.permute(x, (0, 2, 1)), [BLOCK])
                a, b, c = a + d, b + e, c + f
            else:
                x, a, b, c = noised_even(x, block, law, hashed, seed, keep, scale, DTYPE, STOCHASTIC)
            tl.store(here_ptr, x)
        else:
            base_ptr = address.to(POINTER)  # without the alignment hint
            block, offset, o_b = place(i_b, first, run, stride, width, run_0, block_0, left, period)
            a, b, c = noised_cut(base_ptr, offset, o_b, run, count, block, law, hashed, seed, keep, scale, DTYPE, STOCHASTIC)
            if PAIR == 2:
                block, offset, o_b = place(i_b + 1, first, run, stride, width, run_0, block_0, left, period)
                d, e, f = noised_cut(
                    base_ptr, offset, o_b, run, count, block, law, hashed, seed, keep, scale, DTYPE, STOCHASTIC
                )
                a, b, c = a + d, b + e, c + f
        before, added, after = before + a, added + b, after + c
    to_ptr = partial_ptr + 3 * i_p
    tl.store(to_ptr, tl.sum(before, axis=0))
    tl.store(to_ptr + 1, tl.sum(added, axis=0))
    tl.store(to_ptr + 2, tl.sum(after, axis=0))


@triton.jit(do_not_specialize=["programs", "segments"])
def noise_sums(
    table_ptr,
    partial_ptr,
    sums_ptr,  # [rows of the call, 3] float64
    programs,
    segments,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Adds the partial sums of one segment, in order; one program per segment."""
    i_s = tl.program_id(0)
    at_ptr = table_ptr + i_s * _FIELDS
    begin = tl.load(at_ptr + _BEGIN)
    end = tl.load(at_ptr + _FIELDS + _BEGIN, mask=i_s + 1 < segments, other=programs)
    scale = tl.load(at_ptr + _SCALE).to(tl.float64, bitcast=True)
    if not WIDE:
        scale = scale.to(tl.float32).to(tl.float64)
    to_ptr = sums_ptr + 3 * tl.load(at_ptr + _ROW)
    for field in tl.static_range(3):
        total = tl.zeros([BLOCK_P], tl.float64)
        for at in range(begin, end, BLOCK_P):
            i_p = at + tl.arange(0, BLOCK_P)
            total += tl.load(partial_ptr + 3 * i_p + field, mask=i_p < end, other=0.0)
        value = tl.sum(total, axis=0)
        if field == 1:
            value = value * scale * scale
        tl.store(to_ptr + field, value)
