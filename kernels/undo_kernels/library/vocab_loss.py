"""The losses over the vocabulary as ``torch.library`` ops.

``undo::vocab_loss`` computes a total and, in the same call, its gradients, which the backward scales in place.
``undo::vocab_loss_tokens`` returns the loss of each token; its backward calls ``vocab_loss`` with the incoming gradients as factors.
``undo::vocab_loss_logits_`` overwrites precomputed logits with their gradient. :func:`vocab_loss_tokens_into` is ``vocab_loss_tokens``
whose backward adds the weight's gradient to that of a parameter.

The arguments of all three are the fields of a :class:`~undo_kernels.problem.Problem` and the backend. The backend is an argument so
that a backward in another thread uses the same one as the forward. Tensors are positional, because autograd requires that; options
are keywords.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from undo_kernels.accumulation import accumulates, check_part, check_unwatched, earlier_gradient
from undo_kernels.library.backends import implementation_on
from undo_kernels.library.scale import is_eager, refuse_double_backward, scaled
from undo_kernels.matmul import full_precision
from undo_kernels.problem import DENSE, Problem, Result, gradient_dtype
from undo_kernels.projection import GivenLogits, Projection
from undo_kernels.vocabulary_shard import VocabularyShard

# -- the schema ------------------------------------------------------------------------------------------------------------------

TENSORS = {  # the first three have gradients
    "hidden": "Tensor",  # the student's, or given logits
    "weight": "Tensor?",  # None with given logits
    "bias": "Tensor?",
    "factor": "Tensor",
    "label_factor": "Tensor?",
    "labels": "Tensor?",
    "counted": "Tensor?",
    "teacher_hidden": "Tensor?",
    "teacher_weight": "Tensor?",
    "teacher_bias": "Tensor?",
    "indices": "Tensor?",
    "logprobs": "Tensor?",
    "lse_s": "Tensor?",
    "lse_t": "Tensor?",
}
OPTIONS = {
    "target": "str",
    "beta": "float",
    "temperature": "float",
    "scale": "float",
    "softcap": "float?",
    "teacher_scale": "float",
    "teacher_softcap": "float?",
    "vocab_size": "int?",
    "group": "str?",  # of the processes that share the head; None: the head is whole
    "shard": "int[]",  # first entry, entries and widest of its VocabularyShard
    "needs": "bool[]",
    "statistics": "bool",
    "max_counted": "int?",
    "plan": "str",
    "workspace_bytes": "int?",
    "backend": "str",
}
_HEAD = ("hidden", "weight", "bias")
_OF_A_PROBLEM = (  # arguments that a Problem calls by the same name
    "factor", "label_factor", "labels", "counted", "indices", "logprobs", "lse_s", "lse_t", "target", "beta", "statistics",
    "max_counted", "plan", "workspace_bytes",
)  # fmt: skip


def _schema(hidden: str = "Tensor", results: str = "(" + ", ".join(["Tensor"] * len(Result._fields)) + ")") -> str:
    tensors = ", ".join(f"{kind} {name}" for name, kind in {**TENSORS, "hidden": hidden}.items())
    return f"({tensors}, *, {', '.join(f'{kind} {name}' for name, kind in OPTIONS.items())}) -> {results}"


def arguments(problem: Problem, backend: str) -> tuple[tuple[torch.Tensor | None, ...], dict[str, Any]]:
    """Returns the positional and the keyword arguments of the ops for a problem."""
    student, teacher = problem.student, problem.teacher
    given = isinstance(student, GivenLogits)
    values = {name: getattr(problem, name) for name in _OF_A_PROBLEM}
    values |= {"hidden": student.hidden, "weight": None if given else student.weight, "bias": student.bias}
    values |= {
        "teacher_hidden": None if teacher is None else teacher.hidden,
        "teacher_weight": None if teacher is None or given else teacher.weight,
        "teacher_bias": None if teacher is None else teacher.bias,
        "temperature": student.temperature,
        "scale": student.scale,
        "softcap": student.softcap,
        "teacher_scale": 1.0 if teacher is None else teacher.scale,
        "teacher_softcap": None if teacher is None else teacher.softcap,
        "vocab_size": student.vocab_size,
        "group": None if student.shard is None else student.shard.group,
        "shard": [] if student.shard is None else [student.shard.first, student.shard.entries, student.shard.widest],
        "needs": list(problem.needs),
        "backend": backend,
    }
    return tuple(values[name] for name in TENSORS), {name: values[name] for name in OPTIONS}


def problem_of(*tensors: torch.Tensor | None, **options: Any) -> tuple[Problem, str]:
    """Returns the problem that an op's arguments describe, and the backend; the inverse of :func:`arguments`."""
    a = dict(zip(TENSORS, tensors, strict=True)) | options
    shard = None if a["group"] is None else VocabularyShard(a["group"], *(a["shard"] or ()))

    def side(hidden: torch.Tensor | None, weight: torch.Tensor | None, bias: Any, scale: float, softcap: float | None) -> Any:
        if hidden is None:
            return None
        if weight is None:
            return GivenLogits(hidden, hidden, temperature=a["temperature"], vocab_size=a["vocab_size"])
        return Projection(hidden, weight, bias, scale, softcap, a["temperature"], a["vocab_size"], shard)

    student = side(a["hidden"], a["weight"], a["bias"], a["scale"], a["softcap"])
    teacher = side(a["teacher_hidden"], a["teacher_weight"], a["teacher_bias"], a["teacher_scale"], a["teacher_softcap"])
    same = {name: a[name] for name in _OF_A_PROBLEM}
    return Problem(student=student, teacher=teacher, needs=tuple(a["needs"]), **same), a["backend"]


