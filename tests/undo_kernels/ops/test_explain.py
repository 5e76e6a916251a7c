"""``ops.explain``: a plan predicted from shapes."""

import pytest
import torch
from undo_kernels import backend

from undo_core import ops


def test_explain_prints_a_table():
    shapes = {"student_hidden": (64, 8), "student_weight": (1000, 8), "teacher_hidden": (64, 8), "teacher_weight": (1000, 8)}
    plan = ops.explain("linear_kl_div", shapes, torch.float32, "cpu")
    assert plan.workspace_bytes == 64 * 1000 * 4 * 7 and plan.flops == 2 * 4 * 64 * 1000 * 8 and "direct" in str(plan)
    with backend("reference"):
        bounded = ops.explain(
            "linear_lse", {"hidden": (64, 8), "weight": (1000, 8)}, torch.float32, "cpu", workspace_bytes=120_000
        )
    assert bounded.tokens_per_chunk == 10 and bounded.workspace_bytes <= 120_000
    with pytest.raises(ValueError, match=r"^op: got"):
        ops.explain("linear_magic", {}, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"^shapes: got Tensor, wanted a dictionary"):
        ops.explain("linear_kl_div", torch.ones(2, 3), torch.float32, "cpu")
