"""Noise from disk to disk: a checkpoint of any size, tensor by tensor, with the bits that the model in memory would get."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from undo_kernels.library import implementation
from undo_kernels.ops import checks
from undo_kernels.ops.noise import segment
from undo_kernels.ops.noise_rules import NoiseRule, Policy, Setting
from undo_kernels.segment import Segment

from undo_core.checkpoints.files import TensorWriter, checkpoint_skeleton
from undo_core.noise.edit import CheckpointParameters
from undo_core.noise.model import NoiseReport, report
from undo_core.noise.parameters import Parts, select


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
    title: str = "noise",
    progress: bool = True,
) -> NoiseReport:
    """:func:`undo_core.noise_` on the checkpoint folder ``source``, written to the existing, empty folder ``output``.

    The bits equal those of the model loaded in the checkpoint's own dtype. Memory and what is copied:
    :class:`undo_core.noise.edit.CheckpointParameters`.

    Returns:
        For every parameter its norms and the shares of shrinkage and noise; and what was left.

    Raises:
        ValueError: a bad argument; a tensor that is no float or has no place in the model; nothing is written.
        FileNotFoundError: no safetensors file.
    """
    checks.seed(seed)
    Policy(alpha, beta, law, std, tuple(rules))
    checkpoint = CheckpointParameters(source, parts, rules)
    chosen = checkpoint.chosen
    settings = Policy(alpha, beta, law, std, chosen.rules).settings(chosen.parameters, chosen.toward)
    noise = implementation("noise_", torch.device("cpu"))
    applied: dict[str, tuple[Setting, torch.Tensor]] = {}
    for parameters in checkpoint.edit(output, title, progress):
        rows = noise([segment(name, t, settings[name]) for name, t in parameters.items()], seed, stochastic_rounding)
        applied |= {name: (settings[name], row) for name, row in zip(parameters, rows, strict=True)}
    return NoiseReport(report(applied), chosen.left)


def replay_checkpoint(
    source: Path,
    pattern: str,
    *,
    seed: int,
    law: str = "xavier_uniform",
    std: float | None = None,
    rules: Sequence[NoiseRule] = (),
) -> Iterator[tuple[str, torch.Tensor]]:
    """``N`` itself, float32, of the checkpoint's parameters whose name matches the glob ``pattern``, one at a time.

    Raises:
        ValueError: no parameter with noise matches.
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
    """What :func:`replay_checkpoint` draws, in the safetensors file ``path``; returns :func:`describe_replay` of each tensor.

    Memory: the largest tensor.
    """
    shapes = {name: shape for name, (_, shape) in _replayed(source, pattern, law, std, rules).items()}
    described = {}
    with TensorWriter(path, {name: (torch.float32, shape) for name, shape in shapes.items()}) as file:
        for name, drawn in replay_checkpoint(source, pattern, seed=seed, law=law, std=std, rules=rules):
            file.write(name, 0, drawn)
            described[name] = describe_replay(drawn)
            del drawn  # before the next one is drawn
        file.flush()
    return described


def _replayed(
    source: Path, pattern: str, law: str, std: float | None, rules: Sequence[NoiseRule]
) -> dict[str, tuple[Setting, tuple[int, ...]]]:
    """Setting and shape of the parameters with noise that ``pattern`` matches."""
    laws = tuple(replace(rule, alpha=None, beta=None, toward=None) for rule in rules)  # N is before strength and scale
    parameters = select(checkpoint_skeleton(source), "all", laws).parameters
    settings = Policy(1.0, 1.0, law, std, laws).settings(parameters, dict.fromkeys(parameters, 0.0))
    wanted = {n: (s, parameters[n].shape) for n, s in settings.items() if s.law != "constant" and fnmatchcase(n, pattern)}
    if not wanted:
        raise ValueError(
            f"replay: got {pattern!r}, wanted a glob that matches a parameter with noise, such as {next(iter(parameters))!r}"
        )
    return wanted


def describe_replay(drawn: torch.Tensor) -> str:
    """Shape, norm, SHA-256 of the float32 bytes and first values of ``N``."""
    digest = hashlib.sha256(drawn.numpy().data).hexdigest()
    first = " ".join(f"{value:.9g}" for value in drawn.flatten()[:4].tolist())
    return f"{tuple(drawn.shape)}  |N| {float(torch.linalg.vector_norm(drawn, dtype=torch.float64)):.6g}  sha256 {digest[:16]}  {first} ..."
