"""CIR: break what the MLPs compute on the forget text, by updates without the directions that this text shares with other text.

``mean_l mean(max(0, m_l . m_l^original) / |m_l^original|**2)(forget) + w CE(retain)`` with ``m_l`` the output of the MLP of layer ``l``.
For the forget term, the gradient of a trained matrix that maps ``a_t`` to an output with gradient ``g_t`` at token ``t`` is not
``sum_t g_t a_t^T`` but

    sum_t (g_t - Q_g Q_g^T g_t) (a_t - Q_a Q_a^T a_t)^T

The columns of ``Q_a`` span the mean and the leading principal components of the ``a_t`` over the forget text, those of ``Q_g`` the same
of the ``g_t``: representations that are common in it, and mostly not specific to it, are collapsed before the update. All other
gradients stay whole. Sondej and Yang, "Collapse of Irrelevant Representations (CIR) Ensures Robust and Non-Disruptive LLM Unlearning",
2025 (arXiv 2509.11816), after their code (github.com/filyp/unlearning; CIR_trainer.py). Differences:

- The directions are computed once, from the original model on the first ``samples`` tokens. Published: again after every epoch. A
  resumed run then needs no state of them.
- The whole span is projected out at once. Published: one direction after the other; the mean is not orthogonal to the components.
- Each token's product is divided by its own ``|m^original|**2``. Published: by the squared mean norm of the batch. Here the loss is a
  sum over tokens, the same for any micro-batches.
- The retain term is that of the other methods, in the same step. Published: the relative distance of hidden states, in a step of its
  own, and an unlearning update scaled to a fixed norm, which AdamW's step replaces here.
- The published numbers of directions and layers could not be verified; the authors' plots compare 0 to 48 directions.

Only the layers up to the last broken one run for the forget text.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from undo_core import distributed
from undo_core.models import evaluating, forward_flops
from undo_core.models.adapters import has_adapters
from undo_core.models.layers import find_layers
from undo_core.training.batches import Batch, Source
from undo_core.training.loop import Loss, accumulate
from undo_core.training.precision import weight_dtype
from undo_core.unlearning.activations import Trunk
from undo_core.unlearning.method import Method, Settings, forget_and_retain, register
from undo_core.unlearning.repnoise import outputs_of
from undo_core.unlearning.rmu import trained_parameters

Bases = dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]
"""Orthonormal directions ``[d, k]`` to collapse: of a module's inputs, and of the gradients of its outputs."""


