"""Wrong arguments are refused by name: what came and what was wanted."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from undo_kernels.ops.dispatch import LossReduction
from vocab_losses import draw

from undo_core import ops

GOOD = dict(
    zip(
        ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight"),
        draw(9, 37, 6, 6, dtype=torch.float64),
        strict=True,
    )
)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"student_weight": torch.zeros(37, 5, dtype=torch.float64)}, "student_weight"),
        ({"student_hidden": torch.zeros(9, 6, dtype=torch.int64)}, "student_hidden"),
        ({"student_hidden": [1, 2]}, "student_hidden"),
        ({"teacher_hidden": torch.zeros(8, 6, dtype=torch.float64)}, "teacher_hidden"),
        ({"teacher_weight": torch.zeros(36, 6, dtype=torch.float64)}, "teacher_weight"),
        ({"mask": torch.ones(9)}, "mask"),
        ({"mask": torch.ones(8, dtype=torch.bool)}, "mask"),
        ({"token_weight": torch.ones(9, 1)}, "token_weight"),
        ({"divergence": "backward"}, "divergence"),
        ({"divergence": "jsd", "beta": 0.0}, "beta"),
        ({"divergence": "jsd", "beta": 1.0}, "beta"),
        ({"temperature": 0.0}, "temperature"),
        ({"student_softcap": -1.0}, "student_softcap"),
        ({"teacher_softcap": 0}, "teacher_softcap"),
        ({"student_scale": math.nan}, "student_scale"),
        ({"student_bias": torch.zeros(36)}, "student_bias"),
        ({"vocab_size": 38}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"teacher_lse": torch.zeros(3)}, "teacher_lse"),
        ({"labels": torch.zeros(9), "label_weight": 1.0}, "labels"),
        ({"labels": torch.full((9,), 37), "label_weight": 1.0}, "labels"),
        ({"label_weight": -1.0}, "label_weight"),
        ({"reduction": "median"}, "reduction"),
        ({"normalizer": 0.0}, "normalizer"),
        ({"normalizer": torch.ones(2)}, "normalizer"),
        ({"max_counted": -1}, "max_counted"),
        ({"plan": "magic"}, "plan"),
        ({"workspace_bytes": 0}, "workspace_bytes"),
        ({"workspace_bytes": 2**63}, "workspace_bytes"),
        ({"max_counted": 2**63}, "max_counted"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": 1e-46}, "temperature"),
        ({"student_softcap": 1e-46}, "student_softcap"),
        ({"teacher_softcap": 1e39}, "teacher_softcap"),
        ({"student_scale": -1e39}, "student_scale"),
        ({"normalizer": 1e-46}, "normalizer"),
        ({"label_weight": 1e39}, "label_weight"),
        ({"temperature": torch.ones(2, 2)}, "temperature"),
        ({"normalizer": 10**5000}, "normalizer"),
        ({"normalizer": torch.tensor(1j)}, "normalizer"),
        ({"normalizer": torch.ones((), device="meta")}, "normalizer"),
        ({"divergence": torch.ones(2)}, "divergence"),
        ({"return_stats": torch.ones(2)}, "return_stats"),
        ({"student_hidden": torch.zeros(9, 6).to_sparse()}, "student_hidden"),
        ({"student_bias": torch.nested.nested_tensor([torch.zeros(37)])}, "student_bias"),
        ({"accumulate_into": torch.zeros(37, 6).to_sparse()}, "accumulate_into"),
        ({"labels": torch.zeros(9, dtype=torch.complex64), "label_weight": 1.0}, "labels"),
        ({"labels": torch.zeros(9).long(), "label_weight": 1.0, "ignore_index": "none"}, "ignore_index"),
        ({"labels": torch.zeros(9).long(), "label_weight": 1.0, "ignore_index": 2**63}, "ignore_index"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes, argument):
    with pytest.raises(ValueError, match=f"^{argument}: got .*, wanted "):
        ops.linear_kl_div(**{**GOOD, **changes})


@pytest.mark.parametrize(("entries", "width"), [(0, 6), (37, 0)])
def test_a_head_has_entries_and_a_width(entries, width):
    hidden, weight = torch.zeros(9, width), torch.zeros(entries, width)
    with pytest.raises(ValueError, match=r"^weight: got shape .*, wanted \[V, d\] with V >= 1 and d >= 1"):
        ops.linear_lse(hidden, weight)
    with pytest.raises(ValueError, match=r"^student_logits: got shape .*, wanted \[..., V\] with V >= 1"):
        ops.kl_div(torch.zeros(9, 0), torch.zeros(9, 0))


def test_an_error_is_one_short_line():
    with pytest.raises(ValueError, match=r"^reduction: got an integer of 16610 bits, wanted one of mean, sum, none$"):
        ops.linear_kl_div(**GOOD, reduction=10**5000)
    with pytest.raises(ValueError, match=r"^plan: got a tensor of shape \(9, 9\) and torch.float32, wanted one of auto"):
        ops.linear_kl_div(**GOOD, plan=torch.zeros(9, 9))
    with pytest.raises(ValueError) as error:
        ops.linear_kl_div(**GOOD, mask="m\n" * 9999, divergence="d\n" * 9999)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_bad_sparse_teachers_are_named():
    h, w, _, _ = draw(2, 11, 4)
    logprobs = torch.full((2, 2), -2.0)
    for index in ([[0, 0], [1, 2]], [[0, 11], [1, 2]], [[0, -2], [1, 2]]):
        with pytest.raises(ValueError, match=r"^teacher_indices: got"):
            ops.linear_sparse_kl_div(h, w, torch.tensor(index), logprobs)
    with pytest.raises(ValueError, match=r"^teacher_logprobs: got"):
        ops.linear_sparse_kl_div(h, w, torch.zeros(2, 3, dtype=torch.long), logprobs)
    index = torch.tensor([[0, 1], [1, 2]])
    for wrong in (index.to(torch.complex64), index.bool(), index.to_sparse(), index.to("meta")):
        with pytest.raises(ValueError, match=r"^teacher_indices: got"):
            ops.linear_sparse_kl_div(h, w, wrong, logprobs)
    with pytest.raises(ValueError, match=r"^teacher_logprobs: got device meta"):
        ops.linear_sparse_kl_div(h, w, index, logprobs.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_logits_in_the_place_of_log_probabilities_are_refused(dtype):
    hidden, weight, *_ = draw(5, 64)
    z = 3 * torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    indices = torch.arange(64).expand(5, 64)
    right = z.log_softmax(-1).to(dtype)
    assert ops.linear_sparse_kl_div(hidden, weight, indices, right).isfinite()  # sums to 1 up to the dtype's rounding
    for wrong in (z.to(dtype), right.index_fill(1, torch.tensor([3]), 0.5), right + 0.7):
        with pytest.raises(ValueError, match=r"^teacher_logprobs: got a token whose exponentials sum to .*, wanted log-prob"):
            ops.linear_sparse_kl_div(hidden, weight, indices, wrong)
    unread = right.clone()
    unread[0] = 5.0
    unread[1, 7] = 5.0
    padded = indices.clone()
    padded[1, 7] = -1
    mask = torch.arange(5) > 0
    assert ops.linear_sparse_kl_div(hidden, weight, padded, unread, mask=mask).isfinite()


def test_a_bound_on_the_counted_tokens_waits_for_no_device():
    """Without a mask both numbers are the host's: copying one to a GPU would wait for it, and a graph could not be captured."""
    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name().split(".")[0])
            return func(*args, **(kwargs or {}))

    for most, spoilt in ((5, True), (6, False)):
        by = LossReduction.checked(torch.Size([6]), torch.device("cpu"), None, "mean", None, most)
        with Watch():
            factor = by.factor(None, 6, torch.device("cpu"), torch.float32)
        assert factor.isnan().all() == spoilt
    assert set(names) <= {"aten::ones", "aten::full_like", "aten::div"}, names


