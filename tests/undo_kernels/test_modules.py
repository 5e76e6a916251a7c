"""The losses as modules: equal to the functions, options checked at construction, usable as any ``nn.Module``."""

import copy
import inspect

import pytest
import torch
from undo_kernels import LinearCrossEntropyLoss, LinearKLDivLoss, ops

LABELS = torch.tensor([[1, -100, 3], [0, 5, 2]])
MASK = torch.tensor([[True, True, False], [True, True, True]])


def draw():
    generator = torch.Generator().manual_seed(0)
    h, w, th, tw = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 4), (11, 4), (2, 3, 5), (11, 5)))
    return h.requires_grad_(), w.requires_grad_(), th, tw


def assert_same(loss, wanted, leaves):
    assert torch.equal(loss, wanted)
    for got, want in zip(*(torch.autograd.grad(value.sum(), leaves) for value in (loss, wanted)), strict=True):
        assert torch.equal(got, want)


def test_the_divergence_is_the_functions():
    h, w, th, tw = draw()
    options = {
        "divergence": "jsd",
        "beta": 0.3,
        "temperature": 2.0,
        "student_scale": 0.5,
        "teacher_scale": 0.7,
        "vocab_size": 9,
    }
    options |= {"student_softcap": 3.0, "teacher_softcap": 4.0, "label_weight": 0.2, "ignore_index": -100, "reduction": "none"}
    options |= {"plan": "chunk", "workspace_bytes": 1 << 20}
    tensors = {
        "labels": LABELS,
        "student_bias": torch.ones(11),
        "teacher_bias": torch.zeros(11),
        "token_weight": torch.rand(2, 3),
    }
    loss = LinearKLDivLoss(**options)
    assert_same(loss(h, w, th, tw, MASK, **tensors), ops.linear_kl_div(h, w, th, tw, mask=MASK, **options, **tensors), [h, w])
    assert options == {name: getattr(loss, name) for name in options} and "divergence='jsd'" in repr(loss)


def test_the_cross_entropy_is_the_functions():
    h, w, *_ = draw()
    options = {"temperature": 2.0, "scale": 0.5, "softcap": 3.0, "vocab_size": 9, "reduction": "sum", "ignore_index": -100}
    options |= {"plan": "recompute", "workspace_bytes": 1 << 20}
    tensors = {"bias": torch.ones(11), "token_weight": torch.rand(2, 3), "normalizer": torch.tensor(3.0), "max_counted": 6}
    loss = LinearCrossEntropyLoss(**options)
    got = loss(h, w, LABELS, MASK, **tensors)
    assert_same(got, ops.linear_cross_entropy(h, w, LABELS, mask=MASK, **options, **tensors), [h, w])


@pytest.mark.parametrize(
    ("module", "function"), [(LinearKLDivLoss, ops.linear_kl_div), (LinearCrossEntropyLoss, ops.linear_cross_entropy)]
)
def test_every_argument_of_the_function_is_an_option_or_an_argument_of_forward(module, function):
    names = {*inspect.signature(module).parameters, *inspect.signature(module.forward).parameters} - {"self"}
    assert set(inspect.signature(function).parameters) - {"return_stats"} == names
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    assert all(defaults[name] == parameter.default for name, parameter in inspect.signature(module).parameters.items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("divergence", "backward"), ("temperature", 0.0), ("student_softcap", -1.0), ("teacher_scale", float("nan")),
        ("vocab_size", 0), ("label_weight", -1.0), ("reduction", "max"), ("plan", "fast"), ("workspace_bytes", 0),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_at_construction(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: got"):
        LinearKLDivLoss(**{name: value})


def test_the_modules_have_no_state_and_can_be_copied():
    h, w, *_ = draw()
    head = torch.nn.ModuleDict({"loss": LinearCrossEntropyLoss(softcap=5.0)})
    assert not head.state_dict() and not list(head.parameters())
    twin = copy.deepcopy(head)
    assert torch.equal(twin["loss"](h, w, LABELS), head["loss"](h, w, LABELS))


def test_the_method_re_exports_every_op():
    from undo_core import ops as re_exported

    assert set(re_exported.__all__) == {*ops.__all__, "LinearCrossEntropyLoss", "LinearKLDivLoss"}
    assert all(getattr(re_exported, name) is getattr(ops, name) for name in ops.__all__)
