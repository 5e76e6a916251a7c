"""The fused vocabulary losses: from hidden states and head weights to a loss, without asking for ``[tokens, V]`` logits.

Everywhere ``z = softcap(scale * (h @ W.T + b)) / temperature`` with ``softcap(z) = c * tanh(z / c)``, and no op shifts labels.
Options that all of them share:

- ``mask`` ``[...]`` bool: True counts. What is masked, NaN included, has no influence and zero gradient; all masked gives 0.
- ``token_weight`` ``[...]`` float: multiplies each token's loss (not the mean's denominator). A token of weight 0 has no influence
  either, NaN included; it still counts in the denominator.
- ``vocab_size``: weight rows from here on are padding: no probability, zero gradient.
- ``reduction``: ``mean`` over counted tokens, ``sum``, or ``none`` (``[...]``, zeros where masked).
- ``normalizer``: a float or a 0-d tensor that replaces the mean's denominator, for accumulation over micro-batches.
- ``max_counted``: upper bound on counted tokens known to the host; a count above it gives a NaN loss.
- logits of -inf (from a bias, or given) have probability 0, and ``0 log 0 = 0``. The loss is +inf where the student gives
  probability 0 to what its target has (``p_s = 0 < p_t``; for reverse KL, ``p_t = 0 < p_s``). The gradient by the logits stays
  ``p_s - p_t`` there, and for reverse KL, where it has no limit, the row's is NaN. JSD is finite. A row with a logit of +inf or NaN,
  or with none but -inf, gives NaN. A row's NaN stays out of the other rows' gradients, but the gradients of weight and bias sum over
  rows and have it; a mask or a weight of 0 leaves such a row out. Every backend agrees. ``torch.autocast`` changes nothing: no logit
  is rounded to 16 bits.
- ``plan``: ``direct`` is plain PyTorch, which holds ``[rows, V]``; ``chunk`` keeps the logits of some rows between the pass that
  finds the log-sum-exps and the one that turns them into the gradient; ``recompute`` projects twice and keeps none. ``auto`` takes
  the fastest that fits, and plain PyTorch for small vocabularies and for float64.
- ``workspace_bytes``: bound on everything beyond inputs, outputs and a few floats a token. The default follows from shapes and
  dtypes alone. On CPUs a thread keeps it for its next call, for fresh memory is slow; ``undo_kernels.release_workspace()`` gives it
  back. Plain PyTorch takes rows in chunks and recomputes them in the backward pass.

dtypes: float32, bfloat16, float16 or float64 for hidden states and weights, which may differ; the arithmetic is float32 at least
and gradients take the input's dtype. Gradients of a scalar loss are computed in the forward and scaled in place by the backward, so
a second backward through the same graph raises; ``reduction="none"`` computes them in the backward. Inside activation checkpointing
name the op as one to be saved, or its work is done twice::

    context_fn = functools.partial(create_selective_checkpoint_contexts, [torch.ops.undo.vocab_loss.default])

Memory: ``workspace_bytes``; see :func:`explain`.
Errors: ``ValueError`` naming the argument for a wrong shape, dtype, device or value, before anything is computed.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from undo_kernels.plan import Plan, describe
from undo_kernels.problem import Problem
from undo_kernels.projection import GivenLogits, Projection

from undo_core.ops import checks
from undo_core.ops.dispatch import Tokens, choose_backend, reduced_loss

Reduction = Literal["mean", "sum", "none"]


class KLStats(NamedTuple):
    """Detached statistics of :func:`linear_kl_div` and :func:`kl_div`, each ``[...]`` and zero where masked or of weight 0, but for
    ``filtered``:

    ``[2]``, the share of the gradient's entries that ``filter_below`` took as zero, and the Frobenius norm of what they held.
    """

    lse_s: torch.Tensor
    lse_t: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor
    filtered: torch.Tensor


def linear_kl_div(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    divergence: Literal["forward", "reverse", "jsd"] = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    vocab_size: int | None = None,
    teacher_lse: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | torch.Tensor | None = None,
    return_stats: bool = False,
    max_counted: int | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    filter_below: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, KLStats]:
    """Divergence between a teacher's and a student's next-token distributions.

    Forward ``KL(t || s)`` (the published distillation loss, arXiv 2506.06278), reverse ``KL(s || t)``, or
    ``jsd = beta * KL(t || m) + (1 - beta) * KL(s || m)`` with ``m = beta * t + (1 - beta) * s``. No ``T**2`` factor.
    Evaluated in difference form: never negative, and accurate when student and teacher nearly agree.

    Args:
        student_hidden: ``[..., d_s]``; gradient.
        student_weight: ``[V, d_s]``; gradient.
        teacher_hidden: ``[..., d_t]``; no gradient.
        teacher_weight: ``[V, d_t]``; no gradient.
        mask: ``[...]`` bool, True counts.
        token_weight: ``[...]`` float.
        divergence: forward, reverse or jsd.
        beta: of jsd, strictly inside (0, 1).
        temperature: > 0, divides both logits.
        student_scale: factor on the student's products.
        teacher_scale: factor on the teacher's products.
        student_softcap: ``c`` > 0 or None.
        teacher_softcap: ``c`` > 0 or None.
        student_bias: ``[V]``; gradient.
        teacher_bias: ``[V]``; no gradient.
        vocab_size: rows from here on are padding.
        teacher_lse: ``[...]`` from :func:`linear_lse` with the teacher's options.
        labels: ``[...]`` integers; adds ``label_weight`` times the student's cross-entropy, averaged over its own counted tokens
            (those that are not ``ignore_index``), or over ``normalizer``.
        label_weight: >= 0.
        ignore_index: label that does not count.
        reduction: mean, sum or none.
        normalizer: replaces the mean's denominator.
        return_stats: also return :class:`KLStats`.
        max_counted: upper bound on counted tokens.
        plan: auto, direct, chunk or recompute.
        workspace_bytes: bound on the memory for logits.
        filter_below: blocks of the gradient whose largest ``|dloss/dlogit|`` (of one token, before weights) is below it are taken
            as zero; 0 keeps all. On a CPU such a block, 1,024 vocabulary rows by a whole chunk of tokens, costs no product of the
            gradient (with AMX none of the weight's). On a GPU it is multiplied as zeros and saves nothing. ``KLStats.filtered``
            tells the share and bounds the error: the weight's gradient misses at most the norm times the largest singular value
            of the hidden states, and the hidden states' at most the norm times that of the weight.

    Returns:
        A scalar, or ``[...]`` with ``reduction="none"``, in float32 (float64 where an input is); with ``return_stats`` a pair.

    Example:
        >>> h, w = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8)
        >>> float(linear_kl_div(h, w, h.detach(), w, student_softcap=30.0, teacher_softcap=30.0))
        0.0
    """
    checks.head("student_", student_hidden, student_weight, student_bias)
    checks.head("teacher_", teacher_hidden, teacher_weight, teacher_bias)
    leading = student_hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != leading:
        checks.fail("teacher_hidden", f"shape {tuple(teacher_hidden.shape)}", f"{(*leading, 'd_t')}, the student's tokens")
    checks.same_device("teacher_hidden", teacher_hidden, student_hidden)
    size = checks.vocabulary(vocab_size, min(student_weight.shape[0], teacher_weight.shape[0]))
    if size is None and student_weight.shape[0] != teacher_weight.shape[0]:
        rows = f"{teacher_weight.shape[0]} rows"
        checks.fail("teacher_weight", rows, f"the student's {student_weight.shape[0]}, or vocab_size where the rest is padding")
    student = _projection(
        student_hidden, student_weight, student_bias, student_scale, student_softcap, temperature, size, "student_"
    )
    teacher = _projection(
        teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap, temperature, size, "teacher_"
    )
    tokens = Tokens.checked(leading, student_hidden.device, token_weight, reduction, normalizer, max_counted)
    memory = {**_memory(plan, workspace_bytes), "filter_below": checks.number("filter_below", filter_below, "a number >= 0", 0)}
    return _kl(
        student, teacher, tokens, mask, divergence, beta, teacher_lse, labels, label_weight, ignore_index, return_stats, memory
    )


def kl_div(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    divergence: Literal["forward", "reverse", "jsd"] = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    teacher_lse: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | torch.Tensor | None = None,
    return_stats: bool = False,
    max_counted: int | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    inplace_grad: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, KLStats]:
    """:func:`linear_kl_div` where the logits exist already (scale, softcap and bias applied).

    Args:
        student_logits: ``[..., V]``; gradient.
        teacher_logits: ``[..., V]``; no gradient.
        inplace_grad: let the backward overwrite ``student_logits`` with their gradient; no second ``[..., V]`` array exists then.
            What reads the logits after that reads the gradient. The plain-PyTorch path has no use for the permission.
        mask: and all further arguments as in :func:`linear_kl_div`.

    Example:
        >>> z = torch.randn(3, 7)
        >>> bool(kl_div(z, z + 1.0) < 1e-12)
        True
    """
    checks.float_tensor("student_logits", student_logits, "[..., V]")
    checks.float_tensor("teacher_logits", teacher_logits, "[..., V]")
    if teacher_logits.shape != student_logits.shape:
        checks.fail("teacher_logits", f"shape {tuple(teacher_logits.shape)}", f"{tuple(student_logits.shape)}, the student's")
    checks.same_device("teacher_logits", teacher_logits, student_logits)
    size = checks.vocabulary(vocab_size, student_logits.shape[-1])
    student = _given("temperature", student_logits, temperature, size)
    teacher = _given("temperature", teacher_logits, temperature, size)
    tokens = Tokens.checked(student_logits.shape[:-1], student_logits.device, token_weight, reduction, normalizer, max_counted)
    memory = {**_memory(plan, workspace_bytes), "inplace": inplace_grad}
    return _kl(
        student, teacher, tokens, mask, divergence, beta, teacher_lse, labels, label_weight, ignore_index, return_stats, memory
    )


def linear_lse(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
) -> torch.Tensor:
    """Log-sum-exp of the logits, ``[...]`` float32 (float64 where an input is), differentiable.

    Args:
        hidden: ``[..., d]``.
        weight: ``[V, d]``.
        scale: and all further arguments as in :func:`linear_cross_entropy`.
    """
    checks.head("", hidden, weight, bias)
    projection = _projection(hidden, weight, bias, scale, softcap, temperature, checks.vocabulary(vocab_size, weight.shape[0]))
    leading = hidden.shape[:-1]
    tokens = Tokens(leading, None, "none", None, None)
    memory = _memory(plan, workspace_bytes)
    return reduced_loss(projection, "own", tokens, label_weight=1.0, **memory)[0].view(leading)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    mask: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    normalizer: float | torch.Tensor | None = None,
    max_counted: int | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of ``labels``: ``lse(z) - z[label]`` in nats.

    Args:
        hidden: ``[..., d]``; gradient.
        weight: ``[V, d]``; gradient.
        labels: ``[...]`` integers; the caller shifts them.
        ignore_index: label that does not count.
        mask: ``[...]`` bool, True counts.
        token_weight: ``[...]`` float.
        temperature: > 0.
        scale: factor on the products.
        softcap: ``c`` > 0 or None.
        bias: ``[V]``; gradient.
        vocab_size: rows from here on are padding.
        reduction: mean, sum or none.
        normalizer: replaces the mean's denominator.
        max_counted: upper bound on counted tokens.
        plan: auto, direct, chunk or recompute.
        workspace_bytes: bound on the memory for logits.

    Returns:
        A scalar, or ``[...]`` with ``reduction="none"``.
    """
    checks.head("", hidden, weight, bias)
    leading = hidden.shape[:-1]
    size = checks.vocabulary(vocab_size, weight.shape[0])
    projection = _projection(hidden, weight, bias, scale, softcap, temperature, size)
    tokens = Tokens.checked(leading, hidden.device, token_weight, reduction, normalizer, max_counted)
    counted = _mask(mask, leading, hidden.device)
    labels, labelled = _labels(labels, leading, hidden.device, projection.vocabulary, ignore_index, counted)
    return _shaped(
        reduced_loss(
            projection, "own", tokens, labels=labels, labelled=labelled, label_weight=1.0, **_memory(plan, workspace_bytes)
        ),
        tokens,
    )


