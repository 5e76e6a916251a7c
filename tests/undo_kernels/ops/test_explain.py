"""``ops.explain``: a plan predicted from shapes."""

import pytest
import torch
from bfloat16_ways import CONVERTED
from undo_kernels import backend, cpu

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


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"shapes": {"hidden": 5, "weight": (10, 8)}}, r"shapes\['hidden'\]"),
        ({"shapes": {"hidden": (-3, 8), "weight": (10, 8)}}, r"shapes\['hidden'\]"),
        ({"shapes": {"hidden": (3, 8), "weight": (2**40, 2**40)}}, r"shapes\['weight'\]"),
        ({"shapes": {"hidden": (3, 8), "weight": (10, 9)}}, "weight"),
        ({"dtype": "float32"}, "dtype"),
        ({"dtype": torch.int32}, "dtype"),
        ({"device": "nowhere"}, "device"),
        ({"device": 10**400}, "device"),
    ],
)
def test_bad_arguments_are_named(changes, argument):
    good = {"op": "linear_lse", "shapes": {"hidden": (3, 8), "weight": (10, 8)}, "dtype": torch.float32, "device": "cpu"}
    with pytest.raises(ValueError, match=f"^{argument}: got .*, wanted "):
        ops.explain(**{**good, **changes})


@pytest.mark.skipif(cpu.vocab_loss.kernels is None, reason="no C++ compiler was here when undo-core was installed")
def test_explain_says_how_heads_are_multiplied(bfloat16):
    def products(dtype, width=320):
        shapes = {"hidden": (512, width), "weight": (32000, width)}
        return ops.explain("linear_cross_entropy", shapes, dtype, "cpu").products

    assert products(torch.float32) == "in float32"
    assert products(torch.float16).startswith("float16 converted to float32: ")
    if bfloat16 == CONVERTED:
        assert products(torch.bfloat16).startswith("bfloat16 converted to float32: ")
    else:
        assert products(torch.bfloat16) == f"bfloat16 by {bfloat16} with float32 logits; the gradient is rounded to bfloat16"
        assert products(torch.bfloat16, 40).endswith(f"{bfloat16} takes widths that are multiples of 32")
