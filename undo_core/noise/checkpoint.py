"""Noise from disk to disk: a checkpoint of any size, tensor by tensor, bit-equal to noise on the loaded model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from undo_kernels.library.backends import implementation
from undo_kernels.noise_segments import Segment
from undo_kernels.ops import checks
from undo_kernels.ops.noise import segment
from undo_kernels.ops.noise_rules import NoiseRule, Policy, Setting

from undo_core.checkpoints.files import TensorWriter, checkpoint_skeleton
from undo_core.checkpoints.parameters import CheckpointParameters
from undo_core.noise.distance import alpha_of_equal_distance, settings_like
from undo_core.noise.model import NoiseReport, report
from undo_core.noise.parameters import Parts, Selection, select


def noise_checkpoint(
    source: Path,
    output: Path,
    *,
    alpha: float,
    beta: float = 0.1,
    seed: int,
    law: str = "xavier_uniform",
    std: float | None = None,
    rules: Sequence[NoiseRule] = (),
    parts: Parts = "text",
    stochastic_rounding: bool = True,
    like: Mapping[str, Any] | None = None,
    title: str = "noise",
    progress: bool = True,
) -> NoiseReport:
    """Applies :func:`undo_core.noise_` to the checkpoint folder ``source`` and writes to the existing, empty folder ``output``.

    The result is bit-equal to noise on the model loaded in the checkpoint's own dtype. For memory and which files are copied,
    see :class:`undo_core.checkpoints.parameters.CheckpointParameters`.

    Args:
        like: ``alpha``, ``seed`` and other settings of noise whose distance is matched (:mod:`undo_core.noise.distance`). The
            alpha of all parameters to which no rule gives one is then computed, and ``alpha`` is not read.

    Returns:
        For every changed parameter its norms and the shares of shrinkage and noise; ``left`` lists the unchanged ones; with
        ``like`` also the ``alpha`` and the ``distance``.

    Raises:
        ValueError: an argument is invalid, the distance cannot be reached, a tensor to damage is not floating-point, or the model has no place for a tensor;
            nothing is written.
        FileNotFoundError: the folder has no safetensors file.
    """
    model = checkpoint_skeleton(source)
    given = {"alpha": alpha, "beta": beta, "seed": seed, "law": law, "std": std, "rules": rules, "parts": parts, "like": like}
    chosen, policy = check_noise(model, **given)
    checkpoint, matched = CheckpointParameters(source, model, chosen.tensors), {}
    if like is not None:
        alpha, distance = alpha_of_equal_distance(checkpoint, chosen, policy, seed, like, title, progress)
        policy, matched = replace(policy, alpha=alpha), {"alpha": alpha, "distance": distance}
    settings = policy.settings(chosen.parameters, chosen.toward)
    noise = implementation("noise_", torch.device("cpu"))
    applied: dict[str, tuple[Setting, torch.Tensor]] = {}
    for parameters in checkpoint.edit(output, title, progress):
        sums = noise([segment(name, t, settings[name]) for name, t in parameters.items()], seed, stochastic_rounding)
        applied |= {name: (settings[name], values) for name, values in zip(parameters, sums, strict=True)}
    return NoiseReport(report(applied), chosen.left, **matched)


def check_noise(
    model: nn.Module,
    *,
    alpha: float,
    beta: float,
    seed: int,
    law: str,
    std: float | None,
    rules: Sequence[NoiseRule],
    parts: Parts,
    like: Mapping[str, Any] | None,
) -> tuple[Selection, Policy]:
    """Returns the parameters of a model that :func:`noise_checkpoint` would change, and how; the model may be on the meta device.

    Raises:
        ValueError: an argument is invalid or does not suit the model. Whether a distance can be reached depends on the weights.
    """
    checks.seed(seed)
    Policy(alpha, beta, law, std, tuple(rules))
    chosen = select(model, parts, rules)
    policy = Policy(alpha, beta, law, std, chosen.rules)
    policy.settings(chosen.parameters, chosen.toward)
    if like is not None:
        settings_like(chosen, like)
    return chosen, policy


def replay_checkpoint(
    source: Path,
    pattern: str,
    *,
    seed: int,
    law: str = "xavier_uniform",
    std: float | None = None,
    rules: Sequence[NoiseRule] = (),
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields name and ``N``, the noise itself in float32, of each parameter whose name matches the glob ``pattern``.

    Raises:
        ValueError: no parameter that gets noise matches.
    """
    checks.seed(seed)
    for name, (setting, shape) in _replayed(source, pattern, law, std, rules).items():
        drawn = torch.zeros(shape)
        implementation("noise_", drawn.device)([Segment(drawn, name, setting.law, 0.0, setting.scale)], seed, False)
        yield name, drawn


def write_replay(
    source: Path,
    path: Path,
    pattern: str,
    *,
    seed: int,
    law: str = "xavier_uniform",
    std: float | None = None,
    rules: Sequence[NoiseRule] = (),
) -> dict[str, str]:
    """Writes the tensors of :func:`replay_checkpoint` to the safetensors file ``path``.

    Returns:
        :func:`describe_replay` of each tensor, by name.

    Memory: the largest tensor.
    """
    shapes = {name: shape for name, (_, shape) in _replayed(source, pattern, law, std, rules).items()}
    described = {}
    with TensorWriter(path, {name: (torch.float32, shape) for name, shape in shapes.items()}) as file:
        for name, drawn in replay_checkpoint(source, pattern, seed=seed, law=law, std=std, rules=rules):
            file.write(name, 0, drawn)
            described[name] = describe_replay(drawn)
            del drawn  # frees it before the next one is drawn
        file.flush()
    return described


def _replayed(
    source: Path, pattern: str, law: str, std: float | None, rules: Sequence[NoiseRule]
) -> dict[str, tuple[Setting, tuple[int, ...]]]:
    """Returns setting and shape of the parameters that get noise and match ``pattern``, by name."""
    laws = tuple(replace(rule, alpha=None, beta=None, toward=None) for rule in rules)  # N depends on the law alone
    parameters = select(checkpoint_skeleton(source), "all", laws).parameters
    settings = Policy(1.0, 1.0, law, std, laws).settings(parameters, dict.fromkeys(parameters, 0.0))
    wanted = {n: (s, parameters[n].shape) for n, s in settings.items() if s.law != "constant" and fnmatchcase(n, pattern)}
    if not wanted:
        raise ValueError(
            f"replay: got {pattern!r}, wanted a glob that matches a parameter with noise, such as {next(iter(parameters))!r}"
        )
    return wanted


def describe_replay(drawn: torch.Tensor) -> str:
    """Returns a line with the shape, norm, start of the SHA-256 of the float32 bytes, and first values of ``N``."""
    digest = hashlib.sha256(drawn.numpy().data).hexdigest()
    first = " ".join(f"{value:.9g}" for value in drawn.flatten()[:4].tolist())
    norm = float(torch.linalg.vector_norm(drawn, dtype=torch.float64))
    return f"{tuple(drawn.shape)}  |N| {norm:.6g}  sha256 {digest[:16]}  {first} ..."
