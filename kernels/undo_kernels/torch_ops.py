"""The vocabulary losses as ``torch.library`` ops: schema, shapes, gradient; one place for all of them.

``undo::vocab_loss`` computes its gradients in the forward, for a total whose rows' factors are known: each is an output that the
backward scales in place. ``undo::vocab_loss_rows`` returns the rows' losses, and its backward calls ``vocab_loss`` with the
factors that arrived. ``undo::vocab_loss_logits_`` overwrites given logits with their gradient. ``undo::scale_`` multiplies in
place by a device scalar, without the host looking at it.

Their arguments are a :class:`~undo_kernels.problem.Problem`, field by field; the backend is one of them, so that a backward in
another thread runs where the forward ran.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from undo_kernels.library import implementation_on
from undo_kernels.problem import DENSE, Problem, Result, gradient_dtype
from undo_kernels.products import full_precision
from undo_kernels.projection import GivenLogits, Projection

_FIELDS = (
    "Tensor hidden, Tensor? weight, Tensor? bias, Tensor factor, Tensor? label_factor, Tensor? labels, Tensor? counted, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? indices, Tensor? logprobs, "
    "Tensor? lse_s, Tensor? lse_t, str target, float beta, float temperature, float scale, float? softcap, "
    "float teacher_scale, float? teacher_softcap, int? vocab_size, bool[] needs, bool statistics, int? max_counted, "
    "str plan, int? workspace_bytes, float filter_below, str backend"
)
_NAMES = tuple(field.split()[1] for field in _FIELDS.split(", "))
_RESULTS = "(" + ", ".join(["Tensor"] * len(Result._fields)) + ")"
_LOGITS_FIELDS = _FIELDS.replace("Tensor hidden", "Tensor(a!) hidden", 1)

torch.library.define("undo::vocab_loss", f"({_FIELDS}) -> {_RESULTS}")
torch.library.define("undo::vocab_loss_rows", f"({_FIELDS}) -> {_RESULTS}")
torch.library.define("undo::vocab_loss_logits_", f"({_LOGITS_FIELDS}) -> ()")
torch.library.define("undo::scale_", "(Tensor(a!) gradient, Tensor factor) -> ()")


def arguments(problem: Problem, backend: str) -> tuple[Any, ...]:
    """The ops' arguments for a problem, in their order."""
    p, teacher = problem, problem.teacher
    given = isinstance(p.student, GivenLogits)
    return (
        p.student.hidden, None if given else p.student.weight, p.student.bias, p.factor, p.label_factor, p.labels, p.counted,
        None if teacher is None else teacher.hidden, None if teacher is None or given else teacher.weight,
        None if teacher is None else teacher.bias, p.indices, p.logprobs, p.lse_s, p.lse_t, p.target, p.beta,
        p.student.temperature, p.student.scale, p.student.softcap, 1.0 if teacher is None else teacher.scale,
        None if teacher is None else teacher.softcap, p.student.vocab_size, list(p.needs), p.statistics, p.max_counted, p.plan,
        p.workspace_bytes, p.filter_below, backend,
    )  # fmt: skip


def problem_of(*values: Any) -> tuple[Problem, str]:
    """The problem that an op's arguments describe, and the backend: the inverse of :func:`arguments`."""
    a = dict(zip(_NAMES, values, strict=True))

    def side(hidden: torch.Tensor | None, weight: torch.Tensor | None, bias: Any, scale: float, softcap: float | None) -> Any:
        if hidden is None:
            return None
        if weight is None:
            return GivenLogits(hidden, hidden, temperature=a["temperature"], vocab_size=a["vocab_size"])
        return Projection(hidden, weight, bias, scale, softcap, a["temperature"], a["vocab_size"])

    student = side(a["hidden"], a["weight"], a["bias"], a["scale"], a["softcap"])
    teacher = side(a["teacher_hidden"], a["teacher_weight"], a["teacher_bias"], a["teacher_scale"], a["teacher_softcap"])
    same = {
        name: a[name]
        for name in (
            "target", "factor", "label_factor", "labels", "counted", "indices", "logprobs", "beta", "lse_s", "lse_t",
            "statistics", "max_counted", "plan", "workspace_bytes", "filter_below",
        )
    }  # fmt: skip
    return Problem(student=student, teacher=teacher, needs=tuple(a["needs"]), **same), a["backend"]


def _implementation(problem: Problem, backend: str) -> Result:
    with full_precision(problem.student.hidden.device):
        return implementation_on("vocab_loss", backend)(problem)


def _run(*values: Any) -> Result:
    return _implementation(*problem_of(*values))


def _run_rows(*values: Any) -> Result:
    problem, backend = problem_of(*values)
    plan = "auto" if problem.plan == "inplace" else problem.plan  # a word to the backward
    return _implementation(dataclasses.replace(problem, needs=(False, False, False), plan=plan), backend)


def _run_logits_(*values: Any) -> None:
    problem, backend = problem_of(*values)
    _implementation(dataclasses.replace(problem, needs=(True, False, False), inplace=True), backend)


