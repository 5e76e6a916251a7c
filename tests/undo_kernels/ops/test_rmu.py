"""RMU's loss on every backend against the formula written out in float64, on shapes, dtypes and values chosen to be hard."""

import itertools
import subprocess
import sys
import textwrap

import pytest
import torch
from rounding import assert_as_exact_as, gamma, relative, unit
from torch.utils.checkpoint import checkpoint
from undo_kernels import backend, cpu, recorded, triton

from undo_core import ops

NORMALIZE = ("all", "masked", "sequence")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
built = pytest.mark.skipif(cpu.vocab_loss.kernels is None, reason="no C++ compiler was here when undo-core was installed")
interpreted = pytest.mark.skipif(
    not triton.rmu.INTERPRETED, reason="CPU tensors; test_triton_rmu.py runs on the GPU that is here"
)
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")
kernels = pytest.mark.parametrize(
    "name", [pytest.param("cpu", marks=built), pytest.param("triton", marks=[quiet, interpreted])]
)


@pytest.fixture(params=[*cpu.vector_units(), pytest.param("triton", marks=interpreted), "reference"])
def on(request, monkeypatch):
    """Each way to run the op; the C++ of each instruction set that is here."""
    if request.param in ("triton", "reference"):
        with backend(request.param), recorded() as calls:
            yield request.param
        assert calls and {call.backend for call in calls} == {request.param}
        return
    monkeypatch.setenv("UNDO_CPU_ISA", request.param)
    with backend("cpu"), recorded() as calls:
        yield request.param
    assert calls and {(call.backend, call.form) for call in calls} == {("cpu", request.param)}


