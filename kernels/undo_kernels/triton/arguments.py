"""Structures of kernel arguments: what belongs together is passed together.

Fields in capitals are compile-time constants (``tl.constexpr``); the others are tensors, whose names end in ``_ptr``, and
numbers. ``run.py`` builds them.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Logits(NamedTuple):
    """Stored logits of one side, and what shapes them; see ``pair_math.py``."""

    z_ptr: Any  # [tokens, >= vocabulary]
    bias_ptr: Any
    stride: int  # from one token to the next
    inner: float
    outer: float
    HAS_BIAS: Any
    CAPPED: Any
    BOUNDED: Any  # the cap is the base of the exponentials
    MATH: Any  # see math.py


class Head(NamedTuple):
    """Hidden states and weight of one side, whose products are logits; shaped like :class:`Logits`."""

    hidden_ptr: Any  # [tokens, width]
    weight_ptr: Any  # [vocabulary, width]
    bias_ptr: Any
    width: int
    stride_hidden: int
    stride_weight: int
    inner: float
    outer: float
    HAS_BIAS: Any
    CAPPED: Any
    BOUNDED: Any  # the cap is the base of the exponentials
    MATH: Any  # see math.py
    EVEN: Any  # the width is a multiple of BLOCK_D
    TOGETHER: Any  # one loop forms the products of both sides, whose widths agree


class Split(NamedTuple):
    """The vocabulary in parts of equal length, and the partial sums ``[FIELDS, tokens, parts]`` of one chunk."""

    partial_ptr: Any
    vocabulary: int
    part: int  # length
    parts: int
    stride_field: int


class Sums(NamedTuple):
    """What the statistics say about each token; ``lse = base + log_sum`` of either side."""

    base_s_ptr: Any
    base_t_ptr: Any
    log_sum_s_ptr: Any
    log_sum_t_ptr: Any
    gap_ptr: Any  # log_sum_s - log_sum_t, without cancellation
    offset_ptr: Any  # the KL inside the gradients of reverse KL and jsd


class Weights(NamedTuple):
    """Factors of each token's gradient, and the divergence's parameters."""

    factor_ptr: Any  # of the divergence
    own_ptr: Any  # of p_s, from the negative log-likelihood
    at_label_ptr: Any  # the nll's whole gradient at the label
    labels_ptr: Any
    beta_t: float
    beta_s: float


class LossForm(NamedTuple):
    """What a loss kernel computes."""

    TARGET: Any
    UNIFORM: Any
    SAME: Any  # both sides have the same ``inner`` and ``outer``
    EXTREME: Any  # one of the weights of jsd is close to 0
    GRADIENT: Any
    NLL: Any  # a multiple of p_s is added
    LABELS: Any
    MASKED: Any


class Combined(NamedTuple):
    """Outputs ``[tokens]`` of the statistics, besides :class:`Sums`."""

    lse_s_ptr: Any
    lse_t_ptr: Any
    nll_ptr: Any
    entropy_ptr: Any
    agreement_ptr: Any


class Known(NamedTuple):
    """Inputs ``[tokens]`` of the statistics that earlier passes or calls computed."""

    counted_ptr: Any
    labels_ptr: Any
    label_z_ptr: Any  # the logit of each label
    lse_s_ptr: Any
    lse_t_ptr: Any


class StatsForm(NamedTuple):
    """What the partial sums contain, and what is computed from them."""

    STUDENT: Any
    TEACHER: Any
    CROSS: Any  # E_s[z_s - z_t], for the gradient of reverse KL; needs TEACHER, like STATISTICS
    STATISTICS: Any  # the teacher's entropy and both top-1
    DIFFERENCES: Any  # the sum of the differences of the exponentials
    FAST: Any  # they are in units of log 2
    LESS_ONE: Any  # the sums of exponentials leave out the largest term, 1
    PAIR: Any  # there is a teacher, given by sums, by its known log-sum-exp, or UNIFORM
    UNIFORM: Any
    NLL: Any
    LABELS: Any
    MASKED: Any
