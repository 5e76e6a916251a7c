"""Philox's published vectors, the roundings of the noise, its laws, and its independence of everything but seed, name and index."""

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import undo_kernels
from rounding import EXPONENTIAL, gamma
from torch import nn
from undo_kernels.reference.noise import BLOCK, _sqrt, round_stochastically, standard
from undo_kernels.reference.philox import philox_4x32_10, words
from undo_kernels.segment import Segment, amplitude

from undo_core import ops

ROOT = Path(__file__).resolve().parents[2]

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


@pytest.mark.parametrize("law", ["xavier_uniform", "xavier_normal", "normal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_cut_gives_the_same_bits(law, dtype):
    shape, std = (13, 29), 0.5 if law == "normal" else None
    theta = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = theta.clone()
    ops.noise_({"w": whole}, alpha=0.4, beta=0.5, seed=7, law=law, std=std)
    assert not torch.equal(whole, theta)
    kind, scale = law.removeprefix("xavier_"), 0.4 * 0.5 * amplitude(law, shape, std)
    noise = undo_kernels.implementation("noise_", theta.device)
    for cut in (1, 2, 5, 100, 376):
        parts = theta.clone().view(-1)
        pieces = ((0, cut), (cut, 377))
        noise([Segment(parts[start:end], "w", kind, 1 - 0.4, scale, start) for start, end in pieces], 7, True)
        assert torch.equal(parts.view(shape), whole)
    for first, last in ((0, 1), (3, 8), (10, 29)):
        columns = theta[:, first:last].contiguous()
        noise([Segment(columns, "w", kind, 1 - 0.4, scale, first, last - first, 29)], 7, True)
        assert torch.equal(columns, whole[:, first:last])


def test_backends_agree_bit_for_bit():
    assert undo_kernels.backends_of("noise_")[-2:] == ("cpu", "reference") and not undo_kernels.unavailable()
    for shape in ((3, 5), (257, 1031), (BLOCK + 3, 2)):
        fast = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        slow = fast.clone()
        ops.noise_({"w": fast}, alpha=0.6, beta=0.1, seed=3)
        with undo_kernels.backend("reference"):
            ops.noise_({"w": slow}, alpha=0.6, beta=0.1, seed=3)
        assert torch.equal(fast, slow)


def test_the_number_of_threads_changes_nothing():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.ones(301, 997))
            ops.noise_({"w": found[-1]}, alpha=0.5, beta=1.0, seed=5)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


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
    assert np.array_equal(_sqrt(x).numpy(), np.sqrt(x.numpy()))  # the processor's instruction


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


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
VIEWS = {
    "transposed": lambda t: t.T,
    "columns": lambda t: t[:, 2:7],
    "every second": lambda t: t[::2, 1::3],
    "channels last": lambda t: t.view(4, 2, 3, 5).contiguous(memory_format=torch.channels_last),
    "a column": lambda t: t[:, 3],
    "a vector": lambda t: t[1, ::2],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_tensors_that_are_not_contiguous_get_the_bits_of_contiguous_ones(view, dtype):
    whole = torch.randn(8, 15, generator=torch.Generator().manual_seed(3)).to(dtype)
    tensor = VIEWS[view](whole)
    outside = torch.ones(8, 15, dtype=torch.bool)
    if tensor.untyped_storage().data_ptr() == whole.data_ptr():
        VIEWS[view](outside).fill_(False)
    wanted, before, address = tensor.contiguous().clone(), whole.clone(), tensor.data_ptr()
    assert not tensor.is_contiguous()
    toward = torch.linspace(-1, 1, tensor.numel()) if tensor.ndim == 1 else 0.0
    options = {"alpha": 0.4, "beta": 0.7, "seed": 5, "toward": {"w": toward}}
    ops.noise_({"w": wanted}, **options)
    ops.noise_({"w": torch.nn.Parameter(tensor)}, **options)
    assert torch.equal(tensor, wanted) and tensor.data_ptr() == address
    assert torch.equal(whole[outside], before[outside]), "what lies between is not touched"


def test_columns_of_one_matrix_are_apart_and_columns_that_overlap_are_not():
    whole = torch.ones(4, 10)
    ops.noise_({"q": whole[:, :4], "k": whole[:, 4:6], "v": whole[:, 6:]}, alpha=0.5, beta=0.0, seed=0)
    assert (whole == 0.5).all()
    for name, other in (("k", whole[:, 3:5]), ("far", whole[3:, 2:])):
        with pytest.raises(ValueError, match=rf"^tensors: got 'q' and '{name}', which share memory"):
            ops.noise_({"q": whole[:, :4], "v": whole[:, 6:], name: other}, alpha=0.5, beta=0.0, seed=0)
    assert (whole == 0.5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_a_target_of_each_element_bit_by_bit(backend, dtype):
    """``rn(rn(k * theta) + rn(alpha * target))``: what numbers as targets give, one by one."""
    generator = torch.Generator().manual_seed(8)
    theta, target = torch.randn(3, 7, generator=generator).to(dtype), torch.randn(3, 7, generator=generator)
    parameters = {"A": theta.clone(), "plain": torch.ones(5, 4, dtype=dtype), "b": torch.ones(3, dtype=dtype)}
    whole = {name: tensor.clone().view(-1) if name == "A" else tensor.clone() for name, tensor in parameters.items()}
    options = {"alpha": 0.3, "beta": 0.7, "seed": 9, "stochastic_rounding": False}
    with undo_kernels.backend(backend):
        ops.noise_(whole, **options, toward={"A": target.view(-1), "b": 2.0})
    for index in range(21):
        single = theta.view(-1)[index : index + 1].clone()
        ops.noise_({"A": single}, **options, toward=float(target.view(-1)[index]))
        assert torch.equal(single, whole["A"][index : index + 1])
    if dtype == torch.float32:
        k, c = np.float32(1 - 0.3), (0.3 * target.double().numpy()).astype(np.float32)
        assert np.array_equal((theta.numpy() * k + c).reshape(-1), whole["A"].numpy())
    others = {name: parameters[name] for name in ("plain", "b")}
    ops.noise_(others, **options, toward={"b": 2.0})
    assert all(torch.equal(whole[name], others[name]) for name in others), "the others have the bits that they have alone"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_target_of_each_element_in_any_cut_and_backend(dtype):
    generator = torch.Generator().manual_seed(8)
    theta, target = torch.randn(13, 29, generator=generator).to(dtype), torch.randn(13, 29, generator=generator)
    noise = undo_kernels.implementation("noise_", theta.device)
    whole = theta.clone()
    sums = noise([Segment(whole, "A", "elements", 0.6, 0.4, target=target)], 7, True)
    wanted = [theta.double().square().sum(), (0.4 * target.double()).square().sum(), whole.double().square().sum()]
    torch.testing.assert_close(sums[0], torch.stack(wanted), rtol=gamma(16), atol=0)  # float32 squares, added in float64
    assert not torch.equal(whole, (theta.float() * 0.6 + target * 0.4).to(dtype)), "rounded stochastically"
    for backend in ("cpu", "reference", "triton"):
        other = theta.clone()
        with undo_kernels.backend(backend):
            undo_kernels.implementation("noise_", theta.device)(
                [Segment(other, "A", "elements", 0.6, 0.4, target=target)], 7, True
            )
        assert torch.equal(other, whole)
    for first, last in ((0, 1), (3, 8), (10, 29)):
        columns = theta[:, first:last].contiguous()
        noise([Segment(columns, "A", "elements", 0.6, 0.4, first, last - first, 29, target)], 7, True)
        assert torch.equal(columns, whole[:, first:last])


def test_replay_is_the_noise_that_was_added():
    for shape, law, std in (((8, 6), "xavier_uniform", None), ((4, 3, 2), "xavier_normal", None), ((5, 5), "normal", 0.02)):
        tensor = torch.zeros(shape, dtype=torch.float64)
        ops.noise_({"w": tensor}, alpha=0.5, beta=2.0, seed=4, law=law, std=std)
        torch.testing.assert_close(
            tensor, ops.replay("w", shape, seed=4, law=law, std=std), rtol=gamma(16, torch.float64), atol=0
        )
    limit = math.sqrt(6 / ((4 + 3) * 2))  # fans of a convolution's weight carry its receptive field
    assert (
        ops.replay("w", (4, 3, 2), seed=4).abs().max()
        < limit
        < ops.replay("w", (40, 30, 2), seed=4).abs().max() * math.sqrt(10) * 1.1
    )


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


def test_noise_in_place_names_ties_and_norms():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight
            self.frozen = nn.Linear(4, 4).requires_grad_(False)

    model = Model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    ops.noise_(model, alpha=0.5, beta=1.0, seed=1, toward={"norm.weight": 1.0, "norm.bias": 0.0})
    once = before["embed.weight"].clone()
    ops.noise_({"embed.weight": once}, alpha=0.5, beta=1.0, seed=1)
    assert torch.equal(model.embed.weight, once) and model.head.weight is model.embed.weight
    assert torch.equal(model.norm.weight, torch.ones(4)), "it shrinks toward its initial value"
    assert torch.equal(model.frozen.weight, before["frozen.weight"])
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses


def test_wrappers_prefixes_do_not_count():
    plain, wrapped = torch.ones(3, 4), torch.ones(3, 4)
    ops.noise_({"layer.w": plain}, alpha=0.5, beta=1.0, seed=1)
    ops.noise_({"module._orig_mod.layer.w": wrapped}, alpha=0.5, beta=1.0, seed=1)
    assert torch.equal(plain, wrapped)


def test_alpha_zero_is_the_identity_and_beta_zero_only_shrinks():
    theta = torch.randn(5, 5)
    kept = theta.clone()
    ops.noise_({"w": kept}, alpha=0.0, beta=1.0, seed=0)
    assert torch.equal(kept, theta)
    ops.noise_({"w": kept}, alpha=0.25, beta=0.0, seed=0)
    assert torch.equal(kept, theta * 0.75)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"alpha": 1.1}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"beta": -0.1}, "beta"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"law": "cauchy"}, "law"),
        ({"law": "normal"}, "std"),
        ({"std": 1.0}, "std"),
        ({"tensors": {}}, "tensors"),
        ({"tensors": 3}, "tensors"),
        ({"tensors": {"w": torch.zeros(3, 3, dtype=torch.int32)}}, "tensors"),
        ({"tensors": {"w": torch.ones(3, 1).expand(3, 4)}}, "tensors"),
        ({"tensors": {"w": torch.ones(2, 2), "module.w": torch.ones(2, 2)}}, "tensors"),
        ({"tensors": {"w": torch.ones(2, 2), "b": torch.ones(2)}, "toward": {"c": 1.0}}, "toward"),
        ({"tensors": {"w": torch.ones(2, 2), "b": torch.ones(2)}, "toward": {"b": torch.ones(3)}}, "toward"),
        ({"tensors": {"w": torch.ones(2, 2), "b": torch.ones(2)}, "toward": {"b": torch.tensor([1, 2])}}, "toward"),
        ({"tensors": {"w": torch.ones(2, 2), "b": torch.ones(2)}, "toward": {"b": torch.tensor([1.0, math.inf])}}, "toward"),
    ],
)
def test_bad_arguments_change_nothing(changes, argument):
    tensor = torch.ones(3, 3)
    arguments = {"tensors": {"w": tensor}, "alpha": 0.5, "beta": 0.1, "seed": 0, **changes}
    with pytest.raises(ValueError, match=rf"^{argument}.*: got .*, wanted "):
        ops.noise_(arguments.pop("tensors"), **arguments)
    assert torch.equal(tensor, torch.ones(3, 3))
    if isinstance(changes.get("tensors"), dict) and "w" in changes["tensors"]:
        assert changes["tensors"]["w"].unique().numel() == 1


