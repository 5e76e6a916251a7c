"""Means and covariances of two models' layer outputs on the same tokens, added up in float64 without storing the outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from undo_core.data.sequences import Sequences
from undo_core.evaluation.activations import output_bytes, outputs_of
from undo_core.models.layers import find_layers


@dataclass(frozen=True)
class Moments:
    """Moments of two models' outputs ``x`` and ``y`` of one layer.

    Attributes:
        means: of x and of y, ``[d]`` each.
        xx, yy, xy: covariances, ``[d, d]``: mean of ``(x - mean)^T (y - mean)``.
    """

    means: tuple[torch.Tensor, torch.Tensor]
    xx: torch.Tensor
    yy: torch.Tensor
    xy: torch.Tensor


def joint_moments(
    model: PreTrainedModel, other: PreTrainedModel, sequences: Sequences, *, one_width: bool = False
) -> list[Moments]:
    """Returns the moments of every layer, first to last.

    Memory: three ``[d, d]`` float64 matrices for each layer, and a batch of outputs of both models.

    Raises:
        ValueError: the models differ in their number of layers or, with ``one_width``, in the width of their hidden states.
    """
    counts = [len(find_layers(each)) for each in (model, other)]
    if counts[0] != counts[1]:
        raise ValueError(f"against: got a model of {counts[1]} layers, wanted the {counts[0]} of the measured one")
    widths = [each.get_input_embeddings().weight.shape[1] for each in (model, other)]
    if one_width and widths[0] != widths[1]:
        raise ValueError(f"against: got a model of width {widths[1]}, wanted the {widths[0]} of the measured one")
    sums: list[list[torch.Tensor]] = [[] for _ in range(counts[0])]
    shifts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    tokens = 0
    for xs, ys in zip(outputs_of(model, sequences), outputs_of(other, sequences), strict=True):
        tokens += len(xs[0])
        for layer, found in enumerate(sums):
            x, y = xs[layer].double(), ys[layer].double()
            shifts.setdefault(layer, (x.mean(0), y.mean(0)))  # near the mean, so that the products do not cancel
            x, y = x - shifts[layer][0], y - shifts[layer][1]
            parts = [x.sum(0), y.sum(0), x.T @ x, y.T @ y, x.T @ y]
            sums[layer] = [a + b for a, b in zip(found, parts, strict=True)] if found else parts
    moments = []
    for layer in range(len(sums)):
        x, y, xx, yy, xy = (part / tokens for part in sums[layer])
        sums[layer] = []  # frees the sums as their moments are made
        centred = (xx - torch.outer(x, x), yy - torch.outer(y, y), xy - torch.outer(x, y))
        moments.append(Moments((x + shifts[layer][0], y + shifts[layer][1]), *centred))
    return moments


def moment_bytes(model: PreTrainedModel) -> int:
    """Bytes that :func:`joint_moments` holds: the matrices of every layer, those of a layer being made, and the outputs."""
    width = model.get_input_embeddings().weight.shape[1]
    return 3 * 8 * width**2 * (len(find_layers(model)) + 2) + 2 * output_bytes(model)
