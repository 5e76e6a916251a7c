"""The fused vocabulary losses: from hidden states and head weights to a loss, without asking for ``[tokens, V]`` logits.

Everywhere ``z = softcap(scale * (h @ W.T + b)) / temperature`` with ``softcap(z) = c * tanh(z / c)``, and no op shifts labels.
Options that all of them share:

- ``mask`` ``[...]`` bool: True counts. What is masked, NaN included, has no influence and zero gradient; all masked gives 0.
- ``token_weight`` ``[...]`` float: multiplies each token's loss (not the mean's denominator).
- ``vocab_size``: weight rows from here on are padding: no probability, zero gradient.
- ``reduction``: ``mean`` over counted tokens, ``sum``, or ``none`` (``[...]``, zeros where masked).
- ``normalizer``: a float or a 0-d tensor that replaces the mean's denominator, for accumulation over micro-batches.
- ``max_counted``: upper bound on counted tokens known to the host; a count above it gives a NaN loss.
- ``plan``: ``auto`` or ``direct``. ``workspace_bytes``: bound on the memory for logits and what is made of them; rows are then
  taken in chunks and recomputed in the backward pass. None takes all rows at once.

dtypes: float32, bfloat16, float16 or float64 for hidden states and weights, which may differ; the arithmetic is float32 at least
and gradients take the input's dtype. Memory: a few ``[rows, V]`` arrays, or ``workspace_bytes``; see :func:`explain`.
Errors: ``ValueError`` naming the argument for a wrong shape, dtype, device or value, before anything is computed.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from undo_kernels.library import implementation
from undo_kernels.plan import Plan, make_plan
from undo_kernels.reference.logits import GivenLogits, Projection

from undo_core.ops import checks

Reduction = Literal["mean", "sum", "none"]


class KLStats(NamedTuple):
    """Detached statistics of :func:`linear_kl_div` and :func:`kl_div`, each ``[...]``; zeros where masked."""

    lse_s: torch.Tensor
    lse_t: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor


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
        plan: auto or direct.
        workspace_bytes: bound on the memory for logits.

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
    return _kl(
        student, teacher, leading, mask, token_weight, divergence, beta, teacher_lse, labels, label_weight, ignore_index, reduction,
        normalizer, return_stats, max_counted, plan, workspace_bytes,
    )  # fmt: skip


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
    inplace_grad: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, KLStats]:
    """:func:`linear_kl_div` where the logits exist already (scale, softcap and bias applied).

    Args:
        student_logits: ``[..., V]``; gradient.
        teacher_logits: ``[..., V]``; no gradient.
        inplace_grad: allow the gradient to overwrite ``student_logits``; the reference backend has no use for the permission.
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
    return _kl(
        student, teacher, student_logits.shape[:-1], mask, token_weight, divergence, beta, teacher_lse, labels, label_weight,
        ignore_index, reduction, normalizer, return_stats, max_counted, "auto", None,
    )  # fmt: skip


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
    workspace = _workspace(plan, workspace_bytes)
    return implementation("linear_lse", hidden.device)(projection, workspace).view(hidden.shape[:-1])


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
        plan: auto or direct.
        workspace_bytes: bound on the memory for logits.

    Returns:
        A scalar, or ``[...]`` with ``reduction="none"``.
    """
    checks.head("", hidden, weight, bias)
    leading = hidden.shape[:-1]
    size = checks.vocabulary(vocab_size, weight.shape[0])
    projection = _projection(hidden, weight, bias, scale, softcap, temperature, size)
    labels = checks.per_token("labels", labels, leading, "int", hidden.device).reshape(-1).long()
    counted = _mask(mask, leading, hidden.device) & (labels != ignore_index)
    checks.labels_within(labels, counted, projection.vocabulary, ignore_index)
    tokens = _Tokens(counted, token_weight, leading, reduction, normalizer, max_counted)
    workspace = _workspace(plan, workspace_bytes)
    rows = tokens.rows
    return tokens.reduce(implementation("linear_cross_entropy", hidden.device)(projection.take(rows), labels[rows], workspace))


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
    tokens = _Tokens(_mask(mask, leading, hidden.device), token_weight, leading, reduction, normalizer, max_counted)
    workspace = _workspace(plan, workspace_bytes)
    return tokens.reduce(implementation("linear_uniform_kl", hidden.device)(projection.take(tokens.rows), workspace))


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
        teacher_logprobs: ``[..., k]`` float, of the whole vocabulary; no gradient.
        tail: bucket or renormalize.
        mask: and all further arguments as in :func:`linear_cross_entropy`.
    """
    checks.head("", hidden, weight, bias)
    leading = hidden.shape[:-1]
    projection = _projection(hidden, weight, bias, scale, softcap, temperature, checks.vocabulary(vocab_size, weight.shape[0]))
    tokens = _Tokens(_mask(mask, leading, hidden.device), token_weight, leading, reduction, normalizer, max_counted)
    return _sparse(tokens, projection, teacher_indices, teacher_logprobs, tail, leading, _workspace(plan, workspace_bytes))


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
) -> torch.Tensor:
    """:func:`linear_sparse_kl_div` where the student's logits ``[..., V]`` exist already."""
    checks.float_tensor("student_logits", student_logits, "[..., V]")
    leading = student_logits.shape[:-1]
    projection = _given("temperature", student_logits, temperature, checks.vocabulary(vocab_size, student_logits.shape[-1]))
    tokens = _Tokens(_mask(mask, leading, student_logits.device), token_weight, leading, reduction, normalizer, max_counted)
    return _sparse(tokens, projection, teacher_indices, teacher_logprobs, tail, leading, None)


