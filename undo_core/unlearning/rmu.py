"""RMU: misdirect the activations on the forget text.

``mean((h_l(forget) - c u)**2) + retain_weight * mean((h_l - h_l^frozen)(retain)**2)``.

``u`` is a fixed unit vector. ``h_l`` are the hidden states after ``target_layer`` layers, before the final norm. Trained are
only the matrices in the layers below that match a pattern (Li et al., "The WMDP Benchmark", 2024, as in the UNDO code).

Cost of a step: the layers below the first trained one run forward once, without gradients. The layers from there to the target
layer run forward and backward; for the retain text they also run forward with the original copies of the trained matrices. No
layer above runs. The frozen activations, and the layers below the first trained one, are computed in evaluation mode, because
dropout would add noise to the targets. The trained layers run in the model's own mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from undo_core import ops
from undo_core.models import evaluating, forward_flops
from undo_core.models.adapters import adapter_parameters, has_adapters
from undo_core.models.layers import find_layers
from undo_core.training.batches import Batch
from undo_core.training.precision import weight_dtype
from undo_core.unlearning.activations import Entered, Trunk
from undo_core.unlearning.method import Method, Settings, register


@dataclass(frozen=True)
class RMUConfig:
    """Settings of RMU alone.

    As published for UNDO: arithmetic and language train layers 5 to 10 of 14 (``first_layer: 5, target_layer: 11``; their list
    names 11 too, which comes after the activations that are used), coefficients 6 and 6.5, no retain term
    (``retain_weight: 0``), ``normalize: all``, ``direction: gaussian``; WMDP with Gemma 2 2B
    ``first_layer: 10, target_layer: 15``, coefficient 80. The original RMU draws a uniform direction.

    Attributes:
        first_layer: first layer whose matrices are trained (from 0).
        target_layer: number of layers after which the activations are misdirected (before the final norm); layers from
            ``first_layer`` to below it are trained.
        coefficient: norm of the misdirection vector; the published arithmetic setting is 6.
        trained: pattern of the names of trained parameters within a layer; for GPT-NeoX it is ``mlp.dense_4h_to_h.weight``. In
            a model with adapters, the pattern of the weights whose adapters are trained.
        normalize: positions that the means are taken over: all (every position, padding included, as published), masked (the
            tokens that are labels) or sequence (first over the labels of each sequence, then over the sequences with labels).
        direction: distribution of the entries of the misdirection vector: gaussian, or uniform on (0, 1).
    """

    first_layer: int = 0
    target_layer: int = 2
    coefficient: float = 6.0
    trained: str = "*mlp.down_proj.weight"
    normalize: Literal["all", "masked", "sequence"] = "masked"
    direction: Literal["gaussian", "uniform"] = "gaussian"

    def __post_init__(self) -> None:
        if not 0 <= self.first_layer < self.target_layer:
            raise ValueError(
                f"target_layer: got {self.target_layer}, wanted more than first_layer, {self.first_layer}, which is >= 0"
            )
        if not (math.isfinite(self.coefficient) and self.coefficient > 0):
            raise ValueError(f"coefficient: got {self.coefficient}, wanted a finite number > 0")
        if self.normalize not in ("all", "masked", "sequence"):
            raise ValueError(f"normalize: got {self.normalize!r}, wanted all, masked or sequence")
        if self.direction not in ("gaussian", "uniform"):
            raise ValueError(f"direction: got {self.direction!r}, wanted gaussian or uniform")


def _check(config: Settings) -> None:
    if config.retain_loss != "cross-entropy":
        raise ValueError(
            f"retain_loss: got {config.retain_loss}, which method rmu does not support: its retain term compares activations; remove it"
        )


@register("rmu", "RMU", settings=RMUConfig, flops=lambda *arguments: rmu_flops(*arguments), check=_check, whole_sequences=True)
def rmu(model: PreTrainedModel, config: Settings) -> Method:
    """RMU. Memory: the activations of the trained layers, and a copy of each trained matrix as it is now.

    Raises:
        ValueError: the model has fewer layers than the target layer, no parameter matches the pattern, or the layers cannot be
            run in parts.
    """
    settings, trunk = config.rmu, Trunk(model)
    trained = trained_parameters(trunk.layers, settings)
    first, last = min(trained), settings.target_layer
    # Copied before the training loop loads a checkpoint, so that a resumed run has the original model's frozen activations.
    dtype = weight_dtype(config.train.precision)
    frozen = {k: {name: p.detach().to(dtype, copy=True) for name, p in named.items()} for k, named in trained.items()}
    parameters = [p for named in trained.values() for p in named.values()]
    hidden_size = model.config.get_text_config().hidden_size
    direction = ops.misdirection(hidden_size, config.train.seed or 0, settings.direction).to(parameters[0].device)

    def shared(batch: Batch) -> tuple[Entered, torch.Tensor]:
        entered = trunk.enter(*batch.inputs)
        with torch.no_grad(), evaluating(model):
            return entered, entered.run(entered.hidden, 0, first)

    def term(hidden: torch.Tensor, target: torch.Tensor, batch: Batch, counted: int, coefficient: float = 1.0) -> torch.Tensor:
        mask = _labels(batch)
        loss = ops.rmu_loss(hidden, target, coefficient=coefficient, mask=mask, normalize=settings.normalize)
        return loss * _share(batch, mask, counted, settings.normalize)

    def loss(model: PreTrainedModel, batches: dict[str, Batch], counted: dict[str, int]) -> torch.Tensor:
        terms = []
        if "forget" in batches:
            entered, below = shared(batches["forget"])
            hidden = entered.run(below, first, last)
            terms.append(term(hidden, direction, batches["forget"], counted["forget"], settings.coefficient))
        if "retain" in batches and config.retain_weight:
            entered, below = shared(batches["retain"])
            with torch.no_grad(), evaluating(model):
                target = entered.run(below, first, last, frozen)
            hidden = entered.run(below, first, last)
            terms.append(config.retain_weight * term(hidden, target, batches["retain"], counted["retain"]))
        return sum(terms) if terms else torch.zeros((), device=direction.device, requires_grad=True)

    return Method(loss, parameters)


def trained_parameters(
    layers: torch.nn.ModuleList, settings: Any, method: str = "rmu"
) -> dict[int, dict[str, torch.nn.Parameter]]:
    """Returns the parameters from ``first_layer`` to below ``target_layer`` that match ``trained``: by layer, then by name in it.

    ``settings`` are those of ``method``, RMU or another with these three.

    Raises:
        ValueError: the model has fewer layers than the target layer, or no parameter matches the pattern.
    """
    if settings.target_layer > len(layers):
        raise ValueError(f"{method}.target_layer: got {settings.target_layer}, wanted at most the model's {len(layers)} layers")
    found = {k: _chosen(layers[k], settings.trained) for k in range(settings.first_layer, settings.target_layer)}
    found = {k: named for k, named in found.items() if named}
    if not found:
        raise ValueError(
            f"{method}.trained: got {settings.trained!r}, which no parameter of layers {settings.first_layer} and up matches"
        )
    return found


def _chosen(layer: torch.nn.Module, pattern: str) -> dict[str, torch.nn.Parameter]:
    """Parameters of the layer that match the pattern; in a layer with adapters, the adapters of the weights that match."""
    named = dict(layer.named_parameters())
    if not has_adapters(layer):
        return {name: p for name, p in named.items() if fnmatch(name, pattern)}
    adapted = {id(p) for name, p in adapter_parameters(layer).items() if fnmatch(name.partition(" ")[0], pattern)}
    return {name: p for name, p in named.items() if id(p) in adapted}


def rmu_flops(model: PreTrainedModel, config: Settings, length: int) -> dict[str, float]:
    """FLOPs of a step per position of each source.

    They count the forward pass of the layers up to the target layer; the backward pass through the trained layers, which costs
    as much as their forward pass (attention scores twice as much); the gradients of the trained matrices; and, for the retain
    text, a second forward pass of the trained layers.
    """
    settings = config.rmu
    layers = find_layers(model)
    trained = trained_parameters(layers, settings)
    first, last = min(trained), settings.target_layer
    below, within = (forward_flops(model, length, list(layers[a:b])) for a, b in ((0, first), (first, last)))
    scores = within - 2.0 * sum(m.weight.numel() for m in layers[first:last].modules() if isinstance(m, torch.nn.Linear))
    matrices = 2.0 * sum(p.numel() for named in trained.values() for p in named.values())
    forget = below + 2 * within + scores + matrices
    return {"forget": forget, "retain": forget + within if config.retain_weight else 0.0}


def _labels(batch: Batch) -> torch.Tensor:
    """Mask of the tokens that are labels, as in the other methods."""
    mask = batch.mask.clone()
    mask[:, 0] = False
    return mask


def _share(batch: Batch, mask: torch.Tensor, counted: int, normalize: str) -> torch.Tensor | float:
    """Share of the micro-batch in the elements that the mean of the whole batch is over."""
    whole = batch if batch.whole is None else batch.whole
    if normalize == "all":
        return len(batch.input_ids) / len(whole.input_ids)
    if normalize == "masked":
        return mask.sum() / max(counted, 1)
    return mask.any(-1).sum() / _labels(whole).any(-1).sum().clamp_min(1)
