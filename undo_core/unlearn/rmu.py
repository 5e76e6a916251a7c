"""RMU: misdirect the forget text's activations. ``mean((h_l(forget) - c u)**2) + retain_weight * mean((h_l - h_l^frozen)(retain)**2)``.

``u`` is a fixed unit vector, Gaussian in direction; ``h_l`` are the hidden states after ``target_layer`` layers; only the
``down_proj`` matrices of the layers below are trained (Li et al., "The WMDP Benchmark", 2024, in the form of the UNDO code).
"""

from __future__ import annotations

import copy
from fnmatch import fnmatch

import torch
from torch import nn
from transformers import PreTrainedModel

from undo_core import ops
from undo_core.training.batches import Batch
from undo_core.unlearn.config import UnlearnConfig
from undo_core.unlearn.method import Method


def rmu(model: PreTrainedModel, config: UnlearnConfig) -> Method:
    """Memory: a frozen second model gives the retain activations.

    Raises:
        ValueError: the target layer is beyond the model, or no parameter matches the pattern.
    """
    settings = config.rmu
    layers = _layers(model)
    if settings.target_layer > len(layers):
        raise ValueError(f"rmu.target_layer: got {settings.target_layer}, wanted at most the model's {len(layers)} layers")
    trained = [
        parameter
        for layer in layers[settings.first_layer : settings.target_layer]
        for name, parameter in layer.named_parameters()
        if fnmatch(name, settings.trained)
    ]
    if not trained:
        raise ValueError(
            f"rmu.trained: got {settings.trained!r}, which no parameter of layers {settings.first_layer} and up matches"
        )
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    hidden_size = model.config.get_text_config().hidden_size
    direction = ops.misdirection(hidden_size, config.train.seed or 0).to(trained[0].device)

    def activations(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        output = model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, output_hidden_states=True
        )
        return output.hidden_states[settings.target_layer]

    def loss(model: PreTrainedModel, batches: dict[str, Batch], counted: dict[str, int]) -> torch.Tensor:
        terms = []
        if "forget" in batches:
            term = ops.rmu_loss(
                activations(model, batches["forget"]),
                direction,
                coefficient=settings.coefficient,
                **_padding(batches["forget"]),
            )
            terms.append(term * _share(batches["forget"], counted["forget"]))
        if "retain" in batches:
            with torch.no_grad():
                target = activations(frozen, batches["retain"])
            term = ops.rmu_loss(activations(model, batches["retain"]), target, **_padding(batches["retain"]))
            terms.append(config.retain_weight * term * _share(batches["retain"], counted["retain"]))
        return sum(terms)

    return Method(loss, trained)


def _padding(batch: Batch) -> dict[str, object]:
    """Mean over the tokens that are labels, as in the other methods; the published code averages over every position."""
    mask = batch.mask.clone()
    mask[:, 0] = False
    return {"mask": mask, "normalize": "masked"}


def _share(batch: Batch, counted: int) -> float:
    """The micro-batch's part of the whole batch's labels."""
    return batch.counted / max(counted, 1)


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    lists = [
        m
        for m in model.base_model.modules()
        if isinstance(m, nn.ModuleList) and len(m) == model.config.get_text_config().num_hidden_layers
    ]
    if not lists:
        raise ValueError(f"model: got {type(model).__name__}, in which no list of its layers was found; RMU needs one")
    return lists[0]
