"""Triton's kernels, interpreted, on tensors between poisoned borders: no form reads or writes outside, nor uses what lies between rows.

The problems are those from which ``forms.py`` lists what is launched on a GPU, with few tokens and entries. Addresses are checked one by
one, so a read that a mask should have kept from the next tensor is found even if its value has no influence.
"""

import dataclasses
import itertools

import pytest
import torch
from interpreted_memory import Bordered, OutOfBounds, watched

triton = pytest.importorskip("triton")
from undo_kernels.noise_segments import Segment  # noqa: E402
from undo_kernels.projection import GivenLogits  # noqa: E402
from undo_kernels.triton import forms, noise, rmu, vocab_loss  # noqa: E402
from undo_kernels.triton.products import Workspace  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not vocab_loss.INTERPRETED, reason="on a GPU compute-sanitizer does this: bench/gpu_suite.sh"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, where a masked lane holds anything
]
CPU = torch.device("cpu")
# Sizes of forms.py and what they are here: prime or odd where those are no multiples of 16.
SIZES = {forms._TOKENS: 5, forms._VOCABULARY: 64, forms._VOCABULARY - 7: 71, 640: 32, 637: 37, 80: 24, forms._KNOWN: 3, 1: 1}


def real(problem, seed):
    """Returns a problem of ``forms.py`` with values, between borders, and the borders."""
    generator, borders = torch.Generator().manual_seed(seed), Bordered()
    entries = SIZES[problem.student.vocabulary]

    def values(name, meta):
        shape = [SIZES[size] for size in meta.shape]
        if name == "indices":
            return torch.stack([torch.randperm(entries, generator=generator)[: shape[1]] for _ in range(shape[0])])
        if name == "labels":
            return torch.randint(-1, entries, shape, generator=generator)
        if name == "counted":
            return torch.rand(shape, generator=generator) < 0.7
        drawn = torch.randn(shape, generator=generator)
        if name == "logprobs":
            return drawn.log_softmax(-1) - 0.1
        return (drawn.abs() if name.endswith("factor") else drawn).to(meta.dtype)

    def made(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        new = {name: borders(values(name, one)) for name, one in fields.items() if isinstance(one, torch.Tensor)}
        if isinstance(value, GivenLogits):
            new["weight"] = new["hidden"]
        new |= {name: made(one) for name, one in fields.items() if name in ("student", "teacher") and one is not None}
        return dataclasses.replace(value, **new)

    return made(problem), borders


def problems():
    with torch.device("meta"):
        return list(forms._problems("all", "sm_90"))


def test_every_form_of_the_losses(some, account):
    listed = problems()
    chosen = some(range(len(listed)), 5)
    launched = set()
    for number in chosen:
        problem, borders = real(listed[number], number)
        with watched() as launches:
            result = vocab_loss.run(problem, Workspace(CPU))
        borders.assert_whole()
        assert all(value.isfinite().all() for value in result if value is not None), f"problem {number} used a border"
        launched |= set(launches)
    kernels = {"stats_rows", "combine_rows", "loss_rows", "pick_rows", "put_rows", "pick_labels", "stats_tiles", "loss_tiles"}
    assert launched <= kernels and (len(chosen) < len(listed) or launched == kernels), launched
    account("Triton losses between borders", tried=len(chosen), survived=len(chosen))


def test_every_form_of_noise_and_rmu(some, account):
    pairs = some(itertools.product(noise.DTYPES, (True, False), (1, 5, 1030)), 4)
    for dtype, stochastic, count in pairs:
        borders = Bordered()
        laws = ("uniform", "normal", "constant")
        tensors = [borders(torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)) for _ in laws]
        segments = [Segment(t, law, law, 0.5, 1e-8, 3, 7, 29) for t, law in zip(tensors, laws, strict=True)]
        with watched(*tensors) as launches:
            noise.noise_(segments, 1, stochastic)
        borders.assert_whole()
        assert {"noise_blocks", "noise_sums"} == set(launches) and all(t.isfinite().all() for t in tensors)
    kinds = some(itertools.product(forms._DTYPES.values(), (1, 33, 1025), *[(True, False)] * 3), 6)
    for dtype, width, own, factor, needs in kinds:
        borders = Bordered()
        hidden, target = (borders(torch.randn(3, width).to(dtype)) for _ in range(2))
        factors = borders(torch.tensor([0.5, 0.0, 0.5])) if factor else None
        with watched() as launches:
            partial, gradient = rmu.launch(hidden, target if own else borders(torch.randn(width)), factors, 1.5, needs)
        borders.assert_whole()
        assert launches == ["rmu_rows"] and partial.isfinite().all() and gradient.isfinite().all()
    account("Triton noise and RMU between borders", tried=len(pairs) + len(kinds), survived=len(pairs) + len(kinds))


@pytest.mark.parametrize("way", ["reads", "writes"])
def test_a_planted_fault_is_found(way):
    """A kernel that is told of one element more than there are."""
    hidden = torch.randn(2, 8)
    one, other = (hidden, hidden.expand(2, 8)) if way == "reads" else (torch.randn(2, 9), torch.randn(9))
    with watched(), pytest.raises(Exception, match="outside its tensors") as found:
        gradient = torch.empty(2 if way == "reads" else 1, 9)
        partial = torch.empty(2)
        rmu.rmu_rows[(2,)](
            one, other, partial, gradient, partial, 9, one.stride(0), other.stride(0) if other.ndim == 2 else 0, 1.0, 0.5,
            FACTOR=False, OWN_TARGET=other.ndim == 2, GRADIENT=True, BLOCK_D=16,
        )  # fmt: skip
    assert OutOfBounds.__name__ in repr(found.value) and f"rmu_rows {way}" in str(found.value)
