"""GradDiff: gradient ascent on the forget text. ``-CE(forget) + retain_weight * CE(retain)``."""

from __future__ import annotations

from transformers import PreTrainedModel

from undo_core.training.losses import cross_entropy
from undo_core.unlearning.method import Method, Settings, forget_and_retain, register


@register("graddiff", "GradDiff")
def graddiff(model: PreTrainedModel, config: Settings) -> Method:
    """GradDiff; trains every parameter. Published with retain weight 1 for language and 15 for arithmetic."""
    return Method(forget_and_retain(lambda *arguments: -cross_entropy(*arguments), model, config))
