"""Top-k: learn the original model's own distribution with the forget text suppressed, of which only the ``k`` main tokens are kept.

``mean(KL(q || p))(forget) + w CE(retain)``. With the original model's probabilities ``r`` and the label ``y``, ``q`` is ``r`` with the
logit of ``y`` lowered by ``gamma``: ``q_v = r_v exp(-gamma [v = y]) / Z``, ``Z = 1 - r_y (1 - exp(-gamma))``. The KL is over the
outcomes ``S`` and "any other token". ``S`` are the ``k`` most likely tokens under ``r``; if ``y`` is not one of them, it takes the
place of the least likely. So ``y`` is always an outcome of its own, and cannot hide among the others.

The target is that of UNDIAL (arXiv 2402.10052) on the top-k logits that DUET (Zhong et al. 2026, arXiv 2601.21283) distills; DUET's own
teacher is the original model with a prompt before the text, which token sequences do not have here. No published method is exactly
this one. It is computed once, before the first step, so that no second model stays in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from undo_core.distillation.cache_writer import stored_form
from undo_core.distillation.teacher import TeacherConfig
from undo_core.distributed import head_ops
from undo_core.models import forward_flops, head_flops, head_of, hidden_states, vocabulary_of
from undo_core.training.batches import Batch
from undo_core.unlearning.method import Method, Settings, forget_and_retain, register


@dataclass(frozen=True)
class TopKConfig:
    """Settings of Top-k alone.

    Attributes:
        k: number of tokens of each position whose probabilities are kept; all of a smaller head.
        gamma: amount by which the label's logit is lowered.
    """

    k: int = 64
    gamma: float = 10.0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k: got {self.k}, wanted an integer >= 1")
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise ValueError(f"gamma: got {self.gamma}, wanted a finite number > 0")


def _reference_flops(model: PreTrainedModel, config: Settings, length: int) -> dict[str, float]:
    """FLOPs: a forward pass, and the head again for the cross-entropies of the labels."""
    return {"forget": forward_flops(model, length) + head_flops(model), "retain": 0.0}


@register("topk", "Top-k", settings=TopKConfig, reference_flops=_reference_flops)
def topk(model: PreTrainedModel, config: Settings) -> Method:
    """Top-k.

    Memory: no second model; ``8 k`` bytes on the host for each position of the forget text of all steps. A resumed run computes them
    again.
    """
    gamma = config.topk.gamma
    k = min(config.topk.k, vocabulary_of(model))

    def reference(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        inputs, labels, mask = batch.shifted()
        hidden, head = hidden_states(model, *inputs), head_of(model)
        wanted = labels.masked_fill(~mask, -100)
        nats = head_ops.linear_cross_entropy(hidden, head, wanted, reduction="none").float()
        known = stored_form(hidden.flatten(0, 1), head, TeacherConfig("topk", k=k))
        indices, logprobs = (known[name].unflatten(0, labels.shape) for name in ("indices", "logprobs"))
        # Both in one tensor: float32 holds every integer up to 2**24, more than any vocabulary.
        return torch.cat([part.float() for part in suppressed(indices.long(), logprobs, labels, nats, gamma)], -1)

    def forget(model: PreTrainedModel, batch: Batch, counted: int) -> torch.Tensor:
        inputs, _, mask = batch.shifted()
        indices, logprobs = batch.reference[..., :k].int(), batch.reference[..., k:]
        return head_ops.linear_sparse_kl_div(
            hidden_states(model, *inputs),
            head_of(model),
            indices.masked_fill(~mask[..., None], -1),
            logprobs,
            tail="bucket",
            mask=mask,
            normalizer=float(max(counted, 1)),
        )

    return Method(forget_and_retain(forget, model, config), reference=reference)


def suppressed(
    indices: torch.Tensor, logprobs: torch.Tensor, labels: torch.Tensor, nats: torch.Tensor, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns tokens and log-probabilities ``[..., k]`` of the distribution with the label's logit lowered by ``gamma``.

    Args:
        indices: ``[..., k]`` most likely tokens, by falling probability.
        logprobs: ``[..., k]`` their log-probabilities.
        labels: ``[...]`` tokens to be suppressed.
        nats: ``[...]`` minus their log-probabilities.
        gamma: amount by which their logits are lowered.
    """
    is_label = indices == labels[..., None]
    missing = ~is_label.any(-1)
    is_label[..., -1] |= missing
    indices = torch.where(is_label, labels[..., None], indices)
    logprobs = torch.where(is_label, -nats[..., None] - gamma, logprobs)
    total = math.exp(-gamma) + math.expm1(-gamma) * torch.expm1(-nats)  # Z, without cancellation where the label is certain
    return indices, logprobs - total.log()[..., None]