def linear_uniform_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    normalizer: float | torch.Tensor | None = None,
    max_counted: int | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
) -> torch.Tensor:
    """``KL(U || p) = lse(z) - mean(z) - log V``, the forget loss of MaxEnt (arXiv 2506.06278); ``U`` is uniform over the vocabulary.

    Args:
        hidden: ``[..., d]``; gradient.
        weight: ``[V, d]``; gradient.
        mask: and all further arguments as in :func:`linear_cross_entropy`.
    """
    checks.head("", hidden, weight, bias)
    leading = hidden.shape[:-1]
    projection = _projection(hidden, weight, bias, scale, softcap, temperature, checks.vocabulary(vocab_size, weight.shape[0]))
    tokens = Tokens.checked(leading, hidden.device, token_weight, reduction, normalizer, max_counted)
    counted = _mask(mask, leading, hidden.device)
    return _shaped(reduced_loss(projection, "uniform", tokens, counted=counted, **_memory(plan, workspace_bytes)), tokens)


def linear_sparse_kl_div(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_indices: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    *,
    tail: Literal["bucket", "renormalize"] = "bucket",
    mask: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    normalizer: float | torch.Tensor | None = None,
    max_counted: int | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
) -> torch.Tensor:
    """Forward KL against a teacher of which only ``k`` log-probabilities a token are known.

    ``bucket`` makes one more outcome of the rest, its teacher probability ``1 - sum p`` and its student probability computed
    without cancellation; ``renormalize`` takes both as distributions over the known entries.

    Args:
        hidden: ``[..., d]``; gradient.
        weight: ``[V, d]``; gradient.
        teacher_indices: ``[..., k]`` integers; -1 is padding, a repeated index in a row is an error.
        teacher_logprobs: ``[..., k]`` float, of the whole vocabulary; no gradient. A row whose exponentials sum to more than 1
            holds logits and is refused, where the host may look at the values (not on GPUs, nor in a compiled graph).
        tail: bucket or renormalize.
        mask: and all further arguments as in :func:`linear_cross_entropy`.
    """
    checks.head("", hidden, weight, bias)
    leading = hidden.shape[:-1]
    projection = _projection(hidden, weight, bias, scale, softcap, temperature, checks.vocabulary(vocab_size, weight.shape[0]))
    tokens = Tokens.checked(leading, hidden.device, token_weight, reduction, normalizer, max_counted)
    memory = _memory(plan, workspace_bytes)
    return _sparse(tokens, projection, teacher_indices, teacher_logprobs, tail, _mask(mask, leading, hidden.device), memory)


