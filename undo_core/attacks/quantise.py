"""Quantisation of the weights by torchao, which can restore an unlearned capability (Zhang et al. 2024, arXiv 2410.16454)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from undo_core.attacks.config import check_installed
from undo_core.attacks.matrices import matrices_of


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
    matrices = matrices_of(model)
    for name, weight in matrices.items():
        columns = weight.shape[1]
        if bits < 8 and columns % group_size:
            raise ValueError(f"group_size: got {group_size}, wanted a divisor of the {columns} columns of {name}")
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    granularity = PerAxis(0) if bits == 8 else PerGroup(group_size)
    how = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity)
    for weight in matrices.values():
        rounded = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
        rounded.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        quantize_(rounded, how)
        weight.copy_(rounded.weight.dequantize())
    return sum(weight.numel() for weight in matrices.values())
