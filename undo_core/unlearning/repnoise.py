"""RepNoise, a wrapper: on the forget text, push each layer's MLP outputs toward noise and its predictions away from the text.

``method's loss + beta * mean_l MMD(MLP_l(forget), N(0, I)) - alpha * log(1 + mean_l CE(head(norm(h_l)), forget))``; Rosati et
al., "Representation Noising", 2024 (arXiv 2405.14577), as UNDO's baselines add it to MaxEnt and RMU. Details, and differences
from the published method:

- ``h_l`` are the hidden states after some evenly spaced layers, including the last. Published: after every layer and the
  embedding, with the last layer counted twice. Each cross-entropy is computed by the fused op, without logits.
- MMD is the squared, biased estimate over tokens, with the five published Gaussian kernels, whose widths are the mean squared
  distance times 1/4 to 4. It uses at most ``samples`` evenly spaced labels of a micro-batch. Expectations over the noise are in
  closed form, so that nothing is drawn and a resumed run needs no state. Published: as many draws as activations, and each row
  is a whole sequence.
- The cross-entropy on harmless text, a term of the published sum, is the method's retain term; with MaxEnt, ``retain_weight`` 2
  gives that sum.
- Here every label counts. Published: harmful and harmless texts come in pairs, and a token counts where the two differ.
- Neither term is a sum over tokens: each is computed per micro-batch and weighted by the micro-batch's share of the labels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from undo_core import distributed
from undo_core.distributed import head_ops
from undo_core.distributed.parts import added_up, joined, once
from undo_core.models import forward_flops, head_flops, head_of, hidden_states
from undo_core.models.layers import find_layers
from undo_core.training.batches import Batch
from undo_core.unlearning.method import Costs, Method, Settings, register_robust

NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")  # names that transformers gives to the final norm
WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class RepNoiseConfig:
    """Settings of RepNoise alone.

    Attributes:
        alpha: factor on the ascent of the layers' cross-entropies; published: 0.1 to 4 for UNDO, 1 for WMDP.
        beta: factor on the distance from noise; published: 1e-4 to 4 for UNDO, 1 for WMDP.
        layers: number of layers to use, evenly spaced and including the last; None for all.
        samples: largest number of labels of a micro-batch in the distance; time and memory grow with its square.
    """

    alpha: float = 1.0
    beta: float = 1.0
    layers: int | None = 4
    samples: int = 256

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted a finite number >= 0")
        if self.alpha == self.beta == 0:
            raise ValueError("alpha: got 0 with beta 0, wanted one of them > 0; without both terms use robust none")
        for name in ("layers", "samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted an integer >= 1")


def _flops(costs: Costs, model: PreTrainedModel, config: Settings, length: int) -> Costs:
    """Added FLOPs: a forward and a backward pass of the trunk, and of the head at each layer."""
    heads = len(_spaced(len(find_layers(model)), config.repnoise.layers)) if config.repnoise.alpha else 0
    head = head_flops(model)
    return {"forget": 3 * (forward_flops(model, length) - head + heads * head), "retain": 0.0}


@register_robust("repnoise", "RepNoise", settings=RepNoiseConfig, flops=_flops, sums=False)
def repnoise(method: Method, model: PreTrainedModel, config: Settings) -> Method:
    """Adds RepNoise to ``method``.

    Memory: the activations of a second forward pass of the forget micro-batch, and ``[samples, samples]`` distances per layer.

    Raises:
        ValueError: the model's layers have no ``mlp``, or its final norm has an unknown name.
    """
    settings = config.repnoise
    layers, norm = find_layers(model), _final_norm(model)
    chosen = [layers[k] for k in _spaced(len(layers), settings.layers)]
    for layer in chosen:
        if not isinstance(getattr(layer, "mlp", None), nn.Module):
            raise ValueError(f"model: got {type(model).__name__}, whose layers have no mlp; RepNoise needs one")

    def added(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        inputs, labels, mask = batch.shifted()
        head = head_of(model)
        with outputs_of([layer.mlp for layer in chosen]) as inside, outputs_of(chosen) as after:
            last = hidden_states(model, *inputs)
        everywhere, count = joined(mask.flatten()), None  # both terms are of the whole micro-batch, over all ranks
        value = torch.zeros((), device=mask.device)
        if distributed.count() > 1:
            count = everywhere.sum().float().clamp_min(1)
            value = last[
                ..., :0
            ].sum()  # 0; a sharded layer is gathered at the gradient of its output, which must be in the graph
        if settings.beta:
            distances = [noise_distance(joined(h.flatten(0, 1)), everywhere, settings.samples) for h in inside]
            value = value + settings.beta * sum(distances) / len(chosen)
        if settings.alpha:
            labels = labels.masked_fill(~mask, -100)
            nats = [head_ops.linear_cross_entropy(norm(h), head, labels, normalizer=count) for h in after]
            value = value - settings.alpha * torch.log1p(added_up(sum(nats)) / len(chosen))
        return once(value)

    def loss(model: PreTrainedModel, batches: dict[str, Batch], counted: dict[str, int]) -> torch.Tensor:
        value = method.loss(model, batches, counted)
        if "forget" in batches:
            share = joined(batches["forget"].mask[:, 1:]).sum() / max(counted["forget"], 1)
            value = value + share * added(model, batches["forget"])
        return value

    return dataclasses.replace(method, loss=loss)


def noise_distance(hidden: torch.Tensor, mask: torch.Tensor, samples: int) -> torch.Tensor:
    """``MMD**2`` between the tokens of ``hidden`` in ``mask`` and the standard normal distribution; 0 if the mask is empty.

    Args:
        hidden: ``[tokens, d]``; differentiable.
        mask: ``[tokens]`` bool, True for tokens that count.
        samples: largest number of counted tokens to use; they are evenly spaced.

    With ``k(x, y) = exp(-|x - y|**2 / h)``, ``E k(x, N) = (1 + 2/h)**(-d/2) exp(-|x|**2 / (h + 2))`` and
    ``E k(N, N') = (1 + 4/h)**(-d/2)``. ``h`` is a width times the expected mean squared distance within the set of the tokens
    and as many draws of noise; it has no gradient.
    """
    if len(hidden) > samples:
        counted_first = torch.argsort(~mask, stable=True)
        spacing = ((mask.sum().double() - 1) / max(samples - 1, 1)).clamp_min(1)
        at = counted_first[(torch.arange(samples, device=mask.device) * spacing).round().long()]
        hidden, mask = hidden[at], mask[at]
    x = torch.where(mask[:, None], hidden, 0.0).to(torch.promote_types(hidden.dtype, torch.float32))
    d, weight = x.shape[1], mask.to(x.dtype)
    count = weight.sum().clamp_min(1)
    squares = x.square().sum(-1)
    between = (squares[:, None] + squares - 2 * x @ x.T).clamp_min(0)
    pairs = weight[:, None] * weight
    with torch.no_grad():
        to_noise = (weight * (squares + d)).sum()
        total = (pairs * between).sum() + 2 * count * to_noise + (count**2 - count) * 2 * d
        mean = total / (4 * count**2 - 2 * count)
    value = torch.zeros((), dtype=x.dtype, device=x.device)
    for width in WIDTHS:
        h = width * mean
        within = (pairs * torch.exp(-between / h)).sum() / count**2
        across = (weight * torch.exp(-squares / (h + 2) - d / 2 * torch.log1p(2 / h))).sum() / count
        value = value + within - 2 * across + torch.exp(-d / 2 * torch.log1p(4 / h))
    return torch.where(mask.any(), value, 0.0)


@contextlib.contextmanager
def outputs_of(modules: list[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Context that yields a list of what the modules return, in the order of their calls; removes its hooks on exit."""
    found: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _spaced(count: int, wanted: int | None) -> list[int]:
    """Indices of at most ``wanted`` of ``count`` layers, evenly spaced and including the last."""
    wanted = count if wanted is None else min(wanted, count)
    return [(k + 1) * count // wanted - 1 for k in range(wanted)]


def _final_norm(model: PreTrainedModel) -> nn.Module:
    for name in NORMS:
        if isinstance(getattr(model.base_model, name, None), nn.Module):
            return getattr(model.base_model, name)
    raise ValueError(
        f"model: got {type(model).__name__}, whose final norm has none of the names {', '.join(NORMS)}; RepNoise needs it"
    )
