"""Quantisation of the weights by torchao, which can restore an unlearned capability (Zhang et al. 2024, arXiv 2410.16454)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from undo_core.attacks.config import check_installed


@torch.no_grad()
def quantise_(model: PreTrainedModel, bits: int, group_size: int = 32) -> int:
    """Rounds the weight matrices of ``model`` to integers with symmetric scales, in place; they hold the dequantised values.

    Covers every ``Linear`` and ``Conv1D`` (GPT-2) except the head, as the libraries that load models in 8 or 4 bits do.
    Embeddings, norms and routers of other classes are not changed. Values are rounded to nearest. With 8 bits each row of a
    matrix ``[out, in]`` has one scale; with fewer bits each group of ``group_size`` columns in a row has one.

    Args:
        model: any Hugging Face causal language model; keeps its dtype.
        bits: bits per weight, from 2 to 8.
        group_size: number of columns that share a scale, with fewer than 8 bits.

    Returns:
        The number of rounded weights.

    Memory: one matrix at a time, as integers and scales.

    Raises:
        ModuleNotFoundError: torchao is not installed.
        ValueError: ``bits`` out of range, a matrix whose number of columns is not a multiple of ``group_size``, or a matrix of
            another kind of layer, such as stacked experts; nothing is changed.
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
    """View of the weight as ``[out, in]``."""
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


def _check_all_matrices(model: PreTrainedModel, layers: Iterable[nn.Module]) -> None:
    """Raises a ValueError if a matrix would silently not be rounded."""
    kept = [m for m in model.modules() if isinstance(m, nn.Embedding) or "router" in type(m).__name__.lower()]
    known = {id(parameter) for module in (*layers, *kept, model.get_output_embeddings()) for parameter in module.parameters()}
    unknown = [name for name, parameter in model.named_parameters() if parameter.dim() > 1 and id(parameter) not in known]
    if unknown:
        raise ValueError(
            f"model: got {type(model).__name__}, whose {unknown[0]} (of {len(unknown)} such) is not the weight of a Linear "
            "or Conv1D and cannot be rounded; wanted a model without such matrices"
        )