def draw(shape, frozen, dtype=torch.float32, target_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = (2 * torch.randn(shape, generator=generator)).to(dtype)
    target = torch.randn(shape if frozen else shape[-1:], generator=generator).to(target_dtype or dtype)
    return hidden, target, torch.rand(shape[:-1], generator=generator) < 0.7


def oracle(hidden, target, coefficient, mask, normalize):
    """Loss and gradient, one counted row at a time."""
    hidden = hidden.detach().double()
    difference = hidden - coefficient * target.double()
    gradient, loss, d = torch.zeros_like(hidden), 0.0, hidden.shape[-1]
    sequences = [index for index in range(mask.flatten(0, -2).shape[0])] if mask.ndim > 1 else [0]
    flat, gradient_, mask_ = (t.reshape(len(sequences), -1, *t.shape[mask.ndim :]) for t in (difference, gradient, mask))
    live = sum(bool(row.any()) for row in mask_)
    for i, j in itertools.product(range(flat.shape[0]), range(flat.shape[1])):
        if normalize == "all":
            weight = 1 / mask_.numel()
        elif not mask_[i, j]:
            continue
        else:
            weight = 1 / int(mask_.sum()) if normalize == "masked" else 1 / (int(mask_[i].sum()) * live)
        loss += weight * float(flat[i, j].square().sum()) / d
        gradient_[i, j] = 2 * weight * flat[i, j] / d
    return loss, gradient


def plain(hidden, target, coefficient, mask, normalize):
    """What one would write in torch, in the inputs' dtype."""
    square = (hidden - coefficient * target).square()
    if normalize == "all":
        return square.mean()
    per_token = torch.where(mask, square.mean(-1), 0)
    if normalize == "masked":
        return per_token.sum() / mask.sum().clamp_min(1)
    counted = mask.sum(-1)
    return (per_token.sum(-1) / counted.clamp_min(1)).sum() / (counted > 0).sum().clamp_min(1)


FLOAT = gamma(8)  # of a gradient: difference, product, division by the width and the count, the factor, grad_output


def stored(dtype):
    """Relative error of a gradient that is rounded to its dtype before grad_output is applied and after, cut off by the interpreter."""
    return {torch.float32: 0.0, torch.bfloat16: 4 * unit(torch.bfloat16), torch.float16: 2 * unit(torch.float16)}[dtype]


def sum_error(hidden):
    """Relative error of the loss: every backend sums a row in parts of at most 1,024 terms, and then the parts."""
    width = hidden.shape[-1]
    return gamma(8 + min(width, 1024 + -(-width // 1024)))


def cancellation(hidden, target, coefficient):
    """How much larger ``hidden`` and ``coefficient * target`` are than their difference."""
    hidden, aim = hidden.double(), coefficient * target.double().expand_as(hidden)
    return 1 + float((hidden.norm() + aim.norm()) / (hidden - aim).norm())


def run(function, hidden, *arguments, scale=1.0, **options):
    leaf = hidden.clone().requires_grad_()
    loss = function(leaf, *arguments, **options)
    return loss.detach(), *torch.autograd.grad(loss * scale, leaf)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 257), (4, 2, 1), (2, 7, 3), (2, 2, 2, 33)], ids=str)
def test_as_exact_as_torch_in_the_same_dtype(on, shape, dtype, frozen, normalize):
    hidden, target, mask = draw(shape, frozen, dtype)
    loss, gradient = oracle(hidden, target, 6.5, mask, normalize)
    got = run(ops.rmu_loss, hidden, target, coefficient=6.5, mask=mask, normalize=normalize)
    same = run(plain, hidden, target, 6.5, mask, normalize)
    assert got[1].dtype == dtype and got[0].dtype == torch.float32
    # Triton's interpreter cuts bfloat16 off where GPUs round it.
    room = FLOAT + (2 * unit(dtype) if on == "triton" and dtype == torch.bfloat16 else 0.0)
    assert abs(float(got[0]) - loss) <= abs(float(same[0]) - loss) + sum_error(hidden) * loss
    assert relative(got[1], gradient) <= relative(same[1], gradient) + room * cancellation(hidden, target, 6.5)


@pytest.mark.parametrize(
    "kinds", [pair for pair in itertools.product(DTYPES, (*DTYPES, torch.float64)) if pair[0] != pair[1]], ids=str
)
def test_the_target_has_a_dtype_of_its_own(on, kinds):
    for frozen in (False, True):
        hidden, target, mask = draw((2, 3, 70), frozen, *kinds)
        loss, gradient = oracle(hidden, target, 1.5, mask, "masked")
        got = run(ops.rmu_loss, hidden, target, coefficient=1.5, mask=mask, normalize="masked")
        assert float(got[0]) == pytest.approx(loss, rel=sum_error(hidden) * cancellation(hidden, target, 1.5))
        assert relative(got[1], gradient) < stored(kinds[0]) + FLOAT * cancellation(hidden, target, 1.5)


def test_every_sixteen_bit_number_is_read_and_written(on):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        hidden = every.view(dtype)
        size = hidden.double().abs()
        hidden = hidden[(size < 1e18) & ((size > 1e-30) | (size == 0))]  # beyond, a square or the gradient leaves the range
        hidden = hidden[len(hidden) % 1021 :].view(-1, 1021)
        count = hidden.numel()
        _, gradient = run(ops.rmu_loss, hidden, torch.zeros(1021), scale=count / 2)
        # A bfloat16 gradient is rounded before grad_output is applied and after; the interpreter cuts off instead.
        room = (2**-6 if on == "triton" else 2**-7) if dtype == torch.bfloat16 else 2**-10
        close = (gradient.double() - hidden.double()).abs() <= room * hidden.double().abs()
        assert close.all(), hidden[~close]


@pytest.mark.parametrize("frozen", [False, True])
def test_strides(on, frozen):
    base, target, _ = draw((4, 6, 40), frozen)
    views = {
        "wide rows": (base[..., 4:21], target[..., 4:21]),
        "every other": (base[..., ::2], target[..., ::2]),
        "transposed": (base.transpose(0, 1), target.transpose(0, 1) if frozen else target),
        "shifted": (base[:, 1:], target[:, 1:] if frozen else target),
        "expanded": (base[:1].expand(4, 6, 40), target),
    }
    for name, (hidden, aim) in views.items():
        mask = torch.ones(hidden.shape[:-1], dtype=torch.bool)
        loss, gradient = oracle(hidden, aim, 2.0, mask, "all")
        leaf = hidden.detach().requires_grad_()
        value = ops.rmu_loss(leaf, aim, coefficient=2.0)
        more = cancellation(hidden, aim, 2.0)
        assert float(value.detach()) == pytest.approx(loss, rel=sum_error(hidden) * more), name
        assert relative(torch.autograd.grad(value, leaf)[0], gradient) < FLOAT * more, name
    mask = torch.rand(6, 4).T < 0.5
    hidden, aim = views["wide rows"]
    got = run(ops.rmu_loss, hidden, aim, mask=mask, normalize="sequence")
    assert relative(got[1], oracle(hidden, aim, 1.0, mask, "sequence")[1]) < FLOAT * cancellation(hidden, aim, 1.0)


def test_no_tokens(on):
    for normalize, shape in itertools.product(NORMALIZE, [(0, 5), (0, 3, 5), (3, 0, 5)]):
        if normalize == "sequence" and len(shape) < 3:
            continue
        for frozen in (False, True):
            hidden, target, mask = draw(shape, frozen)
            loss, gradient = run(ops.rmu_loss, hidden, target, mask=mask, normalize=normalize)
            assert loss == 0 and gradient.shape == shape


def test_one_row_of_its_own_target(on):
    hidden, target, _ = draw((9,), False)
    loss, gradient = run(ops.rmu_loss, hidden, target, coefficient=3.0)
    difference, more = hidden.double() - 3 * target.double(), cancellation(hidden, target, 3.0)
    assert float(loss) == pytest.approx(float(difference.square().mean()), rel=sum_error(hidden) * more)
    assert relative(gradient, 2 * difference / 9) <= FLOAT * more


def test_masked_garbage_has_no_influence(on):
    dirty = torch.tensor([[[1.0, 1.0], [torch.nan, 1.0], [torch.inf, 1.0]]])
    clean_target, dirty_target = torch.zeros(2), torch.tensor([[[0.0, 0.0], [torch.nan, 0.0], [0.0, torch.inf]]])
    mask = torch.tensor([[True, False, False]])
    for normalize, dtype in itertools.product(("masked", "sequence"), DTYPES):
        for target in (clean_target, dirty_target):
            loss, gradient = run(ops.rmu_loss, dirty.to(dtype), target, mask=mask, normalize=normalize)
            assert loss == 1 and not gradient[0, 1:].any() and gradient[0, 0].any()
            loss, gradient = run(ops.rmu_loss, dirty.to(dtype), target, mask=mask & False, normalize=normalize)
            assert loss == 0 and not gradient.any()
    for dtype in DTYPES:  # and what counts is not hidden
        assert run(ops.rmu_loss, dirty.to(dtype), clean_target)[1].isnan().any()


def test_an_infinite_activation_has_an_infinite_gradient(on):
    """At every width: the slope is added in two parts, of which the second may have the other sign."""
    for width in range(1, 12):
        hidden = torch.ones(3, width)
        hidden[0, 0], hidden[1, -1] = torch.inf, -torch.inf
        gradient = run(ops.rmu_loss, hidden, torch.zeros(width))[1]
        assert gradient[0, 0] == torch.inf and gradient[1, -1] == -torch.inf and gradient.isinf().sum() == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_loss_scale_keeps_small_gradients(on, dtype):
    """Entries of 1e-8: float16 cannot hold them until the scale is applied."""
    hidden, target, mask = draw((2, 64, 4096), True, dtype)
    hidden = (target.float() + 1e-2 * hidden.float()).to(dtype)
    loss, gradient = oracle(hidden, target, 1.0, mask, "all")
    got = run(ops.rmu_loss, hidden, target, scale=65536.0)
    more = cancellation(hidden, target, 1.0)
    assert relative(got[1], 65536 * gradient) < stored(dtype) + FLOAT * more
    assert float(got[0]) == pytest.approx(loss, rel=sum_error(hidden) * more)


@pytest.mark.parametrize("scale", [1.0, -2.5, 0.0])
def test_grad_output(on, scale):
    hidden, target, mask = draw((2, 3, 5), False)
    got = run(ops.rmu_loss, hidden, target, mask=mask, normalize="masked", scale=scale)[1]
    wanted = scale * oracle(hidden, target, 1.0, mask, "masked")[1]
    assert relative(got, wanted) <= FLOAT * cancellation(hidden, target, 1.0)


def test_a_long_row_is_summed_exactly(on):
    hidden = torch.full((3, 100_003), 0.1, dtype=torch.bfloat16)
    exact = float(hidden[0, 0].double() ** 2)
    assert float(ops.rmu_loss(hidden, torch.zeros(100_003))) == pytest.approx(exact, rel=sum_error(hidden))


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_float64_has_first_and_second_derivatives(normalize):
    hidden, target, mask = draw((3, 5, 4), False, torch.float64)
    loss = lambda h: ops.rmu_loss(h, target, coefficient=6.5, mask=mask, normalize=normalize)  # noqa: E731
    hidden.requires_grad_()
    assert loss(hidden).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, hidden) and torch.autograd.gradgradcheck(loss, hidden)