def sparse_kl_div(
    student_logits: torch.Tensor,
    teacher_indices: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    *,
    tail: Literal["bucket", "renormalize"] = "bucket",
    mask: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    normalizer: float | torch.Tensor | None = None,
    max_counted: int | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
) -> torch.Tensor:
    """:func:`linear_sparse_kl_div` where the student's logits ``[..., V]`` exist already."""
    checks.float_tensor("student_logits", student_logits, "[..., V]")
    leading = student_logits.shape[:-1]
    projection = _given("temperature", student_logits, temperature, checks.vocabulary(vocab_size, student_logits.shape[-1]))
    tokens = Tokens.checked(leading, student_logits.device, token_weight, reduction, normalizer, max_counted)
    counted = _mask(mask, leading, student_logits.device)
    memory = _memory(plan, workspace_bytes)
    return _sparse(tokens, projection, teacher_indices, teacher_logprobs, tail, counted, memory)


def explain(
    op: str,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device | str,
    workspace_bytes: int | None = None,
    plan: str = "auto",
) -> Plan:
    """The plan that ``op`` would follow, with its predicted bytes, FLOPs and workspace; prints as a table.

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
    sides = []
    for prefix in prefixes:
        hidden, weight = (torch.empty(shapes[prefix + part], dtype=dtype, device="meta") for part in ("hidden", "weight"))
        sides.append(Projection(hidden.reshape(-1, hidden.shape[-1]), weight))
    factor = torch.empty(sides[0].rows, device="meta")
    problem = Problem(
        student=sides[0],
        teacher=sides[1] if len(sides) > 1 else None,
        target=targets[op],
        factor=factor,
        label_factor=factor if targets[op] == "own" else None,
        needs=(op != "linear_lse", op != "linear_lse", False),
        **_memory(plan, workspace_bytes),
    )
    return describe(op, problem, choose_backend(problem, dtype == torch.float64, torch.device(device)))


def _kl(
    student: Projection,
    teacher: Projection,
    tokens: Tokens,
    mask: torch.Tensor | None,
    divergence: str,
    beta: float,
    teacher_lse: torch.Tensor | None,
    labels: torch.Tensor | None,
    label_weight: float,
    ignore_index: int,
    return_stats: bool,
    memory: dict[str, Any],
) -> torch.Tensor | tuple[torch.Tensor, KLStats]:
    device, leading = student.hidden.device, tokens.leading
    checks.choice("divergence", divergence, ("forward", "reverse", "jsd"))
    if divergence == "jsd":
        checks.number("beta", beta, "a number strictly inside (0, 1)", 0, 1, open_ends=True)
    checks.number("label_weight", label_weight, "a finite number >= 0", 0)
    counted, labelled, weight = _mask(mask, leading, device), None, None
    if labels is not None and label_weight:
        labels, labelled = _labels(labels, leading, device, student.vocabulary, ignore_index, None)
        weight = float(label_weight)
    if teacher_lse is not None:
        teacher_lse = checks.per_token("teacher_lse", teacher_lse, leading, "float", device).reshape(-1).detach()
    loss, statistics = reduced_loss(
        student,
        divergence,
        tokens,
        counted=counted,
        labels=None if weight is None else labels,
        labelled=labelled,
        label_weight=weight,
        teacher=teacher,
        beta=beta,
        lse_t=teacher_lse,
        statistics=return_stats,
        **memory,
    )
    loss = loss.view(leading) if tokens.reduction == "none" else loss
    if not return_stats:
        return loss
    shaped = {name: value if name == "filtered" else value.view(leading) for name, value in statistics.items()}
    return loss, KLStats(**shaped)


def _sparse(
    tokens: Tokens,
    projection: Projection,
    indices: torch.Tensor,
    logprobs: torch.Tensor,
    tail: str,
    counted: torch.Tensor | None,
    memory: dict[str, Any],
) -> torch.Tensor:
    leading = tokens.leading
    checks.choice("tail", tail, ("bucket", "renormalize"))
    checks.sparse_teacher(indices, logprobs, leading, projection.vocabulary, counted)
    rows = leading.numel()
    indices = indices.reshape(rows, indices.shape[-1]).long()
    logprobs = logprobs.detach().reshape(rows, logprobs.shape[-1])
    return _shaped(
        reduced_loss(projection, tail, tokens, counted=counted, indices=indices, logprobs=logprobs, **memory), tokens
    )


def _labels(
    labels: Any, leading: torch.Size, device: torch.device, vocabulary: int, ignore_index: int, counted: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels ``[rows]``, -1 where there is none, and which rows have one."""
    labels = checks.per_token("labels", labels, leading, "int", device).reshape(-1).long()
    labelled = labels != ignore_index if counted is None else (labels != ignore_index) & counted
    checks.labels_within(labels, labelled, vocabulary, ignore_index)
    # A label that is neither a row nor ignored is found here on CPUs; elsewhere it makes the loss NaN.
    return torch.where(labelled, torch.where(labels < 0, vocabulary, labels), -1), labelled


