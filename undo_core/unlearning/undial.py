"""UNDIAL: on the forget text, distill the original model with the logit of the label lowered by ``gamma``.

``KL(q || p)(forget) + retain_weight * CE(retain)`` with ``q = softmax(z_original - gamma * onehot(y))`` (Dong et al., "UNDIAL:
Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models", 2024, arXiv 2402.10052).

No ``[tokens, V]`` array is needed for ``q``. With ``t = softmax(z_original)``, ``d = 1 - exp(-gamma)`` and ``Z = 1 - d t_y``,
``q`` is ``t / Z`` except for ``q_y = exp(-gamma) t_y / Z``, so that

    KL(q || p) = (KL(t || p) - d t_y (CE_p(y) - CE_t(y))) / Z - gamma q_y - log Z

is the plain distillation loss and a cross-entropy, each with a weight per token. Where the original is certain of the label,
``1 / Z`` approaches ``exp(gamma)`` and amplifies rounding errors as much; hence the limit on ``gamma``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from undo_core.distributed import head_ops
from undo_core.distributed.sharding import run
from undo_core.models import Head, forward_flops, head_flops, head_of, hidden_states
from undo_core.training.batches import Batch
from undo_core.unlearning.method import Method, Settings, forget_and_retain, original_of, register

MOST = 10.0


@dataclass(frozen=True)
class UNDIALConfig:
    """Settings of UNDIAL alone.

    Attributes:
        gamma: amount by which the label's logit is lowered; at most 10, which is also OpenUnlearning's default.
    """

    gamma: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= MOST:
            raise ValueError(f"gamma: got {self.gamma}, wanted a number in (0, {MOST:g}]")


def _flops(model: PreTrainedModel, config: Settings, length: int) -> dict[str, float]:
    """FLOPs: the original's forward pass, the student's forward and backward pass, and its head again for the cross-entropy."""
    own = forward_flops(model, length)
    return {"forget": 4 * own + 3 * head_flops(model), "retain": 3 * own if config.retain_weight else 0.0}


@register("undial", "UNDIAL", settings=UNDIALConfig, flops=_flops)
def undial(model: PreTrainedModel, config: Settings) -> Method:
    """UNDIAL.

    Memory: a copy of the model in the dtype of the weights, without gradients, and a second gradient of the head while the two
        terms are added.
    """
    gamma, lowered = config.undial.gamma, -math.expm1(-config.undial.gamma)
    original = original_of(model, config)

    @torch.no_grad()
    def taught(original: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Head]:
        """Final hidden states, cross-entropies of the labels, and head of the original."""
        inputs, labels, mask = batch.shifted()
        known, head = hidden_states(original, *inputs), head_of(original)
        labels = labels.masked_fill(~mask, -100)
        return known, head_ops.linear_cross_entropy(known, head, labels, reduction="none"), head

    def forget(model: PreTrainedModel, batch: Batch, counted: int) -> torch.Tensor:
        inputs, labels, mask = batch.shifted()
        labels = labels.masked_fill(~mask, -100)
        known, nats, head = run(original, taught, batch)
        with torch.no_grad():
            total = math.exp(-gamma) - lowered * torch.expm1(-nats)  # Z
            share = torch.exp(-nats) / total
            constant = lowered * share * nats - gamma * math.exp(-gamma) * share - total.log()
        own, hidden = head_of(model), hidden_states(model, *inputs)
        normalizer = float(max(counted, 1))
        whole = head_ops.linear_kl_div(hidden, own, known, head, mask=mask, token_weight=1 / total, normalizer=normalizer)
        label = head_ops.linear_cross_entropy(hidden, own, labels, token_weight=lowered * share, normalizer=normalizer)
        return whole - label + constant.masked_fill(~mask, 0.0).sum() / normalizer

    return Method(forget_and_retain(forget, model, config))