def _implementation(problem: Problem, backend: str) -> Result:
    with full_precision(problem.student.hidden.device):
        return implementation_on("vocab_loss", backend)(problem)


def _shapes(p: Problem) -> Result:
    new = p.student.hidden.new_empty
    tokens, none = p.tokens, new(0, dtype=torch.float32)

    def per_token(wanted: bool) -> torch.Tensor:
        return new(tokens if wanted else 0, dtype=torch.float32)

    def gradient(of: torch.Tensor | None, wanted: bool) -> torch.Tensor:
        return new(of.shape, dtype=gradient_dtype(of.dtype)) if wanted and of is not None else new(0, dtype=torch.float32)

    return Result(
        total=new((), dtype=torch.float32),
        divergence=per_token(True),
        nll=per_token(p.label_factor is not None),
        lse_s=per_token(True),
        lse_t=per_token(p.target in DENSE),
        teacher_entropy=per_token(p.statistics),
        top1_agreement=per_token(p.statistics),
        d_hidden=gradient(p.student.hidden, p.needs[0]),
        d_weight=gradient(p.student.weight, p.needs[1]) if not isinstance(p.student, GivenLogits) else none,
        d_bias=gradient(p.student.bias, p.needs[2]),
    )


# -- undo::vocab_loss ------------------------------------------------------------------------------------------------------------

torch.library.define("undo::vocab_loss", _schema())


@torch.library.impl("undo::vocab_loss", ("cpu", "cuda"))
def _vocab_loss(*tensors: Any, **options: Any) -> Result:
    return _implementation(*problem_of(*tensors, **options))


@torch.library.register_fake("undo::vocab_loss")
def _vocab_loss_fake(*tensors: Any, **options: Any) -> Result:
    return _shapes(problem_of(*tensors, **options)[0])


def _vocab_loss_save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    result = Result(*output)
    ctx.mark_non_differentiable(*result[1:])
    ctx.save_for_backward(result.d_hidden, result.d_weight, result.d_bias)
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[: len(_HEAD)]]
    ctx.needs = keyword_only_inputs["needs"]


def _vocab_loss_backward(ctx: Any, grad_total: torch.Tensor | None, *others: Any) -> tuple[torch.Tensor | None, ...]:
    refuse_double_backward("vocab_loss")
    gradients: list[torch.Tensor | None] = [None] * len(TENSORS)
    if grad_total is not None:
        for number, gradient in enumerate(ctx.saved_tensors):
            if ctx.needs[number]:
                gradients[number] = scaled(gradient, grad_total, ctx.dtypes[number])
    return tuple(gradients)


torch.library.register_autograd("undo::vocab_loss", _vocab_loss_backward, setup_context=_vocab_loss_save)

# -- undo::vocab_loss_tokens -------------------------------------------------------------------------------------------------------

torch.library.define("undo::vocab_loss_tokens", _schema())


def _without_gradients(problem: Problem) -> Problem:
    return dataclasses.replace(_without_overwriting(problem), needs=(False, False, False))


def _without_overwriting(problem: Problem) -> Problem:
    """Returns the problem with a plan of the backends; "inplace" only tells the backward to overwrite the logits."""
    return dataclasses.replace(problem, plan="auto") if problem.plan == "inplace" else problem


@torch.library.impl("undo::vocab_loss_tokens", ("cpu", "cuda"))
def _tokens(*tensors: Any, **options: Any) -> Result:
    problem, backend = problem_of(*tensors, **options)
    return _implementation(_without_gradients(problem), backend)


@torch.library.register_fake("undo::vocab_loss_tokens")
def _tokens_fake(*tensors: Any, **options: Any) -> Result:
    return _shapes(_without_gradients(problem_of(*tensors, **options)[0]))


def _tokens_save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    result = Result(*output)
    ctx.mark_non_differentiable(result.total, *result[3:])
    ctx.save_for_backward(*inputs, result.lse_s, result.lse_t)
    ctx.options = keyword_only_inputs


