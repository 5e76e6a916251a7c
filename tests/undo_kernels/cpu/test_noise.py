"""The C++ noise against the reference, bit for bit: every law, dtype, rounding and instruction set, in odd cuts."""

import functools

import pytest
import torch
from rounding import gamma
from undo_kernels import cpu, reference
from undo_kernels.noise_segments import Segment

pytestmark = pytest.mark.skipif(cpu.noise.kernels is None, reason="no C++ compiler was here when undo-core was installed")

SEED = 2**63 + 12345
SUMS = gamma(16)  # squares of float32 numbers, one rounding each, added in float64
LAWS = ("uniform", "normal", "constant")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
MAPS = (  # elements, first, run, stride
    (1, 3, 0, 0),
    (4099, 0, 0, 0),
    (66003, 2, 0, 0),  # more than one chunk
    (2003, 2**40 + 7, 37, 100),
    (300, 5, 1, 3),
    (3000, 2**34 - 1502, 1100, 1501),  # the block's low word runs over
    (2600, 9, 1300, 1302),
)
ONES = 0xFFFFFFFF
VECTORS = [
    ((0, 0, 0, 0), (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ((ONES,) * 4, (ONES,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def bits(tensor):
    """Bit patterns; all NaNs are one."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), -1, tensor.view(integers))


def all_patterns(dtype):
    """Every value of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def noised(backend, theta, law, keep, scale, where, stochastic, seed=SEED):
    theta = theta.clone()
    sums = backend.noise.noise_([Segment(theta, "model.w", law, keep, scale, *where)], seed, stochastic)
    return bits(theta), sums


@functools.cache
def cases(dtype):
    """Arguments of one call, and what the reference makes of them."""
    found = []
    for law in LAWS:
        for stochastic in (True, False) if dtype in HALVES else (True,):
            for count, *where in MAPS:
                theta = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64).to(dtype)
                given = (theta, law, 0.7, 0.2 / 2**24 if law == "uniform" else 0.3, where, stochastic)
                found.append((given, *noised(reference, *given)))
    return found


@functools.cache
def roundings(dtype):
    """Every value of a 16-bit dtype times factors that end between its neighbours, below its normal range and above its largest."""
    factors = (1.0, 1.0 + 2.0**-12, 1.003, 0.7310585, 0.50001, 1.0 / 3, 3e-5, 2.0**-12)
    given = [(all_patterns(dtype), "constant", k, 0.0, (8 * i,), s) for i, k in enumerate(factors) for s in (True, False)]
    given += [(all_patterns(dtype), "uniform", 1.0, scale / 2**24, (), True) for scale in (1.0, 1e-3, 1e-7, 1e-38)]
    return [(one, *noised(reference, *one)) for one in given]


@pytest.mark.parametrize(("counter", "key", "wanted"), VECTORS)
def test_known_answers(instruction_set, counter, key, wanted):
    block, stream = counter[0] | (counter[1] & 0xFFFFFF) << 32, counter[1] >> 24
    seed, hashed = key[0] | key[1] << 32, counter[2] | counter[3] << 32
    assert cpu.noise.kernels.philox(instruction_set, seed, hashed, stream, block) == wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_the_reference(instruction_set, dtype):
    for given, wanted, sums in cases(dtype):
        got, got_sums = noised(cpu, *given)
        assert torch.equal(got, wanted), given[1:]
        torch.testing.assert_close(got_sums, sums, rtol=SUMS, atol=0, msg=lambda text, given=given: f"{text} {given[1:]}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_rounding_of_a_16_bit_type(instruction_set, dtype):
    for given, wanted, _ in roundings(dtype):
        assert torch.equal(noised(cpu, *given)[0], wanted), given[1:]


def test_any_float32(instruction_set):
    patterns = torch.randint(-(2**31), 2**31, (50_001,), generator=torch.Generator().manual_seed(5)).to(torch.int32)
    for law in LAWS:
        given = (patterns.view(torch.float32), law, 0.7, 1e-9, (), True)
        assert torch.equal(noised(cpu, *given)[0], noised(reference, *given)[0])


def test_many_segments_in_one_call(instruction_set):
    def segments():
        for i, (count, *where) in enumerate(MAPS):
            tensor = torch.ones(count, dtype=DTYPES[i % 4])
            yield Segment(tensor, f"layer.{i}", LAWS[i % 3], 0.5, 1e-8, *where)
        yield Segment(torch.ones(0, 5), "empty", "uniform", 0.5, 1e-8)

    fast, slow = list(segments()), list(segments())
    sums, wanted = cpu.noise.noise_(fast, 1, True), reference.noise.noise_(slow, 1, True)
    torch.testing.assert_close(sums, wanted, rtol=SUMS, atol=0)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(fast, slow, strict=True))


def test_the_number_of_threads_changes_no_bit(instruction_set):
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(noised(cpu, torch.ones(3 * 2**16 + 11), "normal", 0.5, 0.1, (1,), True))
    finally:
        torch.set_num_threads(threads)
    for theta, sums in found[1:]:
        assert torch.equal(theta, found[0][0]) and torch.equal(sums, found[0][1])


def test_an_instruction_set_that_the_processor_lacks_is_refused(monkeypatch):
    tensor = torch.ones(3)
    monkeypatch.setenv("UNDO_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"^UNDO_CPU_ISA: got 'mmx', wanted one that this processor has: .*plain"):
        cpu.noise.noise_([Segment(tensor, "w", "uniform", 0.5, 1e-8)], 1, True)
    assert torch.equal(tensor, torch.ones(3))
