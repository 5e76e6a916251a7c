"""Noise on a whole model: the op, with the shrink targets that the model's own initialisation gives."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from undo_core import ops
from undo_core.ops.noise import canonical_name, named


def noise_(model: nn.Module, *, alpha: float, beta: float = 0.1, seed: int, **options: Any) -> dict[str, dict[str, float]]:
    """Damage ``model`` in place: :func:`undo_core.ops.noise_` with one-dimensional parameters shrinking toward their initial values.

    The published code shrinks norms toward 0, which is the initial value of Gemma's (they multiply by ``1 + w``). Llama-type norms
    start at 1, and shrinking them to 0 would silence the layer; so the target is read off the model's own initialisation.

    Args:
        model: a Hugging Face model, or any module together with ``toward``.
        alpha: strength, in [0, 1].
        beta: scale of the noise, >= 0.
        seed: in [0, 2**64).
        options: ``law``, ``std``, ``toward``, ``stochastic_rounding`` of :func:`undo_core.ops.noise_`.

    Returns:
        For every tensor its Frobenius norm before and after.

    Raises:
        ValueError: a bad argument, or a parameter whose initial value is not one number; nothing is changed.
    """
    if "toward" not in options and isinstance(model, PreTrainedModel):
        options["toward"] = initial_values(model)
    tensors = named(model)
    before = {name: float(tensor.detach().double().norm()) for name, tensor in tensors.items()}
    ops.noise_(model, alpha=alpha, beta=beta, seed=seed, **options)
    return {name: {"before": before[name], "after": float(tensor.detach().double().norm())} for name, tensor in tensors.items()}


@torch.no_grad()
def initial_values(model: PreTrainedModel) -> dict[str, float]:
    """The value that each one-dimensional parameter starts from, by canonical name.

    Each module that owns such parameters is copied alone and initialised by the model's own ``_init_weights``.

    Raises:
        ValueError: a parameter that starts from more than one value.
    """
    values: dict[str, float] = {}
    for prefix, module in model.named_modules():
        own = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 1 and p.numel()}
        if not own:
            continue
        fresh = copy.deepcopy(module)
        for parameter in fresh.parameters():
            parameter.fill_(torch.nan)  # what the initialisation does not set stands out
            for flag in ("_is_hf_initialized",):
                if hasattr(parameter, flag):
                    delattr(parameter, flag)
        if hasattr(fresh, "_is_hf_initialized"):
            del fresh._is_hf_initialized
        with torch.random.fork_rng(devices=[]):
            if hasattr(fresh, "reset_parameters"):
                fresh.reset_parameters()
            model._init_weights(fresh)
        for name in own:
            started = getattr(fresh, name)
            full = canonical_name(f"{prefix}.{name}" if prefix else name)
            if not bool((started == started[0]).all()):
                got = "several values" if not started.isnan().any() else "no value"
                raise ValueError(f"toward: got {got} at initialisation for {full}, wanted one; pass toward={{name: value}}")
            values[full] = float(started[0])
    return values
