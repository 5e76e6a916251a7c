"""The losses of OpenUnlearning's trainers as they compute them (src/trainer/unlearn there), from logits and hooks, and MaxEnt's, which
it does not have, in their manner.

Each takes the model, the original model, a batch ``{"forget": ..., "retain": ...}`` and an ``UnlearnConfig``. They share nothing with
``undo_core.unlearning`` but the settings and the direction that RMU draws.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from undo_core import ops


def logits_of(model: Any, inputs: dict[str, Any]) -> Any:
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]


def sequence_nll(model: Any, inputs: dict[str, Any]) -> Any:
    """Negative log-likelihood of each sequence, summed over its labels."""
    return F.cross_entropy(logits_of(model, inputs).mT, inputs["labels"][:, 1:], ignore_index=-100, reduction="none").sum(-1)


def graddiff(model: Any, original: Any, inputs: Any, config: Any) -> Any:
    return config.retain_weight * model(**inputs["retain"]).loss - model(**inputs["forget"]).loss


def npo(model: Any, original: Any, inputs: Any, config: Any) -> Any:
    beta = config.npo.beta
    with torch.no_grad():
        reference = sequence_nll(original, inputs["forget"])
    ratio = reference - sequence_nll(model, inputs["forget"])  # log p - log p_original
    forget = -2 / beta * F.logsigmoid(-beta * ratio).mean()
    return forget + config.retain_weight * model(**inputs["retain"]).loss


def maxent(model: Any, original: Any, inputs: Any, config: Any) -> Any:
    mask = inputs["forget"]["labels"][:, 1:] != -100
    logs = logits_of(model, inputs["forget"])[mask].log_softmax(-1)
    return -logs.mean() - math.log(logs.shape[-1]) + config.retain_weight * model(**inputs["retain"]).loss


def rmu(model: Any, original: Any, inputs: Any, config: Any) -> Any:
    """Both models run whole, as there; a hook takes the activations."""
    settings, taken = config.rmu, []

    def run(which: Any, part: str) -> Any:
        layer = which.model.layers[settings.target_layer - 1]
        handle = layer.register_forward_hook(
            lambda module, arguments, output: taken.append(output[0] if isinstance(output, tuple) else output)
        )
        try:
            logits_of(which, inputs[part])
        finally:
            handle.remove()
        return taken.pop()

    def mean(difference: Any, part: str) -> Any:
        """Mean over the labels of each sequence, then over the sequences."""
        labelled = inputs[part]["labels"] != -100
        return ((difference.square().mean(-1) * labelled).sum(-1) / labelled.sum(-1)).mean()

    direction = settings.coefficient * ops.misdirection(model.config.hidden_size, config.train.seed or 0, settings.direction)
    with torch.no_grad():
        kept = run(original, "retain")
    return mean(run(model, "forget") - direction, "forget") + config.retain_weight * mean(run(model, "retain") - kept, "retain")


LOSSES = {"graddiff": graddiff, "npo": npo, "maxent": maxent, "rmu": rmu}