def _tokens_backward(ctx: Any, _: Any, grad_divergence: Any, grad_nll: Any, *others: Any) -> tuple[torch.Tensor | None, ...]:
    refuse_double_backward("vocab_loss_tokens")
    tensors, problem, backend = _tokens_problem(ctx, grad_divergence, grad_nll)
    head = tensors[: len(_HEAD)]
    if problem.plan == "inplace" and is_eager(head[0]):
        positional, options = arguments(dataclasses.replace(problem, needs=(True, False, False), plan="auto"), backend)
        torch.ops.undo.vocab_loss_logits_(*positional, **options)
        return (head[0], *[None] * (len(TENSORS) - 1))
    positional, options = arguments(_without_overwriting(problem), backend)
    result = Result(*torch.ops.undo.vocab_loss(*positional, **options))
    return _tokens_gradients(result, problem.needs, head)


def _tokens_problem(ctx: Any, grad_divergence: Any, grad_nll: Any) -> tuple[list[Any], Problem, str]:
    """Returns the tensors of a forward of ``vocab_loss_tokens``, and the problem whose gradients its backward wants."""
    *tensors, lse_s, lse_t = ctx.saved_tensors
    problem, backend = problem_of(*tensors, **ctx.options)
    zero = torch.zeros_like(problem.factor)
    problem = dataclasses.replace(
        problem,
        factor=zero if grad_divergence is None else grad_divergence,
        label_factor=None if problem.label_factor is None else zero if grad_nll is None else grad_nll,
        lse_s=lse_s,
        lse_t=lse_t if problem.target in DENSE else None,
        needs=tuple(ctx.needs_input_grad[: len(_HEAD)]),
        statistics=False,
    )
    return tensors, problem, backend


def _tokens_gradients(result: Result, needs: tuple[bool, ...], head: list[Any]) -> tuple[torch.Tensor | None, ...]:
    found = zip((result.d_hidden, result.d_weight, result.d_bias), needs, head, strict=True)
    gradients = [gradient.to(of.dtype) if need else None for gradient, need, of in found]
    return (*gradients, *[None] * (len(TENSORS) - len(_HEAD)))


torch.library.register_autograd("undo::vocab_loss_tokens", _tokens_backward, setup_context=_tokens_save)


class _TokensInto(torch.autograd.Function):
    """``undo::vocab_loss_tokens`` whose backward adds the weight's gradient to that of a parameter."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, options: dict[str, Any], *tensors: torch.Tensor | None) -> Result:
        output = torch.ops.undo.vocab_loss_tokens(*tensors, **options)
        _tokens_save(ctx, tensors, options, output)
        ctx.parameter, ctx.weight = parameter, tensors[1]  # a saved tensor may be unpacked as another one, without a graph
        return output

    @staticmethod
    def backward(ctx: Any, _: Any, grad_divergence: Any, grad_nll: Any, *others: Any) -> tuple[torch.Tensor | None, ...]:
        refuse_double_backward("vocab_loss_tokens")
        tensors, problem, backend = _tokens_problem(ctx, grad_divergence, grad_nll)
        hidden, _, bias = ctx.needs_input_grad[2 : 2 + len(_HEAD)]
        weight = accumulates("accumulate_into", ctx.parameter, ctx.weight)
        earlier = None
        if weight:
            check_unwatched("accumulate_into", ctx.parameter)
            check_part("accumulate_into", ctx.weight, ctx.parameter)
            earlier = earlier_gradient(ctx.parameter, tensors[1])
        problem = dataclasses.replace(problem, needs=(hidden, weight, bias), earlier=earlier)
        result = _implementation(problem, backend)
        # After a zero_grad() since the forward there is nothing to add to, and autograd takes the gradient as it is.
        returned = (hidden, weight and earlier is None, bias)
        return None, None, *_tokens_gradients(result, returned, tensors[: len(_HEAD)])


def vocab_loss_tokens_into(parameter: torch.Tensor, *tensors: torch.Tensor | None, **options: Any) -> tuple[torch.Tensor, ...]:
    """Calls ``undo::vocab_loss_tokens``; its backward adds the weight's gradient to ``parameter.grad``, tile by tile, in place."""
    return _TokensInto.apply(parameter, options, *tensors)


# -- undo::vocab_loss_logits_ ----------------------------------------------------------------------------------------------------

torch.library.define("undo::vocab_loss_logits_", _schema(hidden="Tensor(a!)", results="()"))


@torch.library.impl("undo::vocab_loss_logits_", ("cpu", "cuda"))
def _logits_(*tensors: Any, **options: Any) -> None:
    problem, backend = problem_of(*tensors, **options)
    _implementation(dataclasses.replace(problem, needs=(True, False, False), inplace=True), backend)


@torch.library.register_fake("undo::vocab_loss_logits_")
def _logits_fake(*tensors: Any, **options: Any) -> None:
    return None
