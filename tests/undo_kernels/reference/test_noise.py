"""Philox's published vectors, and the noise's laws and roundings in plain PyTorch."""

import hashlib
import math

import numpy as np
import pytest
import torch
from rounding import EXPONENTIAL, gamma
from undo_kernels.reference.noise import round_stochastically, square_root, standard
from undo_kernels.reference.philox import philox_4x32_10, words

from undo_core import ops

ONES = 0xFFFFFFFF


VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "wanted"), VECTORS)
def test_known_answers(counter, key, wanted):
    got = philox_4x32_10(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in got) == wanted


def own_philox(seed, name, stream, index):
    """Philox-4x32-10 once more, in Python's integers, straight from the paper."""
    hashed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    block = index // 4
    c = [block % 2**32, (block >> 32) % 2**24 + (stream << 24), hashed % 2**32, hashed >> 32]
    k = [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[index % 4]


@pytest.mark.parametrize("index", [0, 1, 3, 4, 2**31 + 5, 2**34 - 1, 2**40 + 7])
def test_words_follow_the_layout(index):
    for seed, name, stream in ((0, "w", 0), (2**63 + 12345, "model.layers.0.mlp.down_proj.weight", 1)):
        hashed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        got = words(seed, hashed, stream, index, 6)
        assert got.tolist() == [own_philox(seed, name, stream, index + i) for i in range(6)]


def test_uniform_noise_bit_by_bit():
    theta = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    got = theta.clone()
    ops.noise_({"w": got}, alpha=0.3, beta=0.7, seed=99)
    limit = math.sqrt(6 / 16)
    k, c = np.float32(1 - 0.3), np.float32(0.3 * 0.7 * limit / 2**24)
    for index, (old, new) in enumerate(zip(theta.flatten().numpy(), got.flatten().numpy(), strict=True)):
        n = np.float32(2 * (own_philox(99, "w", 0, index) >> 8) + 1 - 2**24)
        assert np.float32(k * old) + np.float32(c * n) == new


def assert_mean(draws, mean, variance):
    """Six standard deviations: a right law leaves them for one seed in 500 million. The draws have the same bits on every machine."""
    assert abs(float(draws.double().mean()) - mean) <= 6 * math.sqrt(variance / len(draws))


def test_the_laws_have_their_moments():
    n = 1 << 18
    uniform = standard("uniform", 1, 2, 0, n, "cpu").double() / 2**24
    assert uniform.abs().max() < 1
    assert_mean(uniform, 0, 1 / 3)
    assert_mean(uniform**2, 1 / 3, 1 / 5 - 1 / 9)
    normal = standard("normal", 1, 2, 0, n, "cpu").double()
    assert_mean(normal, 0, 1)
    assert_mean(normal**2, 1, 3 - 1)
    assert_mean(normal**4, 3, 105 - 9)
    for z in (0.6745, 1.9600, 3.2905):
        share = math.erf(z / math.sqrt(2))
        assert_mean(normal.abs() < z, share, share * (1 - share))
    pairs = normal.view(-1, 2)
    assert_mean(pairs[:, 0] * pairs[:, 1], 0, 1)


def test_the_square_root_is_correctly_rounded():
    x = torch.rand(1 << 16, generator=torch.Generator().manual_seed(0)) * 34
    assert np.array_equal(square_root(x).numpy(), np.sqrt(x.numpy()))  # the processor's instruction


def test_box_muller_against_the_library_functions():
    for index in range(0, 400, 4):
        w = [own_philox(11, "x", 0, index + lane) for lane in range(4)]
        hashed = int.from_bytes(hashlib.sha256(b"x").digest()[:8], "little")
        got = standard("normal", 11, hashed, index, 4, "cpu").tolist()
        for pair in (0, 2):
            radius = math.sqrt(-2 * math.log((2 * (w[pair] >> 9) + 1) / 2**24))
            angle = math.pi * (2 * (w[pair + 1] >> 8) + 1 - 2**24) / 2**24
            room = radius * gamma(2 * EXPONENTIAL + 4)  # logarithm, square root and the circle's function, which is 1 at most
            assert got[pair] == pytest.approx(radius * math.cos(angle), abs=room)
            assert got[pair + 1] == pytest.approx(radius * math.sin(angle), abs=room)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_has_no_bias(dtype):
    word = words(3, 4, 1, 0, 1 << 17)
    for value in (1.0009, -3.14159, 7e-6, 65000.0, 1e-7 if dtype == torch.float16 else 1e-40):
        rounded = round_stochastically(torch.full((1 << 17,), value), dtype, word)
        assert torch.equal(rounded.to(dtype).float(), rounded), "on the grid"
        grid = rounded.unique().double()
        assert len(grid) <= 2
        spacing = float(grid.max() - grid.min()) if len(grid) == 2 else abs(value) * torch.finfo(dtype).eps
        exact = torch.tensor(value, dtype=torch.float32).double()
        assert abs(float(rounded.double().mean() - exact)) < 5 * spacing / 2 / (1 << 17) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_at_the_edges(dtype):
    word = torch.full((1,), 0)
    largest = torch.finfo(dtype).max
    on_grid = torch.tensor([0.0, -0.0, 1.0, -largest, largest, torch.inf, -torch.inf, torch.finfo(dtype).smallest_normal])
    got = round_stochastically(on_grid, dtype, word.expand(8))
    assert torch.equal(got, on_grid) and torch.equal(got.signbit(), on_grid.signbit())
    assert round_stochastically(torch.tensor([torch.nan]), dtype, word).isnan().all()
    just_above = torch.tensor([largest * (1 + torch.finfo(dtype).eps / 8)])
    assert round_stochastically(just_above, dtype, word) == largest
    if dtype == torch.float16:
        assert round_stochastically(torch.tensor([70000.0]), dtype, word).isinf()
