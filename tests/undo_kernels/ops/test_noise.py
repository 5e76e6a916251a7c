"""The noise depends on nothing but seed, name and index: not on cuts, views, backends or threads; names, targets and wrong arguments."""

import math

import numpy as np
import pytest
import torch
import undo_kernels
from rounding import gamma
from torch import nn
from undo_kernels.noise_segments import Segment, amplitude
from undo_kernels.reference.noise import BLOCK

from undo_core import ops


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
        ({"tensors": {5: torch.ones(2, 2)}}, "tensors"),
        ({"tensors": {"\ud800": torch.ones(2, 2)}}, "tensors"),
        ({"tensors": {"w": torch.ones(2, 2), "s": torch.ones(2, 2).to_sparse()}}, "tensors"),
        ({"tensors": {"w": torch.zeros(2, 2, dtype=torch.complex64).conj().imag}}, "tensors"),
        ({"tensors": {"b": torch.ones(2)}, "toward": torch.nested.nested_tensor([torch.ones(2)])}, "toward"),
        ({"alpha": 10**400}, "alpha"),
        ({"rules": 5}, "rules"),
        ({"stochastic_rounding": torch.ones(2)}, "stochastic_rounding"),
        ({"stochastic_rounding": 1}, "stochastic_rounding"),
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


@pytest.mark.parametrize("match", ["layers:0-99999999999", "layers:" + "9" * 5000, "not not x", "not " * 5000 + "x"])
def test_a_rule_takes_no_memory_or_time_of_its_own(match):
    """The numbers of layers are held one by one, and ``not`` is peeled off one by one."""
    with pytest.raises(ValueError, match=r"^match: got .*, wanted "):
        ops.NoiseRule(match, alpha=0.1)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"name": None}, "name"),
        ({"name": "\ud800"}, "name"),
        ({"shape": 5}, "shape"),
        ({"shape": (-1, 3)}, "shape"),
        ({"shape": (3, "4")}, "shape"),
        ({"shape": (2**40, 2**40)}, "shape"),
        ({"shape": (3,), "law": "normal", "std": 1.0, "stacked": True}, "shape"),
        ({"stacked": torch.ones(2)}, "stacked"),
    ],
)
def test_bad_arguments_of_replay_are_named(changes, argument):
    with pytest.raises(ValueError, match=f"^{argument}: got .*, wanted "):
        ops.replay(**{"name": "w", "shape": (3, 4), "seed": 1, **changes})


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
