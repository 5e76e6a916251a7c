"""The Triton noise, on a GPU or interpreted, against the CPU's reference: every bit of the parameters, and the sums of squares."""

import itertools

import pytest
import torch
from rounding import gamma
from undo_kernels.library.backends import implementation_on
from undo_kernels.noise_segments import Segment
from undo_kernels.triton import noise

# The interpreter is numpy: it warns where a kernel meets the NaN and the infinities that a test feeds it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cpu" if noise.INTERPRETED else "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAWS = {"uniform": 3e-8, "normal": 0.4, "constant": 0.3}  # and a scale of each
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SEED = 2**63 + 12345


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def copied(segment):
    """A segment on a copy of its memory, on the CPU."""
    return Segment(segment.tensor.clone().cpu(), *[getattr(segment, f) for f in list(Segment.__dataclass_fields__)[1:]])


def same_bits(a, b):
    """Equal bit for bit, but for the payload of NaNs."""
    a, b = a.cpu(), b.cpu()
    assert torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(7.0, torch.inf, -torch.inf), b.nan_to_num(7.0, torch.inf, -torch.inf)
    return torch.equal(a.view(BITS[a.element_size()]), b.view(BITS[b.element_size()]))


def check(segments, stochastic=True, seed=SEED):
    slow = [copied(segment) for segment in segments]
    before = [segment.tensor.clone() for segment in segments]
    got = implementation_on("noise_", "triton")(segments, seed, stochastic)
    wanted = implementation_on("noise_", "reference")(slow, seed, stochastic)
    for fast, reference in zip(segments, slow, strict=True):
        assert same_bits(fast.tensor, reference.tensor), (fast.tensor.dtype, fast.law, fast.first, fast.run)
    assert got.dtype == torch.float64 and got.shape == (len(segments), 3)
    # A lane sums the squares of its elements of BLOCKS blocks in float32, then lanes are added as a tree; all terms are positive.
    terms = 4 * noise.BLOCKS * noise.BLOCK // noise.THREADS + 16
    torch.testing.assert_close(got.cpu(), wanted, rtol=2 * gamma(terms), atol=0, equal_nan=True)
    return before


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", LAWS)
def test_bits_of_every_law_dtype_and_rounding(law, dtype, stochastic):
    tensor = drawn(3 * noise.BLOCK // 2 + 3, dtype=dtype)
    (before,) = check([Segment(tensor, "model.layers.0.mlp.down_proj.weight", law, 0.7, LAWS[law])], stochastic)
    assert not torch.equal(before, tensor)


def test_many_segments_in_one_call():
    shapes = ((3, 5), (1,), (noise.BLOCK * noise.BLOCKS + 5,), (7, 11, 2), (64, 32))
    pairs = itertools.product(DTYPES, enumerate(shapes))
    segments = [
        Segment(drawn(*shape, dtype=dtype, seed=i), f"w{i}", list(LAWS)[i % 3], 0.5, list(LAWS.values())[i % 3])
        for dtype, (i, shape) in pairs
        if dtype != torch.float64 or i != 2
    ]
    segments.insert(3, Segment(torch.empty(0, 4, device=DEVICE), "empty", "uniform", 0.5, 1e-8))
    check(segments, seed=5)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("first", [1, 2, 2**34 - 2, 2**40 + 7])
def test_any_first_index(law, first):
    check([Segment(drawn(n, dtype=torch.bfloat16), "w", law, 0.5, LAWS[law], first) for n in (1, 5, 1030)])


@pytest.mark.parametrize(("rows", "run", "stride", "first"), [
    (5, 8, 32, 4),  # runs and starts of whole Philox blocks: in vectors, many runs a program
    (3, 516, 1024, 508),
    (300, 8, 12, 2**40),
    (2, noise.BLOCK * noise.BLOCKS + 4, 2**20, 0),
    (9, 7, 29, 3), (40, 1, 5, 2), (11, 6, 6, 1), (4, 8, 30, 0), (4, 8, 32, 2), (3, 1029, 2001, 2**40 + 7),
])  # fmt: skip
def test_runs(rows, run, stride, first):
    for dtype in (torch.bfloat16, torch.float32):
        check([Segment(drawn(rows, run, dtype=dtype), "w", "uniform", 0.5, 1e-8, first, run, stride)])
    ragged = drawn(rows * run - run // 2)  # the last run is not whole
    check([Segment(ragged, "w", "normal", 0.5, 0.1, first, run, stride)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_that_are_not_aligned(dtype):
    for skip in (1, 2, 4):
        whole = drawn(1100, dtype=dtype)
        before = whole.clone()
        view = whole[skip : skip + 1090]
        check([Segment(view, "w", "uniform", 0.5, 1e-8)])
        assert torch.equal(whole[:skip], before[:skip]) and torch.equal(whole[skip + 1090 :], before[skip + 1090 :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stochastic", [True, False])
def test_rounding_of_every_16_bit_number(dtype, stochastic, monkeypatch):
    """Times 0.7 and plus a little: lost bits of all sizes, subnormals, the edge of the range, infinities and NaN."""
    if noise.INTERPRETED:  # its time goes with the number of blocks
        monkeypatch.setattr(noise, "BLOCK", 1 << 15)
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    for keep, scale in ((0.7, 0.0), (1.0, 0.0), (1.003, 1e-30)):
        fast, slow = every.to(DEVICE, copy=True), every.clone()
        implementation_on("noise_", "triton")([Segment(fast, "w", "uniform", keep, scale)], 1, stochastic)
        implementation_on("noise_", "reference")([Segment(slow, "w", "uniform", keep, scale)], 1, stochastic)
        assert same_bits(fast, slow), (keep, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinities_nan_and_subnormals(dtype):
    info = torch.finfo(dtype)
    tensor = torch.tensor(
        [torch.inf, -torch.inf, torch.nan, info.max, -info.max, info.tiny, info.tiny / 8, -0.0, 0.0], dtype=dtype
    )
    slow = tensor.clone()
    tensor = tensor.to(DEVICE)
    implementation_on("noise_", "triton")([Segment(tensor, "w", "uniform", 0.3, info.tiny * 1e-3)], 1, True)
    implementation_on("noise_", "reference")([Segment(slow, "w", "uniform", 0.3, info.tiny * 1e-3)], 1, True)
    assert same_bits(tensor, slow)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounded_edges_bit_by_bit(dtype):
    """float32 results around each power of two and the largest number, by the rounding functions alone."""
    info = torch.finfo(dtype)
    centres = torch.tensor([info.max, info.max * (1 + info.eps / 4), info.tiny, info.tiny * info.eps, 1.0, 3.7, info.tiny / 3])
    bits = centres.view(torch.int32)[:, None] + torch.arange(-20, 21, dtype=torch.int32)
    value = torch.cat([bits.view(-1), torch.tensor([0, 1, 5, 0x7F800000], dtype=torch.int32)]).view(torch.float32)
    value = torch.cat([value, -value])
    for word in (0, 1, 255, 256, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFF7FFFF, 0xFFFFFF00, 0xFFFFFFFF):
        words = torch.full((value.numel(),), word)
        wanted = noise.reference.round_stochastically(value, dtype, words).to(dtype)
        assert same_bits(narrowed(value, words, dtype), wanted), hex(word)


def narrowed(value, words, dtype):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(value_ptr, word_ptr, out_ptr, n, BFLOAT16: tl.constexpr, BLOCK: tl.constexpr):
        o = tl.arange(0, BLOCK)
        value, word = tl.load(value_ptr + o, mask=o < n), tl.load(word_ptr + o, mask=o < n).to(tl.uint32)
        if BFLOAT16:
            tl.store(out_ptr + o, noise.narrow_bfloat16(value, word, True).to(tl.int16, bitcast=True), mask=o < n)
        else:
            tl.store(out_ptr + o, noise.narrow_float16(value, word).to(tl.int16, bitcast=True), mask=o < n)

    out = torch.empty(value.numel(), dtype=torch.int16, device=DEVICE)
    kernel[(1,)](value.to(DEVICE), words.to(DEVICE), out, value.numel(), BFLOAT16=dtype == torch.bfloat16, BLOCK=1024)
    return out.cpu().view(dtype)


def test_one_launch_for_a_dtype(monkeypatch):
    launches = []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    kernel = noise.noise_blocks
    monkeypatch.setattr(noise, "noise_blocks", Counted())
    check([Segment(drawn(9, dtype=dtype), f"w{i}", "uniform", 0.5, 1e-8) for i, dtype in enumerate(DTYPES[:2] * 3)])
    assert launches == [(3,), (3,)]


def test_memory_is_read_in_vectors_where_it_can_be():
    whole = torch.zeros(1024, dtype=torch.bfloat16)
    cuts = (
        (True, Segment(whole, "w", "uniform", 0.5, 1e-8)),
        (True, Segment(whole[8:], "w", "uniform", 0.5, 1e-8, 2**40 + 4)),
        (True, Segment(whole, "w", "uniform", 0.5, 1e-8, 4, 8, 32)),
        (False, Segment(whole[4:], "w", "uniform", 0.5, 1e-8)),
        (False, Segment(whole, "w", "uniform", 0.5, 1e-8, 2)),
        (False, Segment(whole, "w", "uniform", 0.5, 1e-8, 0, 6, 32)),
        (False, Segment(whole, "w", "uniform", 0.5, 1e-8, 0, 8, 30)),
    )
    table, _ = noise._table(list(enumerate(segment for _, segment in cuts)), SEED)
    assert table[:, noise._EVEN.value].tolist() == [int(even) for even, _ in cuts]


def test_nothing_but_empty_tensors():
    sums = implementation_on("noise_", "triton")([Segment(torch.empty(0, device=DEVICE), "w", "uniform", 0.5, 1.0)], 1, True)
    assert torch.equal(sums.cpu(), torch.zeros(1, 3, dtype=torch.float64))