@dataclass(frozen=True)
class CIRConfig:
    """Settings of CIR alone.

    Attributes:
        first_layer: first layer whose MLP is broken and whose matrices are trained (from 0).
        target_layer: layers from ``first_layer`` to below it are broken and trained.
        trained: pattern of the names of trained matrices within a layer.
        inputs: number of principal components that are collapsed in the matrices' inputs, beside the mean; 0 for the mean alone.
        gradients: the same for the gradients of their outputs.
        samples: number of tokens of the forget text that the directions are computed from.
    """

    first_layer: int = 0
    target_layer: int = 2
    trained: str = "*mlp.*weight"
    inputs: int = 12
    gradients: int = 12
    samples: int = 2048

    def __post_init__(self) -> None:
        if not 0 <= self.first_layer < self.target_layer:
            raise ValueError(
                f"target_layer: got {self.target_layer}, wanted more than first_layer, {self.first_layer}, which is >= 0"
            )
        for name, least in (("inputs", 0), ("gradients", 0), ("samples", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted an integer >= {least}")


def _check(config: Settings) -> None:
    if config.train.step_in_backward:
        raise ValueError(
            "train.step_in_backward: got true with method cir, wanted false: forget and retain text have a backward pass each"
        )
    if config.robust == "repnoise":
        raise ValueError(
            "robust: got repnoise with method cir, wanted none, sam or ilu with it: its terms of the forget text would be collapsed too"
        )


def _costs(model: PreTrainedModel, config: Settings, length: int) -> tuple[float, float, float]:
    """FLOPs per position: of the layers below the trained ones, of these, and of the gradients of the trained matrices."""
    layers, settings = find_layers(model), config.cir
    first, last = settings.first_layer, settings.target_layer
    below, within = (forward_flops(model, length, list(layers[a:b])) for a, b in ((0, first), (first, last)))
    trained = trained_parameters(layers, settings, "cir")
    return below, within, 2.0 * sum(p.numel() for named in trained.values() for p in named.values())


def _flops(model: PreTrainedModel, config: Settings, length: int) -> dict[str, float]:
    """FLOPs of a step.

    For the forget text, the layers below run forward, and the trained ones forward, forward with the original matrices, and backward,
    with the projections; the retain text runs forward through the model and backward to the first trained layer.
    """
    below, within, matrices = _costs(model, config, length)
    layers, settings = find_layers(model), config.cir
    widths = [p.shape for named in trained_parameters(layers, settings, "cir").values() for p in named.values()]
    projections = sum(4.0 * (a + b) * (max(settings.inputs, settings.gradients) + 1) for a, b in widths)
    whole, first, last = forward_flops(model, length), settings.first_layer, settings.target_layer
    return {
        "forget": below + 3 * within + _scores(model, length, list(layers[first:last])) + matrices + projections,
        "retain": 2 * whole - below + _scores(model, length, list(layers[first:])) + matrices if config.retain_weight else 0.0,
    }


def _scores(model: PreTrainedModel, length: int, layers: list[nn.Module]) -> float:
    """FLOPs of the attention scores of layers, which cost twice as much backward as forward."""
    linear = sum(m.weight.numel() for layer in layers for m in layer.modules() if isinstance(m, (nn.Linear, Conv1D)))
    return forward_flops(model, length, layers) - 2.0 * linear


def _reference_flops(model: PreTrainedModel, config: Settings, length: int) -> dict[str, float]:
    """FLOPs of computing the directions, which reads a part of the forget text."""
    below, within, _ = _costs(model, config, length)
    positions = config.train.steps * config.train.batch_size * length
    return {"forget": (below + 3 * within) * min(1.0, config.cir.samples / max(positions, 1)), "retain": 0.0}


@register("cir", "CIR", settings=CIRConfig, flops=_flops, reference_flops=_reference_flops, check=_check)
def cir(model: PreTrainedModel, config: Settings) -> Method:
    """CIR.

    Memory: the activations of the trained layers, a copy of each trained matrix as it is now, and its directions; on the host, 13 bytes
    for each position of the forget text of all steps.

    Raises:
        ValueError: the model has adapters, fewer layers than the target layer, layers that cannot be run in parts or have no mlp, no
            matrix that matches the pattern, or a parameter that matches and is no matrix of a linear layer or too narrow.
    """
    settings = config.cir
    if has_adapters(model):
        raise ValueError("method: got cir for a model with adapters, wanted one whose own matrices are trained")
    trunk = Trunk(model)
    trained = trained_parameters(trunk.layers, settings, "cir")
    first, last = settings.first_layer, settings.target_layer
    broken = trunk.layers[first:last]
    for layer in broken:
        if not isinstance(getattr(layer, "mlp", None), nn.Module):
            raise ValueError(f"model: got {type(model).__name__}, whose layers have no mlp; CIR needs one")
    bases: Bases = {
        module: _empty(module, settings) for k, named in trained.items() for module in _modules(trunk.layers[k], list(named))
    }
    # Copied before the training loop loads a checkpoint, so that a resumed run has the original model's outputs.
    dtype = weight_dtype(config.train.precision)
    frozen = {k: {name: p.detach().to(dtype, copy=True) for name, p in named.items()} for k, named in trained.items()}

    def forget(model: PreTrainedModel, batch: Batch, counted: int) -> torch.Tensor:
        inputs, _, mask = batch.shifted()
        entered = trunk.enter(*inputs)
        with torch.no_grad(), evaluating(trunk.model):
            below = entered.run(entered.hidden, 0, first)
            with outputs_of([layer.mlp for layer in broken]) as originals:
                entered.run(below, first, last, frozen)
        with outputs_of([layer.mlp for layer in broken]) as outputs:
            hidden = entered.run(below, first, last)
        alike = sum(_alike(*pair) for pair in zip(outputs, originals, strict=True))
        value = alike.masked_fill(~mask, 0.0).sum() / (len(broken) * max(counted, 1))
        # Adds 0: a sharded layer is gathered at the gradient of its output, which must be in the graph.
        return value + hidden[..., :0].sum() if distributed.count() > 1 else value

    def gradient(
        model: nn.Module, loss: Loss, batches: dict[str, Batch], counted: dict[str, int], micro_batch_size: int | None
    ) -> torch.Tensor:
        with collapsing(bases):  # also during the backward pass, which may run the layers again
            value = accumulate(model, loss, {"forget": batches["forget"]}, counted, micro_batch_size)
        rest = {name: batch for name, batch in batches.items() if name != "forget"}
        return value + accumulate(model, loss, rest, counted, micro_batch_size) if rest else value

    def prepare(model: PreTrainedModel, source: Source) -> None:
        with evaluating(model):
            bases.update(_directions(forget, model, source, list(bases), config))

    parameters = [p for named in trained.values() for p in named.values()]
    return Method(forget_and_retain(forget, model, config), parameters, gradient=gradient, prepare=prepare)


def _alike(output: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """``max(0, output . original) / |original|**2`` of each token."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    output, original = output.to(dtype), original.to(dtype)
    return (output * original).sum(-1).clamp_min(0) / original.square().sum(-1).clamp_min(torch.finfo(dtype).tiny)


def _modules(layer: nn.Module, names: list[str]) -> list[nn.Module]:
    """Modules of a layer whose weights have these names."""
    modules = []
    for name in names:
        path, _, own = name.rpartition(".")
        module = layer.get_submodule(path)
        if own != "weight" or not isinstance(module, (nn.Linear, Conv1D)):
            raise ValueError(f"cir.trained: got a pattern that {name} matches, wanted one of matrices of linear layers alone")
        modules.append(module)
    return modules


def _matrix(module: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as ``[outputs, inputs]``."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def _empty(module: nn.Module, settings: CIRConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions of a module before they are known: zeros, which collapse nothing."""
    outputs, inputs = _matrix(module).shape
    for name, width in (("inputs", inputs), ("gradients", outputs)):
        if getattr(settings, name) + 2 > width:
            raise ValueError(
                f"cir.{name}: got {getattr(settings, name)} for a matrix with {width} {name}, wanted at most {width - 2}: with the "
                "mean, nothing would be left"
            )
    zeros = functools.partial(_matrix(module).new_zeros, dtype=torch.float32)
    return zeros(inputs, settings.inputs + 1), zeros(outputs, settings.gradients + 1)


def _directions(forget: Any, model: PreTrainedModel, source: Source, modules: list[nn.Module], config: Settings) -> Bases:
    """Computes the directions of each module from the first tokens of the forget text; every rank computes the same."""
    settings, device = config.cir, next(model.parameters()).device
    found: dict[nn.Module, tuple[list[torch.Tensor], list[torch.Tensor]]] = {module: ([], []) for module in modules}
    step = count = 0
    while count < settings.samples and step < config.train.steps:
        batch = source(step).to(device)
        for part in batch.split(config.train.micro_batch_size or len(batch.input_ids)):
            kept = part.mask[:, 1:].flatten().nonzero()[:, 0][: settings.samples - count]
            count += len(kept)
            with _recorded(modules) as calls:
                value = forget(model, part, batch.counted)
            gradients = torch.autograd.grad(value, [output for _, output in calls.values()])
            for (module, (given, _)), gradient in zip(calls.items(), gradients, strict=True):
                for into, vectors in zip(found[module], (given, gradient), strict=True):
                    into.append(vectors.detach().flatten(0, -2)[kept])
        step += 1
    sizes = settings.inputs, settings.gradients
    return {
        module: (principal(torch.cat(inputs), sizes[0]), principal(torch.cat(gradients), sizes[1]))
        for module, (inputs, gradients) in found.items()
        if count
    }


@contextlib.contextmanager
def _recorded(modules: list[nn.Module]) -> Iterator[dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]]:
    """Context that yields input and output of each module's call with gradients; the original matrices are called without."""
    calls: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def record(module: nn.Module, given: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            calls[module] = given[0], output

    hooks = [module.register_forward_hook(record) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def principal(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """Orthonormal basis of the mean and the leading principal components of ``vectors`` ``[n, d]``: at most ``count + 1`` columns.

    The columns of directions that the vectors do not have, because they are few or span less, are 0: LAPACK's choice there means nothing.
    """
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    mean = vectors.mean(0, keepdim=True)
    _, sizes, components = torch.linalg.svd(vectors - mean, full_matrices=False)
    rounding = max(vectors.shape) * torch.finfo(vectors.dtype).eps
    there = sizes > rounding * torch.linalg.matrix_norm(vectors)
    directions = torch.cat([mean, (components * there[:, None])[:count]])
    basis, left = torch.linalg.qr(directions.T)
    return torch.where(left.diagonal().abs() > rounding * directions.norm(dim=1), basis, 0.0).contiguous()


@contextlib.contextmanager
def collapsing(bases: Bases) -> Iterator[None]:
    """Context in which the gradients of the modules' matrices are without the directions of ``bases``."""
    before = {module: vars(module).get("forward") for module in bases}
    for module, both in bases.items():
        module.forward = functools.partial(_forward, module, *both)
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _forward(module: nn.Module, inputs: torch.Tensor, gradients: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return _Collapsed.apply(x, _matrix(module), module.bias, inputs, gradients)


class _Collapsed(torch.autograd.Function):
    """A linear layer; only the gradient of its weight is without the given directions."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, inputs: Any, gradients: Any) -> torch.Tensor:
        ctx.save_for_backward(x, weight, inputs, gradients)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        x, weight, inputs, gradients = ctx.saved_tensors
        flat, matrix, bias = gradient.flatten(0, -2), None, None
        onward = gradient @ weight if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            matrix = _without(flat, gradients).T @ _without(x.flatten(0, -2), inputs)
        if ctx.needs_input_grad[2]:
            bias = flat.sum(0)
        return onward, matrix, bias, None, None


def _without(vectors: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    basis = basis.to(vectors.dtype)
    return vectors - (vectors @ basis) @ basis.T