# ---------------------------------------------------------------- as an op


@kernels
def test_opcheck(name):
    hidden, target, mask = draw((4, 6), True)
    factor = mask.float()
    for dtype, needs, given in ((torch.float32, True, factor), (torch.float16, True, None), (torch.bfloat16, False, factor)):
        leaf = hidden.to(dtype).clone().requires_grad_(needs)
        torch.library.opcheck(torch.ops.undo.rmu_loss.default, (leaf, target[0], given, 2.0, needs, name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_to_one_graph(dtype):
    hidden, target, mask = draw((2, 3, 5), True, dtype)

    def loss(h):
        aim = target.to(h.dtype)
        return 3 * ops.rmu_loss(torch.tanh(h), aim, mask=mask, normalize="sequence") + ops.rmu_loss(h, aim[0, 0])

    results = [
        run(torch.compile(loss, fullgraph=True, backend="aot_eager"), hidden),
        run(loss, hidden),
        run(loss, hidden.double()),
    ]
    for graph, eager, exact in zip(*results, strict=True):
        assert_as_exact_as(graph, eager, exact, gamma(8, dtype))


@kernels
def test_gradients_come_only_where_they_are_asked_for(name):
    hidden, target, _ = draw((4, 6), True)
    with backend(name):
        assert not ops.rmu_loss(hidden, target.requires_grad_()).requires_grad
        loss = ops.rmu_loss(hidden.requires_grad_(), target)
        assert torch.autograd.grad(loss, target, allow_unused=True) == (None,)
        with torch.no_grad():
            assert not ops.rmu_loss(hidden, target).requires_grad
    assert not torch.ops.undo.rmu_loss(hidden.detach(), target, None, 1.0, False, name)[1].numel()


@kernels
def test_a_second_backward_and_a_double_backward_are_refused(name):
    hidden, target, _ = draw((4, 6), True)
    hidden.requires_grad_()
    with backend(name):
        loss = ops.rmu_loss(hidden, target)
        (2 * loss).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="inplace operation"):
            (2 * loss).backward()
        loss = ops.rmu_loss(hidden, target)
        torch.autograd.grad(loss, hidden, retain_graph=True)  # by 1 there is nothing to scale, but the gradient is handed out
        with pytest.raises(RuntimeError, match="inplace operation"):
            torch.autograd.grad(2 * loss, hidden)
        with pytest.raises(RuntimeError, match=r"undo::rmu_loss.*differentiated again"):
            torch.autograd.grad(ops.rmu_loss(hidden, target), hidden, create_graph=True)
        got = torch.autograd.grad(
            checkpoint(lambda h: ops.rmu_loss(torch.tanh(h), target), hidden, use_reentrant=False), hidden
        )
        assert torch.equal(*got, *torch.autograd.grad(ops.rmu_loss(torch.tanh(hidden), target), hidden)), "the same ops again"


@built
def test_the_bits_do_not_depend_on_the_number_of_threads():
    hidden, target, mask = draw((301, 257), True)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.append(run(ops.rmu_loss, hidden, target, mask=mask, normalize="masked"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@built
def test_memory_is_the_gradient_and_a_few_floats_a_token():
    program = """
        import re, sys, torch
        from pathlib import Path
        from undo_core import ops
        status = lambda f: int(re.search(rf"^{f}:\\s+(\\d+)", Path("/proc/self/status").read_text(), re.M)[1]) / 1024
        def step(tokens):
            hidden = torch.ones(tokens, 2048, dtype=torch.bfloat16).requires_grad_()
            mask = torch.ones(tokens, dtype=torch.bool)
            before = status("VmRSS")
            ops.rmu_loss(hidden, torch.ones(2048), mask=mask, normalize="masked").backward()
            return before
        step(64)
        Path("/proc/self/clear_refs").write_text("5")
        before = step(16384)
        print(status("VmHWM") - before)
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is read from Linux's /proc")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert 60 < float(done.stdout) < 80, "64 MiB of gradient"


def test_triton_is_here():
    assert "rmu" in triton.__all__


# ---------------------------------------------------------------- the direction, and mistakes


def test_the_direction_depends_on_the_seed_alone():
    for law in ("gaussian", "uniform"):
        first, again, other = (ops.misdirection(1000, seed, law) for seed in (5, 5, 6))
        # Six standard deviations of a random direction's product with another: one seed in 500 million leaves them.
        assert torch.equal(first, again) and abs(float(first @ other)) < (6 / 1000**0.5 if law == "gaussian" else 1)
        assert float(first.double().norm()) == pytest.approx(1, abs=gamma(1000 + 4))  # the sum under the root, and the division
    assert abs(float(ops.misdirection(4096, 1).mean())) < 6 / 4096 and (ops.misdirection(64, 1, "uniform") > 0).all()
    assert ops.misdirection(8, 2**64 - 1).isfinite().all()
    for arguments, name in (
        ((8, -1), "seed"),
        ((8, 2**64), "seed"),
        ((8, 1.0), "seed"),
        ((8, True), "seed"),
        ((8.0, 1), "width"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got .*, wanted an integer"):
            ops.misdirection(*arguments)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"hidden": torch.zeros(2, 3, dtype=torch.int64)}, "hidden"),
        ({"hidden": torch.zeros(2, 0), "target": torch.zeros(0)}, "hidden"),
        ({"hidden": torch.zeros(3), "target": torch.zeros(3), "normalize": "sequence"}, "hidden"),
        ({"target": torch.zeros(4)}, "target"),
        ({"coefficient": float("nan")}, "coefficient"),
        ({"target": torch.zeros(3).to_sparse()}, "target"),
        ({"normalize": "tokens"}, "normalize"),
        ({"mask": torch.ones(2)}, "mask"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask"),
    ],
)
def test_bad_arguments_are_named(changes, argument):
    good = {"hidden": torch.zeros(2, 3), "target": torch.zeros(3)}
    with pytest.raises(ValueError, match=f"^{argument}: got .*, wanted "):
        ops.rmu_loss(**{**good, **changes})
