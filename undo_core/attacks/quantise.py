"""Quantisation of the weights, by torchao; it can bring back what unlearning took away (Zhang et al. 2024, arXiv 2410.16454)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from undo_core.attacks.config import check_installed


@torch.no_grad()
def quantise_(model: PreTrainedModel, bits: int, group_size: int = 32) -> int:
    """Round the matrices of ``model`` to integers with symmetric scales, in place, and compute on with the rounded values.

    Every ``Linear`` but the head, as in the libraries that load models in 8 or 4 bits; embeddings and norms stay. Rounded to nearest:
    with 8 bits with one scale for each row of a matrix, with fewer for each group of ``group_size`` columns of it.

    Args:
        model: any Hugging Face causal language model; its dtype stays.
        bits: of a weight, from 2 to 8.
        group_size: columns that share a scale, with fewer than 8 bits.

    Returns:
        How many weights were rounded.

    Memory: one matrix at a time, as integers and scales.

    Raises:
        ModuleNotFoundError: torchao is not installed.
        ValueError: other ``bits``, or a matrix whose columns are no whole number of groups; nothing is changed.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: got {bits}, wanted an integer from 2 to 8")
    check_installed("quantise")
    head = model.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    for name, layer in layers.items():
        if bits < 8 and layer.in_features % group_size:
            raise ValueError(f"group_size: got {group_size}, wanted a divisor of the {layer.in_features} columns of {name}")
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    granularity = PerAxis(0) if bits == 8 else PerGroup(group_size)
    how = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity)
    for layer in layers.values():
        rounded = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        rounded.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
        quantize_(rounded, how)
        layer.weight.copy_(rounded.weight.dequantize())
    return sum(layer.weight.numel() for layer in layers.values())
