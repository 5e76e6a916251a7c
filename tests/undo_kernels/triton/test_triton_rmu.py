"""The Triton loss of RMU, on a GPU or interpreted, against its formula in float64 on the CPU."""

import itertools

import pytest
import torch
from rounding import gamma, relative, unit
from undo_kernels.library.backends import implementation_on
from undo_kernels.triton import rmu

# The interpreter is numpy: it warns where a kernel meets the NaN and the infinities that a test feeds it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cpu" if rmu.INTERPRETED else "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of storing the gradient. The interpreter cuts bfloat16 off where GPUs round it; float16's gradient stays float32.
STORED = {torch.float32: 0.0, torch.bfloat16: (2 if rmu.INTERPRETED else 1) * unit(torch.bfloat16), torch.float16: 0.0}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(hidden, target, factor, coefficient=6.5):
    got, gradient = implementation_on("rmu_loss", "triton")(
        hidden.to(DEVICE), target.to(DEVICE), None if factor is None else factor.to(DEVICE), coefficient, True
    )
    rows, width = hidden.shape
    weight = torch.full((rows,), 1 / rows).double() if factor is None else factor.double()
    live = (weight != 0)[:, None]
    difference = torch.where(live, hidden.double() - coefficient * target.double(), 0.0)
    loss = float((weight * difference.square().mean(-1)).sum())
    wanted = 2 * weight[:, None] * difference / width
    sizes = torch.where(live, hidden.double().abs() + coefficient * target.double().abs(), 0.0)
    more = 1 + float(sizes.norm() / difference.norm())  # how much larger the two are than their difference
    # A row is summed in parts of at most 1,024 terms, then the parts, then the rows.
    terms = 8 + min(width, 1024 + -(-width // 1024)) + rows
    assert float(got) == pytest.approx(loss, rel=gamma(terms) * more)
    assert relative(gradient.cpu(), wanted) <= STORED[hidden.dtype] + gamma(8) * more
    assert (gradient.cpu()[~live[:, 0]] == 0).all()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (5, 257), (3, 2304), (2, 4099)], ids=str)
def test_loss_and_gradient(shape, dtype, frozen):
    target = drawn(*shape, seed=1) if frozen else drawn(shape[1], seed=1)
    factor = torch.rand(shape[0], generator=torch.Generator().manual_seed(2)) + 0.1
    for weights in (None, factor):
        check(drawn(*shape).to(dtype), target, weights)


def test_rows_that_do_not_count_are_not_read():
    hidden = drawn(4, 40)
    hidden[1], hidden[3, 2] = torch.nan, torch.inf
    check(hidden, drawn(40, seed=1), torch.tensor([0.5, 0.0, 1.5, 0.0]))


def test_strided_rows_and_every_dtype_of_the_target():
    for hidden, target in itertools.product(DTYPES, DTYPES):
        wide = drawn(6, 80).to(DEVICE, hidden)[:, 8:41]
        aim = drawn(6, 80, seed=1).to(DEVICE, target)[:, 3:36]
        got, gradient = implementation_on("rmu_loss", "triton")(wide, aim, None, 2.0, True)
        same, again = implementation_on("rmu_loss", "triton")(wide.contiguous(), aim.contiguous(), None, 2.0, True)
        assert torch.equal(got, same) and torch.equal(gradient, again)
        check(wide.cpu(), aim.cpu(), None, 2.0)


def test_no_gradient_where_none_is_needed():
    loss, gradient = implementation_on("rmu_loss", "triton")(drawn(3, 8).to(DEVICE), drawn(8).to(DEVICE), None, 1.0, False)
    assert loss > 0 and gradient.numel() == 0
