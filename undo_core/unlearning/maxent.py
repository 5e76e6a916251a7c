"""MaxEnt: predict uniformly on the forget text. ``KL(U || p)(forget) + retain_weight * CE(retain)``."""

from __future__ import annotations

import functools

from transformers import PreTrainedModel

from undo_core.training.losses import uniform_kl
from undo_core.unlearning.method import Method, Settings, forget_and_retain, register


@register("maxent", "MaxEnt")
def maxent(model: PreTrainedModel, config: Settings) -> Method:
    """MaxEnt; trains every parameter. The published method for language and arithmetic (arXiv 2506.06278, code)."""
    return Method(forget_and_retain(functools.partial(uniform_kl, vocab_size=config.vocab_size), model, config))
