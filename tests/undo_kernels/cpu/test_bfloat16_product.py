"""The bfloat16 products of the C++ kernels: against float64, and an emulated instruction against its definition."""

import numpy as np
import pytest
import torch
from bfloat16_ways import CONVERTED, WAYS
from rounding import gamma
from undo_kernels import cpu, recorded
from undo_kernels.cpu.extension import kernels

from undo_core import ops

PRODUCTS = [way for way in WAYS if way != CONVERTED]
EXACT = [name for name in PRODUCTS if name.startswith("avx512bf16")]  # those whose every rounding is defined

pytestmark = pytest.mark.skipif(kernels is None, reason="no C++ compiler was here when undo-core was installed")


def packed(hidden):
    tokens, width = hidden.shape
    return hidden.view(torch.int32).view(tokens // 16, 16, width // 2).transpose(1, 2).contiguous()


def project(name, weight, hidden, rows=None):
    """The product of the first ``rows`` rows, in a larger buffer; asserts that nothing beyond them is written."""
    rows, (tokens, width) = len(weight) if rows is None else rows, hidden.shape
    z, words = torch.full((rows + 3, tokens + 16), 7.0), packed(hidden)
    kernels.bf16_project(
        name, weight.data_ptr(), weight.stride(0), rows, words.data_ptr(), tokens, width, z.data_ptr(), z.stride(0)
    )
    assert (z[rows:] == 7).all() and (z[:, tokens:] == 7).all()
    return z[:rows, :tokens]


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(("rows", "tokens", "width"), [(1, 16, 32), (31, 32, 64), (32, 48, 96), (100, 16, 352), (203, 80, 64)])
def test_the_product_is_right_and_reads_only_its_rows(name, rows, tokens, width):
    generator = torch.Generator().manual_seed(rows)
    buffer = torch.full((rows + 40, width + 32), torch.nan, dtype=torch.bfloat16)
    weight = buffer[:, :width]
    weight[:rows] = torch.randn(rows, width, generator=generator)
    hidden = torch.randn(tokens, width, generator=generator).bfloat16()
    exact = weight[:rows].double() @ hidden.double().T
    terms = weight[:rows].double().abs() @ hidden.double().abs().T
    # Arm's instruction rounds each sum of two products to odd, others to nearest: an error of at most two units in each addition.
    assert ((project(name, weight, hidden, rows) - exact).abs() <= 2 * gamma(width) * terms).all()


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_number_of_threads_changes_no_bit(name):
    generator, threads = torch.Generator().manual_seed(1), torch.get_num_threads()
    weight, hidden = (torch.randn(n, 96, generator=generator).bfloat16() for n in (300, 48))
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(project(name, weight, hidden))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found[1:])


def flushed(x):
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def by_definition(weight, hidden, wrong=None):
    """vdpbf16ps as Intel's manual defines it, in float64, which holds the sum of a float32 and a product of these inputs exactly.

    ``wrong`` changes one point of the definition: the order of a pair's two sums, or whether subnormal numbers count as zero.
    """
    inputs, results = (flushed if wrong != f"subnormal {what}" else np.asarray for what in ("inputs", "results"))
    w, h = (inputs(t.float().numpy()).astype(np.float64) for t in (weight, hidden))
    z = np.zeros((len(w), len(h)), np.float32)
    for pair in range(0, w.shape[1], 2):
        for k in (pair, pair + 1) if wrong == "order" else (pair + 1, pair):
            z = results((z + np.outer(w[:, k], h[:, k])).astype(np.float32))
    return z


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(
    ("scales", "different"),
    [((0, 0), "order"), ((-63, -63), "subnormal results"), ((-126, 40), "subnormal inputs")],
    ids=["normal", "subnormal results", "subnormal inputs"],
)
def test_every_rounding_is_that_of_the_instruction(name, scales, different):
    generator = torch.Generator().manual_seed(2)

    def drawn(count, scale):
        steps = torch.randint(-9, 1, (count, 64), generator=generator) if scale == 0 else torch.full((count, 64), -6)
        return torch.ldexp(torch.randint(-255, 256, (count, 64), generator=generator).double(), steps + scale).bfloat16()

    weight, hidden = (drawn(count, scale) for count, scale in zip((37, 32), scales, strict=True))
    wanted = by_definition(weight, hidden)
    assert (by_definition(weight, hidden, different) != wanted).any(), "these inputs tell the roundings apart"
    assert torch.equal(project(name, weight, hidden), torch.from_numpy(wanted))


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_losses_use_the_product_that_is_named(name, monkeypatch):
    monkeypatch.setenv("UNDO_CPU_ISA", name)
    h, w = (torch.randn(n, 32).bfloat16() for n in (8, 200))
    with recorded() as calls:
        ops.linear_lse(h, w, plan="chunk")
        ops.linear_lse(h.float(), w.float(), plan="chunk")
        ops.linear_lse(h[:, :16], w[:, :16], plan="chunk")  # too narrow for it
    vectors = cpu.instruction_set.vectors()
    assert [call.form for call in calls] == [f"{vectors}+{name}", vectors, vectors]


def test_an_emulated_product_is_used_only_where_it_is_named(monkeypatch):
    monkeypatch.delenv("UNDO_CPU_ISA", raising=False)
    assert not set(cpu.emulations()) & set(cpu.instruction_sets())
    assert cpu.instruction_set.bfloat16_product() not in cpu.emulations()


@pytest.mark.parametrize("name", PRODUCTS)
def test_hidden_states_may_begin_in_the_middle_of_a_word(name, monkeypatch):
    monkeypatch.setenv("UNDO_CPU_ISA", name)
    generator = torch.Generator().manual_seed(3)
    weight, hidden = (torch.randn(n, 32, generator=generator).bfloat16() for n in (70, 16))
    odd = torch.cat([hidden.new_zeros(1), hidden.flatten()])[1:].view(hidden.shape)
    assert odd.storage_offset() % 2 == 1 and odd.is_contiguous()
    assert torch.equal(ops.linear_lse(odd, weight, plan="chunk"), ops.linear_lse(hidden, weight, plan="chunk"))
