"""The weight matrices that attacks round or prune: those of the linear layers, without the head."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def matrices_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns every ``Linear`` and ``Conv1D`` weight except the head's, by layer, as views ``[out, in]`` of the parameters.

    Raises:
        ValueError: the model has a matrix of another kind of layer, such as stacked experts, which would not be among them.
    """
    head = model.get_output_embeddings()
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    _check_all_matrices(model, layers.values())
    return {name: _rows(layer) for name, layer in layers.items()}


def _rows(layer: nn.Linear | Conv1D) -> torch.Tensor:
    """View of the weight as ``[out, in]``."""
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


def _check_all_matrices(model: PreTrainedModel, layers: Iterable[nn.Module]) -> None:
    """Raises a ValueError if a matrix would silently be left out."""
    kept = [m for m in model.modules() if isinstance(m, nn.Embedding) or "router" in type(m).__name__.lower()]
    known = {id(parameter) for module in (*layers, *kept, model.get_output_embeddings()) for parameter in module.parameters()}
    unknown = [name for name, parameter in model.named_parameters() if parameter.dim() > 1 and id(parameter) not in known]
    if unknown:
        raise ValueError(
            f"model: got {type(model).__name__}, whose {unknown[0]} (of {len(unknown)} such) is not the weight of a Linear "
            "or Conv1D and can neither be rounded nor pruned; wanted a model without such matrices"
        )