def _shaped(loss: tuple[torch.Tensor, Any], tokens: Tokens) -> torch.Tensor:
    return loss[0].view(tokens.leading) if tokens.reduction == "none" else loss[0]


def _projection(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    vocab_size: int | None,
    prefix: str = "",
) -> Projection:
    checks.number(f"{prefix}scale", scale, "a finite number")
    if softcap is not None:
        softcap = checks.number(f"{prefix}softcap", softcap, "a number > 0, or None", 0, open_ends=True)
    checks.number("temperature", temperature, "a number > 0", 0, open_ends=True)
    return Projection(hidden.reshape(-1, hidden.shape[-1]), weight, bias, float(scale), softcap, float(temperature), vocab_size)


def _given(name: str, logits: torch.Tensor, temperature: float, vocab_size: int | None) -> Projection:
    """Logits that exist already, as the projection that returns them."""
    checks.number(name, temperature, "a number > 0", 0, open_ends=True)
    rows = logits.reshape(-1, logits.shape[-1])
    return GivenLogits(rows, rows, temperature=float(temperature), vocab_size=vocab_size)


def _mask(mask: torch.Tensor | None, leading: torch.Size, device: torch.device) -> torch.Tensor | None:
    return None if mask is None else checks.per_token("mask", mask, leading, "bool", device).reshape(-1)


def _memory(plan: Any, workspace_bytes: Any) -> dict[str, Any]:
    checks.choice("plan", plan, ("auto", "direct", "chunk", "recompute"))
    return {"plan": plan, "workspace_bytes": checks.workspace(workspace_bytes)}
