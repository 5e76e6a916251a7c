"""JensUn: bring the next-token distribution on the forget text near a fixed answer, in the Jensen-Shannon divergence.

``mean(JSD(onehot(a), p))(forget) + retain_weight * R(retain)`` with the tokens ``a`` of a refusal in the place of the labels (Singh et
al., "Unlearning That Lasts: Utility-Preserving, Robust, and Almost Irreversible Forgetting in LLMs", 2025, arXiv 2509.02820). Its
retain term is the same divergence from the original model: ``retain_loss: jsd``.

No ``[tokens, V]`` array is needed. With the mixture ``m = (onehot(a) + p) / 2`` every other entry of ``p`` is halved in ``m``, so that

    JSD = KL(onehot(a) || m) / 2 + KL(p || m) / 2 = log 2 + (p_a log p_a - (1 + p_a) log(1 + p_a)) / 2

depends on the cross-entropy ``-log p_a`` alone. It is at most ``log 2``, and its gradient fades where the model is far from the answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from undo_core.distributed import head_ops
from undo_core.models import forward_flops, head_flops, head_of, hidden_states, vocabulary_of
from undo_core.training.batches import Batch
from undo_core.unlearning.method import Method, Settings, forget_and_retain, register


@dataclass(frozen=True)
class JensUnConfig:
    """Settings of JensUn alone.

    Attributes:
        answer: token ids that take the place of the labels of a sequence, in this order and repeated to its end; published: those of
            "No idea". Empty for the token that ends a text in the model's configuration.
    """

    answer: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not all(isinstance(token, int) and token >= 0 for token in self.answer):
            raise ValueError(f"answer: got {self.answer}, wanted token ids, integers >= 0")


def _flops(model: PreTrainedModel, config: Settings, length: int) -> dict[str, float]:
    """FLOPs: a forward and backward pass, and the head again for the cross-entropies of single tokens."""
    own = 3 * forward_flops(model, length)
    return {"forget": own + head_flops(model), "retain": own if config.retain_weight else 0.0}


@register("jensun", "JensUn", settings=JensUnConfig, flops=_flops)
def jensun(model: PreTrainedModel, config: Settings) -> Method:
    """JensUn.

    Raises:
        ValueError: no answer is given and the model's configuration has no end of text, or a token that the head lacks.
    """
    answer, entries = answer_of(model, config.jensun), vocabulary_of(model)
    if max(answer) >= entries:
        raise ValueError(f"jensun.answer: got token {max(answer)}, wanted tokens below the head's {entries}")

    def forget(model: PreTrainedModel, batch: Batch, counted: int) -> torch.Tensor:
        inputs, _, mask = batch.shifted()
        tokens = torch.tensor(answer, device=mask.device)
        wanted = tokens[(mask.cumsum(-1) - 1).clamp_min(0) % len(answer)].masked_fill(~mask, -100)
        nats = head_ops.linear_cross_entropy(hidden_states(model, *inputs), head_of(model), wanted, reduction="none")
        p = torch.exp(-nats)
        return (math.log(2) - (p * nats + (1 + p) * torch.log1p(p)) / 2).masked_fill(~mask, 0.0).sum() / max(counted, 1)

    return Method(forget_and_retain(forget, model, config))


def answer_of(model: PreTrainedModel, settings: JensUnConfig) -> list[int]:
    """Token ids of the answer: the configured ones, or the end of a text."""
    end = getattr(model.config, "eos_token_id", None)
    found = settings.answer or (end if isinstance(end, list) else [] if end is None else [end])[:1]
    if not found:
        raise ValueError("jensun.answer: got none for a model whose configuration has no eos_token_id, wanted token ids")
    return found
