"""Noise on a whole model: the op, with the shrink targets that the model's own initialisation gives, and a report."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from undo_core.ops import noise as op
from undo_core.ops.noise_rules import Setting, canonical_name


@dataclass(frozen=True)
class TensorNoise:
    """What the noise did to a tensor.

    Attributes:
        before: Frobenius norm.
        after: Frobenius norm.
        change: norm of the change: root of ``(alpha * before)**2 + (alpha * beta * |N|)**2``, shrinkage and noise, which are as good
            as orthogonal.
        shrink: share of ``change**2`` that is shrinkage, in [0, 1].
        noise: share that is noise; 0 for a vector, which moves toward a number.
    """

    before: float
    after: float
    change: float
    shrink: float
    noise: float


def noise_(model: nn.Module, *, alpha: float, beta: float = 0.1, seed: int, **options: Any) -> dict[str, TensorNoise]:
    """Damage ``model`` in place: :func:`undo_core.ops.noise_` with one-dimensional parameters shrinking toward their initial values.

    The published code shrinks norms toward 0, which is the initial value of Gemma's (they multiply by ``1 + w``). Llama-type norms
    start at 1, and shrinking them to 0 would silence the layer; so the target is read off the model's own initialisation.

    Args:
        model: a Hugging Face model, or any module together with ``toward``.
        alpha: strength, in [0, 1].
        beta: scale of the noise, >= 0.
        seed: in [0, 2**64).
        options: ``law``, ``std``, ``toward``, ``rules``, ``stochastic_rounding`` of :func:`undo_core.ops.noise_`.

    Returns:
        For every tensor, by canonical name, its norms and the shares of shrinkage and noise.

    Raises:
        ValueError: a bad argument, or a vector that does not start from one number and has no rule with ``toward``; nothing is changed.
    """
    if "toward" not in options and isinstance(model, PreTrainedModel):
        options["toward"] = initial_values(model)
    return report(op.apply(model, alpha=alpha, beta=beta, seed=seed, **options))


def report(applied: Mapping[str, tuple[Setting, torch.Tensor]]) -> dict[str, TensorNoise]:
    """Norms and shares of what :func:`undo_core.ops.noise.apply` did."""
    result = {}
    for name, (setting, sums) in applied.items():
        before, noise, after = sums.tolist()
        alpha = 1.0 - setting.keep
        if setting.law == "constant":  # toward a number: the cross term of the change follows from the norm after
            cross = (after - setting.keep**2 * before - noise) / setting.keep if setting.keep else 0.0
            change, shares = max(0.0, alpha**2 * before + noise - alpha * cross), (1.0, 0.0)
        else:
            change = alpha**2 * before + noise
            shares = (alpha**2 * before / change, noise / change) if change > 0 else (0.0, 0.0)
        shares = shares if change > 1e-12 * before else (0.0, 0.0)
        result[name] = TensorNoise(math.sqrt(before), math.sqrt(after), math.sqrt(change), *shares)
    return result


def by_kind(tensors: Mapping[str, TensorNoise]) -> dict[str, tuple[int, TensorNoise]]:
    """The report summed over tensors whose names differ in numbers alone (``model.layers.*.mlp.up_proj.weight``), with their number."""
    kinds: dict[str, list[TensorNoise]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(tensor)
    return {kind: (len(parts), _sum(parts)) for kind, parts in kinds.items()}


def _sum(parts: list[TensorNoise]) -> TensorNoise:
    change = sum(part.change**2 for part in parts)
    shares = [
        sum(getattr(part, name) * part.change**2 for part in parts) / change if change else 0.0 for name in ("shrink", "noise")
    ]
    return TensorNoise(
        *(math.hypot(*(getattr(part, name) for part in parts)) for name in ("before", "after", "change")), *shares
    )


@torch.no_grad()
def initial_values(model: PreTrainedModel) -> dict[str, float]:
    """The value that each one-dimensional parameter starts from, by canonical name; ``model`` may be on the meta device.

    Each module that owns such parameters is copied alone and initialised by the model's own ``_init_weights``. One that starts from
    several values, or is not initialised, is left out.
    """
    values: dict[str, float] = {}
    for prefix, module in model.named_modules():
        own = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 1 and p.numel()}
        if not own:
            continue
        fresh = copy.deepcopy(module)
        if any(p.is_meta for p in own.values()):
            fresh = fresh.to_empty(device="cpu")
        for parameter in fresh.parameters():
            parameter.fill_(torch.nan)  # what the initialisation does not set stands out
            if hasattr(parameter, "_is_hf_initialized"):
                del parameter._is_hf_initialized
        if hasattr(fresh, "_is_hf_initialized"):
            del fresh._is_hf_initialized
        with torch.random.fork_rng(devices=[]):
            if hasattr(fresh, "reset_parameters"):
                fresh.reset_parameters()
            model._init_weights(fresh)
        for name in own:
            started = getattr(fresh, name)
            full = canonical_name(f"{prefix}.{name}" if prefix else name)
            if bool((started == started[0]).all()):
                values[full] = float(started[0])
    return values
