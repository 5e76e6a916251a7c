"""The plan that a call would follow, without running it."""

from __future__ import annotations

import torch

from undo_kernels import cpu, reference
from undo_kernels.ops import arguments, checks
from undo_kernels.ops.dispatch import choose_backend
from undo_kernels.plan import Plan
from undo_kernels.problem import Problem
from undo_kernels.projection import Projection
from undo_kernels.triton import plan as triton_plan  # which imports without triton

_PLANS = {"reference": reference.plan, "cpu": cpu.plan, "triton": triton_plan}


def explain(
    op: str,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device | str,
    workspace_bytes: int | None = None,
    plan: str = "auto",
) -> Plan:
    """Returns the plan that ``op`` would follow, with its predicted bytes, FLOPs and workspace; it prints as a table.

    ``undo_kernels.recorded()`` lists the backend and the plan of the calls that really ran.

    Args:
        op: name of a linear op, such as ``linear_kl_div``.
        shapes: of its arguments by name: ``hidden`` or ``student_hidden`` ``[..., d]``, ``weight`` or ``student_weight`` ``[V, d]``,
            and the teacher's for ``linear_kl_div``.
        dtype: of the hidden states and weights.
        device: where they are.
        workspace_bytes: bound on the memory for logits.
        plan: as in the op's own argument.
    """
    targets = {
        "linear_kl_div": "forward",
        "linear_lse": "own",
        "linear_cross_entropy": "own",
        "linear_uniform_kl": "uniform",
        "linear_sparse_kl_div": "bucket",
    }
    checks.choice("op", op if isinstance(op, str) else type(op).__name__, tuple(targets))
    if not isinstance(shapes, dict):
        checks.fail(
            "shapes", type(shapes).__name__, "a dictionary of shapes by argument, such as {'student_hidden': (512, 320), ...}"
        )
    prefixes = ("student_", "teacher_") if op == "linear_kl_div" else ("",)
    for name in [prefix + part for prefix in prefixes for part in ("hidden", "weight")]:
        if name not in shapes:
            checks.fail("shapes", sorted(shapes), f"an entry {name}")
    if dtype not in checks.FLOATS:
        checks.fail("dtype", dtype, "float32, bfloat16, float16 or float64 of torch")
    where = checks.device(device)
    sides = []
    for prefix in prefixes:
        hidden, weight = (
            torch.empty(checks.sizes(f"shapes[{prefix + part!r}]", shapes[prefix + part], wanted), dtype=dtype, device="meta")
            for part, wanted in (("hidden", "(..., d)"), ("weight", "(V, d)"))
        )
        checks.head(prefix, hidden, weight, None)
        sides.append(Projection(hidden.reshape(-1, hidden.shape[-1]), weight))
    factor = torch.empty(sides[0].tokens, device="meta")
    problem = Problem(
        student=sides[0],
        teacher=sides[1] if len(sides) > 1 else None,
        target=targets[op],
        factor=factor,
        label_factor=factor if targets[op] == "own" else None,
        needs=(op != "linear_lse", op != "linear_lse", False),
        **arguments.memory(plan, workspace_bytes),
    )
    describe = _PLANS[choose_backend(problem, dtype == torch.float64, where)].describe
    return describe(op, problem)