def explain(
    op: str,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device | str,
    workspace_bytes: int | None = None,
) -> Plan:
    """The plan that ``op`` would follow, with its predicted bytes, FLOPs and workspace; prints as a table.

    Args:
        op: name of a linear op, such as ``linear_kl_div``.
        shapes: of its arguments by name: ``hidden`` or ``student_hidden`` ``[..., d]``, ``weight`` or ``student_weight`` ``[V, d]``,
            and the teacher's for ``linear_kl_div``.
        dtype: of the hidden states and weights.
        device: where they are.
        workspace_bytes: bound on the memory for logits.
    """
    prefixes = ("student_", "teacher_") if op == "linear_kl_div" else ("",)
    checks.choice(
        "op", op, ("linear_kl_div", "linear_lse", "linear_cross_entropy", "linear_uniform_kl", "linear_sparse_kl_div")
    )
    for name in [prefix + part for prefix in prefixes for part in ("hidden", "weight")]:
        if name not in shapes:
            checks.fail("shapes", sorted(shapes), f"an entry {name}")
    torch.device(device)
    hidden, weight = shapes[prefixes[0] + "hidden"], shapes[prefixes[0] + "weight"]
    rows = 1
    for extent in hidden[:-1]:
        rows *= extent
    widths = tuple(shapes[prefix + "hidden"][-1] for prefix in prefixes)
    return make_plan(op, rows, weight[0], widths, dtype, checks.workspace(workspace_bytes))


