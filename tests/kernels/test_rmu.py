import pytest
import torch

from undo_core import ops


@pytest.mark.parametrize("normalize", ["all", "masked", "sequence"])
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_and_gradient(normalize, frozen):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randn(*((3, 5, 4) if frozen else (4,)), generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    got = ops.rmu_loss(hidden, target, coefficient=6.5, mask=mask, normalize=normalize)
    square = (hidden - 6.5 * target) ** 2
    wanted = {
        "all": square.mean(),
        "masked": (square.mean(-1) * mask).sum() / 7,
        "sequence": (square[0, :2].mean() + square[1].mean()) / 2,
    }[normalize]
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got * 2, hidden), torch.autograd.grad(wanted * 2, hidden))
    assert torch.autograd.gradcheck(lambda h: ops.rmu_loss(h, target, coefficient=6.5, mask=mask, normalize=normalize), hidden)


def test_masked_garbage_has_no_influence():
    hidden = torch.ones(1, 3, 2, requires_grad=True)
    dirty = torch.tensor([[[1.0, 1.0], [torch.nan, 1.0], [torch.inf, 1.0]]], requires_grad=True)
    mask = torch.tensor([[True, False, False]])
    for normalize in ("masked", "sequence"):
        loss = ops.rmu_loss(dirty, torch.zeros(2), mask=mask, normalize=normalize)
        (gradient,) = torch.autograd.grad(loss, dirty)
        assert loss == 1 and not gradient[0, 1:].any() and gradient[0, 0].any()
        assert ops.rmu_loss(hidden, torch.zeros(2), mask=torch.zeros(1, 3, dtype=torch.bool), normalize=normalize) == 0


def test_sixteen_bit_activations_are_summed_in_float32():
    hidden = torch.full((4096, 64), 0.1, dtype=torch.bfloat16)
    exact = float(hidden[0, 0].double() ** 2)
    assert float(ops.rmu_loss(hidden, torch.zeros(64))) == pytest.approx(exact, rel=1e-5)


def test_the_direction_depends_on_the_seed_alone():
    for law in ("gaussian", "uniform"):
        first, again, other = (ops.misdirection(1000, seed, law) for seed in (5, 5, 6))
        assert torch.equal(first, again) and abs(float(first @ other)) < (0.2 if law == "gaussian" else 1)
        assert float(first.norm()) == pytest.approx(1, abs=1e-6)
    assert abs(float(ops.misdirection(4096, 1).mean())) < 5 / 4096 and (ops.misdirection(64, 1, "uniform") > 0).all()


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"hidden": torch.zeros(2, 3, dtype=torch.int64)}, "hidden"),
        ({"target": torch.zeros(4)}, "target"),
        ({"coefficient": float("nan")}, "coefficient"),
        ({"normalize": "tokens"}, "normalize"),
        ({"mask": torch.ones(2)}, "mask"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask"),
    ],
)
def test_bad_arguments_are_named(changes, argument):
    good = {"hidden": torch.zeros(2, 3), "target": torch.zeros(3)}
    with pytest.raises(ValueError, match=f"^{argument}: got .*, wanted "):
        ops.rmu_loss(**{**good, **changes})