def test_a_label_to_ignore_may_be_an_integer_of_numpy():
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([1, -7, 2])
    own, numpys = (ops.linear_cross_entropy(hidden, weight, labels, ignore_index=index) for index in (-7, np.int64(-7)))
    assert torch.equal(own, numpys)


@pytest.mark.parametrize("plan", ["direct", "chunk", "recompute"])
def test_a_normalizer_has_no_gradient(plan):
    hidden, weight, normalizer = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), torch.tensor(2.0, requires_grad=True)
    loss = ops.linear_uniform_kl(hidden, weight, normalizer=normalizer, plan=plan)
    assert torch.autograd.grad(loss, [hidden, normalizer], allow_unused=True)[1] is None


def test_logits_that_share_memory_are_not_overwritten():
    """Each of these got a wrong gradient, or an error of torch's in the backward: what one row writes, another one reads."""
    base = torch.randn(200)
    logits, other = base[:54].view(6, 9), torch.randn(6, 9)
    for student, teacher in (
        (base[:9].expand(6, 9), other),
        (base.as_strided((6, 9), (3, 1)), other),
        (base[9:63].view(6, 9), logits),
        (torch._neg_view(logits), other),
    ):
        student = student.detach().requires_grad_()
        assert ops.kl_div(student, teacher).isfinite()
        with pytest.raises(ValueError, match=r"^inplace_grad: got .*student_logits.*, wanted "):
            ops.kl_div(student, teacher, inplace_grad=True)
