"""Gives a model whose head shares the embedding's weight a head of its own, so that each can be damaged and trained alone."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from undo_core.models.loading import skeleton


def untied_configuration(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns a copy of a configuration whose models have a head of their own."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    return config


def check_tied(model: PreTrainedModel) -> None:
    """Raises a ValueError if the model, which may be on the meta device, has no head, or one that shares no weight."""
    output = model.get_output_embeddings()
    shared = [one for _, one in model.named_parameters(remove_duplicate=False) if output is not None and one is output.weight]
    if len(shared) < 2:
        raise ValueError(f"untie: got a {type(model).__name__} whose head shares no weight, wanted one with a tied head")


@torch.no_grad()
def untied(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the same model with a head of its own, which starts as a copy of the embedding's weight.

    Both models compute the same. ``tie_word_embeddings`` is off in the new configuration, so that a saved checkpoint holds both
    matrices and loads with both. All other parameters are those of ``model``, which must not be used any more.

    Memory: one more matrix of the vocabulary; in training also its gradient and its optimizer states.

    Raises:
        ValueError: the model has no head, or its head shares no weight.
    """
    check_tied(model)
    output = model.get_output_embeddings()
    result = skeleton(untied_configuration(model.config), buffers=True)
    result.load_state_dict(model.state_dict(), assign=True)  # the state of a tied model has the weight under each of its names
    held: set[int] = set()
    for module in result.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.data_ptr() in held:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            held.add(parameter.data_ptr())
    result.get_input_embeddings().padding_idx = getattr(model.get_input_embeddings(), "padding_idx", None)  # see load_model
    result.generation_config = model.generation_config
    return result.to(output.weight.device)
