"""Wrong arguments are refused by name: what came and what was wanted."""

import math

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
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes, argument):
    with pytest.raises(ValueError, match=f"^{argument}: got .*, wanted "):
        ops.linear_kl_div(**{**GOOD, **changes})


def test_bad_sparse_teachers_are_named():
    h, w, _, _ = draw(2, 11, 4)
    logprobs = torch.full((2, 2), -2.0)
    for index in ([[0, 0], [1, 2]], [[0, 11], [1, 2]], [[0, -2], [1, 2]]):
        with pytest.raises(ValueError, match=r"^teacher_indices: got"):
            ops.linear_sparse_kl_div(h, w, torch.tensor(index), logprobs)
    with pytest.raises(ValueError, match=r"^teacher_logprobs: got"):
        ops.linear_sparse_kl_div(h, w, torch.zeros(2, 3, dtype=torch.long), logprobs)


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
