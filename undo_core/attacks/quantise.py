"""Quantisation of the weights, by torchao; it can bring back what unlearning took away (Zhang et al. 2024, arXiv 2410.16454)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from undo_core.attacks.config import check_installed


@torch.no_grad()
def quantise_(model: PreTrainedModel, bits: int, group_size: int = 32) -> int:
    """Round the matrices of ``model`` to integers with symmetric scales, in place, and compute on with the rounded values.

    Every ``Linear`` and ``Conv1D`` (GPT-2) but the head, as in the libraries that load models in 8 or 4 bits; embeddings, norms and
    routers of another kind stay. Rounded to nearest: with 8 bits with one scale for each row of a matrix ``[out, in]``, with fewer for each
    group of ``group_size`` columns of it.

    Args:
        model: any Hugging Face causal language model; its dtype stays.
        bits: of a weight, from 2 to 8.
        group_size: columns that share a scale, with fewer than 8 bits.

    Returns:
        How many weights were rounded.

    Memory: one matrix at a time, as integers and scales.

    Raises:
        ModuleNotFoundError: torchao is not installed.
        ValueError: other ``bits``, a matrix whose columns are no whole number of groups, or one that is none of these layers', such as
            stacked experts; nothing is changed.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: got {bits}, wanted an integer from 2 to 8")
    check_installed("quantise")
    head = model.get_output_embeddings()
    layers = {
        n: module for n, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    _check_all_matrices(model, layers.values())
    for name, layer in layers.items():
        columns = _rows(layer).shape[1]
        if bits < 8 and columns % group_size:
            raise ValueError(f"group_size: got {group_size}, wanted a divisor of the {columns} columns of {name}")
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    granularity = PerAxis(0) if bits == 8 else PerGroup(group_size)
    how = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity)
    for layer in layers.values():
        weight = _rows(layer)
        rounded = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
        rounded.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        quantize_(rounded, how)
        weight.copy_(rounded.weight.dequantize())
    return sum(layer.weight.numel() for layer in layers.values())


def _rows(layer: nn.Linear | Conv1D) -> torch.Tensor:
    """The weight as ``[out, in]``, a view."""
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


def _check_all_matrices(model: PreTrainedModel, layers: Iterable[nn.Module]) -> None:
    """Raise a ValueError where a matrix would silently keep all its bits."""
    kept = [m for m in model.modules() if isinstance(m, nn.Embedding) or "router" in type(m).__name__.lower()]
    known = {id(parameter) for module in (*layers, *kept, model.get_output_embeddings()) for parameter in module.parameters()}
    unknown = [name for name, parameter in model.named_parameters() if parameter.dim() > 1 and id(parameter) not in known]
    if unknown:
        raise ValueError(
            f"model: got {type(model).__name__}, whose {unknown[0]} (of {len(unknown)} such) is the weight of no Linear or Conv1D and "
            f"cannot be rounded; wanted a model without such matrices"
        )