class _Tokens:
    """Which tokens count, and how their losses become one number."""

    def __init__(
        self,
        counted: torch.Tensor,
        token_weight: torch.Tensor | None,
        leading: torch.Size,
        reduction: str,
        normalizer: float | torch.Tensor | None,
        max_counted: int | None,
    ) -> None:
        self.reduction = checks.choice("reduction", reduction, ("mean", "sum", "none"))
        self.leading, self.counted, self.normalizer = leading, counted, normalizer
        if isinstance(normalizer, torch.Tensor):
            if normalizer.ndim != 0:
                checks.fail("normalizer", f"shape {tuple(normalizer.shape)}", "a number or a 0-d tensor")
        elif normalizer is not None and not (checks.number("normalizer", normalizer, "a number > 0", 0) > 0):
            checks.fail("normalizer", normalizer, "a number > 0")
        if max_counted is not None and (isinstance(max_counted, bool) or not isinstance(max_counted, int) or max_counted < 0):
            checks.fail("max_counted", max_counted, "an integer >= 0, or None")
        self.max_counted = max_counted
        self.weight = None
        if token_weight is not None:
            self.weight = checks.per_token("token_weight", token_weight, leading, "float", counted.device).reshape(-1)
        self.all = bool(counted.all())
        self.rows: torch.Tensor | slice = slice(None) if self.all else counted.nonzero().squeeze(-1)

    def reduce(self, values: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
        """One value a taken row to the reduced loss; ``counted`` are the tokens that the mean is over."""
        counted = self.counted if counted is None else counted
        values = torch.where(counted[self.rows], values, torch.zeros_like(values))
        if self.weight is not None:
            values = values * self.weight[self.rows].detach().to(values.dtype)
        if self.max_counted is not None:
            too_many = counted.sum() > self.max_counted
            values = torch.where(too_many, torch.full_like(values, torch.nan), values)
        if self.reduction == "none":
            return self.spread(values)
        total = values.sum()
        if self.reduction == "sum":
            return total
        return total / (counted.sum().clamp_min(1) if self.normalizer is None else self.normalizer)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """One value a taken row to ``[...]``, zeros elsewhere."""
        if not self.all:
            values = values.new_zeros(self.counted.shape[0]).index_put((self.rows,), values)
        return values.view(self.leading)


def _kl(
    student: Projection,
    teacher: Projection,
    leading: torch.Size,
    mask: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    divergence: str,
    beta: float,
    teacher_lse: torch.Tensor | None,
    labels: torch.Tensor | None,
    label_weight: float,
    ignore_index: int,
    reduction: str,
    normalizer: float | torch.Tensor | None,
    return_stats: bool,
    max_counted: int | None,
    plan: str,
    workspace_bytes: int | None,
) -> torch.Tensor | tuple[torch.Tensor, KLStats]:
    device = student.hidden.device
    checks.choice("divergence", divergence, ("forward", "reverse", "jsd"))
    if divergence == "jsd":
        checks.number("beta", beta, "a number strictly inside (0, 1)", 0, 1, open_ends=True)
    checks.number("label_weight", label_weight, "a finite number >= 0", 0)
    workspace = _workspace(plan, workspace_bytes)
    counted = _mask(mask, leading, device)
    labelled = None
    if labels is not None and label_weight:
        labels = checks.per_token("labels", labels, leading, "int", device).reshape(-1).long()
        labelled = labels != ignore_index
        checks.labels_within(labels, labelled, student.vocabulary, ignore_index)
    if teacher_lse is not None:
        teacher_lse = checks.per_token("teacher_lse", teacher_lse, leading, "float", device).reshape(-1)
    tokens = _Tokens(
        counted if labelled is None else counted | labelled, token_weight, leading, reduction, normalizer, max_counted
    )
    rows = tokens.rows
    lse_t = None if teacher_lse is None else teacher_lse[rows].detach()
    label_rows = None if labelled is None else labels[rows]
    run = implementation("linear_kl_div", device)
    values, nll, stats = run(student.take(rows), teacher.take(rows), lse_t, label_rows, divergence, beta, workspace)
    loss = tokens.reduce(values, counted)
    if labelled is not None:
        loss = loss + label_weight * tokens.reduce(nll, labelled)
    return (loss, KLStats(**{name: tokens.spread(value) for name, value in stats.items()})) if return_stats else loss


def _sparse(
    tokens: _Tokens,
    projection: Projection,
    indices: torch.Tensor,
    logprobs: torch.Tensor,
    tail: str,
    leading: torch.Size,
    workspace: int | None,
) -> torch.Tensor:
    checks.choice("tail", tail, ("bucket", "renormalize"))
    if (
        not isinstance(indices, torch.Tensor)
        or indices.is_floating_point()
        or indices.shape[:-1] != leading
        or indices.ndim == 0
    ):
        got = (
            f"shape {tuple(indices.shape)} and {indices.dtype}" if isinstance(indices, torch.Tensor) else type(indices).__name__
        )
        checks.fail("teacher_indices", got, f"integers {(*leading, 'k')}")
    checks.float_tensor("teacher_logprobs", logprobs, "[..., k]")
    if logprobs.shape != indices.shape:
        checks.fail("teacher_logprobs", f"shape {tuple(logprobs.shape)}", f"{tuple(indices.shape)}, like teacher_indices")
    indices = indices.reshape(-1, indices.shape[-1]).long()[tokens.rows]
    logprobs = logprobs.detach().reshape(-1, logprobs.shape[-1])[tokens.rows]
    ordered = indices.sort(-1).values
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        checks.fail("teacher_indices", "a row with a repeated index", "different indices in each row (-1 is padding)")
    if ((indices < -1) | (indices >= projection.vocabulary)).any():
        checks.fail("teacher_indices", "an index outside the vocabulary", f"-1 or [0, {projection.vocabulary})")
    run = implementation("linear_sparse_kl_div", indices.device)
    return tokens.reduce(run(projection.take(tokens.rows), indices, logprobs, tail, workspace))


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
        checks.number(f"{prefix}softcap", softcap, "a number > 0, or None", 0, open_ends=True)
    checks.number("temperature", temperature, "a number > 0", 0, open_ends=True)
    return Projection(hidden.reshape(-1, hidden.shape[-1]), weight, bias, float(scale), softcap, float(temperature), vocab_size)


def _given(name: str, logits: torch.Tensor, temperature: float, vocab_size: int | None) -> Projection:
    """Logits that exist already, as the projection that returns them."""
    checks.number(name, temperature, "a number > 0", 0, open_ends=True)
    return GivenLogits(logits.reshape(-1, logits.shape[-1]), logits, temperature=float(temperature), vocab_size=vocab_size)


def _mask(mask: torch.Tensor | None, leading: torch.Size, device: torch.device) -> torch.Tensor:
    if mask is None:
        return torch.ones(leading, dtype=torch.bool, device=device).reshape(-1)
    return checks.per_token("mask", mask, leading, "bool", device).reshape(-1)


def _workspace(plan: Any, workspace_bytes: Any) -> int | None:
    checks.choice("plan", plan, ("auto", "direct"))
    return checks.workspace(workspace_bytes)