def test_without_a_compiler_the_install_goes_on_and_says_so(tmp_path):
    environment = {**os.environ, "CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "temp")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "NO C++ KERNELS" in done.stderr and "reference backend" in done.stderr


def test_without_the_extension_the_reference_runs_and_warns_once():
    program = """
import sys, warnings
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "undo_kernels._cpu":
            raise ImportError("not built")
sys.meta_path.insert(0, Refuse())
import torch
from undo_core import ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        ops.noise_({"w": torch.ones(3, 3)}, alpha=0.5, beta=0.1, seed=0)
assert len(caught) == 1 and "not built" in str(caught[0].message), [str(c.message) for c in caught]
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_a_graph_that_saved_the_tensor_notices():
    x = torch.ones(3, 3, requires_grad=True)
    y = (x * x).sum()
    ops.noise_({"x": x}, alpha=0.5, beta=0.0, seed=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_parameter_that_is_elsewhere_is_refused_before_anything_changes():
    here = torch.ones(3, 3)
    with pytest.raises(ValueError, match=r"^tensors\['b'\]: got a meta tensor"):
        ops.noise_({"a": here, "b": torch.ones(2, 2, device="meta")}, alpha=0.5, beta=0.1, seed=0)
    assert torch.equal(here, torch.ones(3, 3))


def test_the_cpu_backend_is_not_given_another_devices_tensors(monkeypatch):
    monkeypatch.setattr(undo_kernels.library, "_warned", set())
    with undo_kernels.backend("cpu"), pytest.warns(undo_kernels.BackendWarning, match="not on cuda"):
        assert undo_kernels.library.choose("noise_", torch.device("cuda")) == "reference"
