"""UNDO's noise on a whole model, with shrink targets from the model's own initialisation, and a report of what it did."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from undo_kernels.ops import noise as op
from undo_kernels.ops.noise_rules import Setting

from undo_core.noise.parameters import Left, Parts, select


@dataclass(frozen=True)
class TensorNoise:
    """What the noise did to a tensor.

    Attributes:
        before: Frobenius norm before.
        after: Frobenius norm after.
        change: norm of the change. With noise it is the root of ``(alpha * before)**2 + (alpha * beta * |N|)**2``, taking
            shrinkage and noise as orthogonal, which they nearly are.
        shrink: share of ``change**2`` that comes from shrinkage, in [0, 1].
        noise: share of ``change**2`` that comes from noise; 0 for a vector, which only shrinks toward its target.
    """

    before: float
    after: float
    change: float
    shrink: float
    noise: float


class NoiseReport(dict[str, TensorNoise]):
    """What the noise did to each parameter, by canonical name.

    Attributes:
        left: the parameters that were left unchanged, by canonical name, and why.
        alpha: the strength that was computed to match a distance; None if it was given.
        distance: that distance.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorNoise],
        left: Mapping[str, Left],
        alpha: float | None = None,
        distance: float | None = None,
    ) -> None:
        super().__init__(tensors)
        self.left, self.alpha, self.distance = dict(left), alpha, distance


def noise_(
    model: nn.Module, *, alpha: float, beta: float = 0.1, seed: int, parts: Parts = "text", **options: Any
) -> NoiseReport:
    """Applies UNDO's noise to ``model`` in place: :func:`undo_kernels.ops.noise_` with a policy for each kind of parameter.

    - **Matrices of products** get noise, ``theta <- (1 - alpha) * theta + alpha * beta * N``. These are the weights of linear
      layers and convolutions, and other parameters of two or more dimensions that the model draws at random around 0 (routers,
      stacked experts; each expert has its own fans).
    - **Embeddings** (``nn.Embedding``, including tables of learned positions) get noise too.
    - **Everything else** gets no noise and shrinks, element by element, toward its own initial value:
      ``theta <- (1 - alpha) * theta + alpha * theta_init``. These are norms, biases, scalars, ``A_log``, ``D``, ``dt_bias``,
      ``sinks`` and gates. The initial value is the one that the model's own code sets. Where that code draws it at random, the
      median of its law is taken (0 for attention sinks; log(8.5) for ``A_log = log(U(1, 16))``).
    - **Unchanged** are parameters that require no gradient, now or in a new model of the class; parameters of modalities other
      than text (unless ``parts="all"``); parameters without noise for which the model's code sets no initial value; and
      buffers.

    The published code shrinks norms toward 0, which is the initial value of Gemma's norms (they multiply by ``1 + w``).
    Llama-type norms start at 1, and shrinking them to 0 would silence the layer. ``docs/noise.md`` has the details.

    Args:
        model: a Hugging Face model, or any module together with ``toward``.
        alpha: strength, in [0, 1].
        beta: scale of the noise, >= 0.
        seed: in [0, 2**64).
        parts: for models of several modalities: "text" changes the text decoder, embeddings and head; "all" changes everything.
        options: ``law``, ``std``, ``toward``, ``rules``, ``stochastic_rounding`` of :func:`undo_kernels.ops.noise_`.

    Returns:
        For every changed tensor, by canonical name, its norms and the shares of shrinkage and noise; ``left`` lists the
        unchanged ones.

    Raises:
        ValueError: an argument is invalid; nothing is changed.
    """
    chosen = select(model, parts, options.pop("rules", ()), own_values="toward" not in options)
    if chosen.toward is not None:
        options.setdefault("toward", chosen.toward)
    applied = op.apply(model, found=chosen.found, alpha=alpha, beta=beta, seed=seed, rules=chosen.rules, **options)
    return NoiseReport(report(applied), chosen.left)


def report(applied: Mapping[str, tuple[Setting, torch.Tensor]]) -> dict[str, TensorNoise]:
    """Turns the sums that :func:`undo_kernels.ops.noise.apply` returns into norms and shares, by canonical name."""
    result = {}
    for name, (setting, sums) in applied.items():
        before, noise, after = sums.tolist()
        alpha = 1.0 - setting.keep
        if setting.law in (
            "constant",
            "elements",
        ):  # target and theta are not orthogonal; the norm after gives their cross term
            cross = (after - setting.keep**2 * before - noise) / setting.keep if setting.keep else 0.0
            change, shares = max(0.0, alpha**2 * before + noise - alpha * cross), (1.0, 0.0)
        else:
            change = alpha**2 * before + noise
            shares = (alpha**2 * before / change, noise / change) if change > 0 else (0.0, 0.0)
        shares = shares if change > 1e-12 * before else (0.0, 0.0)
        result[name] = TensorNoise(math.sqrt(before), math.sqrt(after), math.sqrt(change), *shares)
    return result


def by_kind(tensors: Mapping[str, TensorNoise]) -> dict[str, tuple[int, TensorNoise]]:
    """Sums the report over tensors whose names differ only in numbers (``model.layers.*.mlp.up_proj.weight``).

    Returns:
        By name pattern, how many tensors match it, and their sum.
    """
    kinds: dict[str, list[TensorNoise]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(tensor)
    return {kind: (len(parts), _sum(parts)) for kind, parts in kinds.items()}


def _sum(parts: list[TensorNoise]) -> TensorNoise:
    squares = [part.change * part.change for part in parts]
    change = sum(squares)
    shares = [
        sum(getattr(part, name) * square for part, square in zip(parts, squares, strict=True)) / change if change else 0.0
        for name in ("shrink", "noise")
    ]
    return TensorNoise(
        *(math.hypot(*(getattr(part, name) for part in parts)) for name in ("before", "after", "change")), *shares
    )
