"""How far damage moves a model, and the alpha with which other noise moves it as far.

The distance is ``|theta' - theta| / |theta|``, Frobenius norms over all damaged matrices and embeddings together. Vectors (norms,
biases) do not count: their shrinkage is not comparable with noise.

Noise moves a matrix by ``theta' - theta = alpha * (beta * N - theta)``, so that its distance is exactly proportional to alpha. If
rules give some parameters an alpha of their own, the one of all others that makes the total distance that of other noise is

``alpha**2 = (wanted - own) / rest``,

with ``wanted`` the other noise's sum of squares, ``own`` that of the parameters with an alpha of their own, and ``rest`` that of
the others at alpha 1, ``sum |beta * N - theta|**2``. All three are measured on the weights that are damaged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from undo_kernels.library.backends import implementation
from undo_kernels.ops import checks
from undo_kernels.ops.noise import segment
from undo_kernels.ops.noise_rules import Policy, Setting, matches

from undo_core.checkpoints.parameters import CheckpointParameters
from undo_core.noise.parameters import Selection

BLOCK = 1 << 20  # elements processed at a time


def alpha_of_equal_distance(
    checkpoint: CheckpointParameters,
    selected: Selection,
    policy: Policy,
    seed: int,
    like: Mapping[str, Any],
    title: str,
    progress: bool,
) -> tuple[float, float]:
    """Returns the alpha of all parameters without an alpha of their own, and the distance of the noise ``like``.

    Args:
        checkpoint: the weights to damage.
        selected: what :func:`undo_core.noise.parameters.select` chose among them.
        policy: the noise, whose ``alpha`` is not read.
        seed: seed of the noise.
        like: ``alpha``, ``seed`` and other settings of the noise whose distance is wanted; ``rules`` are :class:`NoiseRule`.
        title: name on the progress bar.
        progress: whether to show it.

    Raises:
        ValueError: no alpha in [0, 1] gives the distance.
    """
    parameters, toward = selected.parameters, selected.toward
    wanted_settings, other_seed = settings_like(selected, like)
    settings = dataclasses.replace(policy, alpha=1.0).settings(parameters, toward)
    wanted = own = rest = total = 0.0
    for tensors in checkpoint.read(f"{title}, measuring", progress):
        for name, tensor in tensors.items():
            parameter = parameters[name]
            if parameter.role == "vectors":
                continue
            total += squares(tensor)
            wanted += noise_change(tensor, name, wanted_settings[name], other_seed)
            change = noise_change(tensor, name, settings[name], seed)
            if any(rule.alpha is not None and matches(rule.match, name, parameter) for rule in policy.rules):
                own += change
            else:
                rest += change
    reachable = math.sqrt(own / total) if total else 0.0, math.sqrt((own + rest) / total) if total else 0.0
    distance = math.sqrt(wanted / total) if total else 0.0
    if not (rest > 0 and own <= wanted <= own + rest):
        checks.fail(
            "like",
            f"noise of distance {distance:.4f}",
            f"one from {reachable[0]:.4f}, that of the parameters with an alpha of their own, to {reachable[1]:.4f}, with "
            "alpha 1 for the others",
        )
    return math.sqrt((wanted - own) / rest), distance


def settings_like(selected: Selection, like: Mapping[str, Any]) -> tuple[dict[str, Setting], int]:
    """Returns the settings of other noise for the selected parameters, by name, and its seed; ``like`` as above.

    Raises:
        ValueError: it does not suit the parameters.
    """
    other: dict[str, Any] = {"beta": 0.1, **like}
    seed, rules = other.pop("seed"), other.pop("rules", ())
    checks.seed(seed)
    # select() has removed rules for parameters that stay unchanged from the policy's; here it is done for the other noise's.
    parameters = selected.parameters
    rules = tuple(rule for rule in rules if any(matches(rule.match, name, p) for name, p in parameters.items()))
    return Policy(**other, rules=rules).settings(parameters, selected.toward), seed


def noise_change(tensor: torch.Tensor, name: str, setting: Setting, seed: int) -> float:
    """Returns the squared norm of the change that the noise would make to ``tensor``, which stays unchanged."""
    noised = tensor.clone()
    implementation("noise_", noised.device)([segment(name, noised, setting)], seed, True)
    return squares(noised, tensor)


def squares(tensor: torch.Tensor, other: torch.Tensor | None = None) -> float:
    """Returns the sum of squares of ``tensor``, or of its difference to ``other``, computed in float64 block by block."""
    parts: Iterable[torch.Tensor] = tensor.flatten().split(BLOCK)
    if other is None:
        return math.fsum(float(part.double().square().sum()) for part in parts)
    pairs = zip(parts, other.flatten().split(BLOCK), strict=True)
    return math.fsum(float((a.double() - b.double()).square_().sum()) for a, b in pairs)