def _scale_(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    if factor.device.type == "cpu" and float(factor) == 1.0:  # a GPU's scalar is not looked at: the host would wait
        return
    gradient.mul_(factor)


def _shapes(*values: Any) -> Result:
    p, _ = problem_of(*values)
    new = p.student.hidden.new_empty
    rows, none = p.rows, new(0, dtype=torch.float32)

    def per_row(wanted: bool) -> torch.Tensor:
        return new(rows if wanted else 0, dtype=torch.float32)

    def gradient(of: torch.Tensor | None, wanted: bool) -> torch.Tensor:
        return new(of.shape, dtype=gradient_dtype(of.dtype)) if wanted and of is not None else new(0, dtype=torch.float32)

    return Result(
        total=new((), dtype=torch.float32),
        divergence=per_row(True),
        nll=per_row(p.label_factor is not None),
        lse_s=per_row(True),
        lse_t=per_row(p.target in DENSE),
        teacher_entropy=per_row(p.statistics),
        top1_agreement=per_row(p.statistics),
        filtered=new(2, dtype=torch.float32),
        d_hidden=gradient(p.student.hidden, p.needs[0]),
        d_weight=gradient(p.student.weight, p.needs[1]) if not isinstance(p.student, GivenLogits) else none,
        d_bias=gradient(p.student.bias, p.needs[2]),
    )


def _shapes_rows(*values: Any) -> Result:
    names = dict(zip(_NAMES, values, strict=True))
    return _shapes(*{**names, "needs": [False, False, False]}.values())


for _name, _function, _fake in (
    ("vocab_loss", _run, _shapes),
    ("vocab_loss_rows", _run_rows, _shapes_rows),
    ("vocab_loss_logits_", _run_logits_, lambda *values: None),
    ("scale_", _scale_, lambda gradient, factor: None),
):
    torch.library.impl(f"undo::{_name}", ("cpu", "cuda"))(_function)
    torch.library.register_fake(f"undo::{_name}")(_fake)


def _eager(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is one, and not the stand-in of a graph being traced."""
    return type(tensor) is torch.Tensor


def scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A gradient of the forward times what arrived, in the input's dtype; in place where it is a tensor."""
    if _eager(gradient):
        torch.ops.undo.scale_(gradient, factor)
        torch.autograd.graph.increment_version(gradient)  # it is handed out, scaled or not: a second backward must notice
    else:  # a graph has its own way to reuse the memory, and may have handed the gradient out
        gradient = gradient * factor
    return gradient.to(dtype)


def no_double_backward(op: str = "vocab_loss") -> None:
    """Refuse ``create_graph=True``."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"undo::{op}: its gradient was computed in the forward and cannot be differentiated again (create_graph=True); "
            'use undo_kernels.backend("reference") for second derivatives'
        )


def _save_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    result = Result(*output)
    ctx.mark_non_differentiable(*result[1:])
    ctx.save_for_backward(*result[-3:])
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.needs = inputs[_NAMES.index("needs")]


def _backward_total(ctx: Any, grad_total: torch.Tensor | None, *others: Any) -> tuple[Any, ...]:
    no_double_backward()
    gradients: list[torch.Tensor | None] = [None, None, None]
    if grad_total is not None:
        for number, gradient in enumerate(ctx.saved_tensors):
            if ctx.needs[number]:
                gradients[number] = scaled(gradient, grad_total, ctx.dtypes[number])
    return (*gradients, *[None] * (len(_NAMES) - 3))


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    result = Result(*output)
    ctx.mark_non_differentiable(result.total, *result[3:])
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    ctx.where = [isinstance(value, torch.Tensor) for value in inputs]
    ctx.others = [None if there else value for there, value in zip(ctx.where, inputs, strict=True)]
    ctx.save_for_backward(*tensors, result.lse_s, result.lse_t)


def _backward_rows(ctx: Any, _: Any, grad_divergence: Any, grad_nll: Any, *others: Any) -> tuple[Any, ...]:
    no_double_backward()
    *tensors, lse_s, lse_t = ctx.saved_tensors
    stream = iter(tensors)
    a = dict(zip(_NAMES, [next(stream) if t else v for t, v in zip(ctx.where, ctx.others, strict=True)], strict=True))
    zero = torch.zeros_like(a["factor"])
    a["factor"] = zero if grad_divergence is None else grad_divergence
    if a["label_factor"] is not None:
        a["label_factor"] = zero if grad_nll is None else grad_nll
    a["lse_s"], a["lse_t"] = lse_s, lse_t if a["target"] in DENSE else None
    a["needs"], a["statistics"] = list(ctx.needs_input_grad[:3]), False
    dtypes = [a[name].dtype if a[name] is not None else None for name in ("hidden", "weight", "bias")]
    inplace = a["plan"] == "inplace"
    a["plan"] = "auto" if inplace else a["plan"]
    if inplace and _eager(a["hidden"]):
        a["needs"] = [True, False, False]
        torch.ops.undo.vocab_loss_logits_(*a.values())
        gradients = [a["hidden"], None, None]
    else:
        result = torch.ops.undo.vocab_loss(*a.values())
        gradients = [g if need else None for g, need in zip(result[-3:], a["needs"], strict=True)]
    gradients = [None if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
    return (*gradients, *[None] * (len(_NAMES) - 3))


torch.library.register_autograd("undo::vocab_loss", _backward_total, setup_context=_save_total)
torch.library.register_autograd("undo::vocab_loss_rows", _backward_rows, setup_context=_save_rows)
