"""Noise from disk to disk: a checkpoint of any size, tensor by tensor, with the bits that the model in memory would get."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from transformers import PreTrainedModel
from undo_kernels.library import implementation
from undo_kernels.segment import Segment

from undo_core.checkpoint_files import (
    MappedFile,
    TensorWriter,
    groups,
    meta_model,
    read_header,
    to_disk,
    to_memory,
    weight_files,
)
from undo_core.noise import TensorNoise, initial_values, report
from undo_core.ops import checks
from undo_core.ops.noise_rules import NoiseRule, Policy, Setting, describe
from undo_core.training.progress import StageProgress

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".ckpt", ".onnx")
NOT_COPIED = ("manifest.json", "log.jsonl")  # they tell how the source was made


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
    stochastic_rounding: bool = True,
    title: str = "noise",
    progress: bool = True,
) -> dict[str, TensorNoise]:
    """:func:`undo_core.noise_` on the checkpoint folder ``source``, written to the existing, empty folder ``output``.

    Each file is copied and its tensors are changed where they lie, so everything else in it stays as it is; weights in other formats are left out. The bits equal those of
    the model loaded in the checkpoint's own dtype, also where transformers renames or stacks tensors on load: names on disk are
    mapped to names in memory through a model on the meta device.

    Memory: the largest tensor; three times the largest parameter that transformers puts together from several tensors.

    Returns:
        For every parameter its norms and the shares of shrinkage and noise.

    Raises:
        ValueError: a bad argument; a tensor that is no float or has no place in the model; nothing is written.
        FileNotFoundError: no safetensors file.
    """
    checks.seed(seed)
    policy = Policy(alpha, beta, law, std, tuple(rules))
    files = {path: read_header(path) for path in weight_files(source)}
    model = meta_model(source)
    settings, names = _settings(policy, model)
    work = groups(model, files)
    for group in work:
        for name, path in group.files.items():
            if files[path][name].dtype is None and any(parameter in names for parameter in group.parameters):
                raise ValueError(f"model: got {name}, which is no float tensor; wanted float32, bfloat16, float16 or float64")
    for path in sorted(source.iterdir()):
        other_weights = path.suffix in WEIGHTS and path not in files  # undamaged: they must not come along
        if path.is_file() and path.name not in NOT_COPIED and not other_weights:
            shutil.copyfile(path, output / path.name)
    mapped = {path: MappedFile(output / path.name) for path in files}
    noise = implementation("noise_", torch.device("cpu"))
    applied: dict[str, tuple[Setting, torch.Tensor]] = {}
    sizes = {name: entry.end - entry.start for entries in files.values() for name, entry in entries.items()}
    total, done = sum(sizes.values()) >> 20, 0
    with StageProgress(title, total, enabled=progress, unit="MB") as bar:
        for group in work:
            if any(parameter in names for parameter in group.parameters):
                tensors = {name: mapped[path].tensor(name) for name, path in group.files.items()}
                parameters = to_memory(model, group, tensors)
                segments = []
                for name, tensor in parameters.items():
                    setting = settings[names[name]]
                    segments.append(Segment(tensor, names[name], setting.law, setting.keep, setting.scale))
                rows = noise(segments, seed, stochastic_rounding)
                applied |= {segment.name: (settings[segment.name], row) for segment, row in zip(segments, rows, strict=True)}
                if group.converter is not None:
                    for name, tensor in to_disk(model, group, parameters).items():
                        tensors[name].copy_(tensor)
            for name, path in group.files.items():
                mapped[path].let_go(name)
            size = sum(sizes[name] for name in group.files)
            done += size
            bar.update(done >> 20, size >> 20, None)
    for file in mapped.values():
        file.flush()
    return report(applied)


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
    model = meta_model(source)
    laws = tuple(replace(rule, alpha=None, beta=None, toward=None) for rule in rules)  # N is before strength and scale
    parameters = {name: parameter for name, (_, parameter) in describe(model).items()}
    settings = Policy(1.0, 1.0, law, std, laws).settings(parameters, dict.fromkeys(parameters, 0.0))
    wanted = {n: (s, parameters[n].shape) for n, s in settings.items() if s.law != "constant" and fnmatchcase(n, pattern)}
    if not wanted:
        raise ValueError(
            f"replay: got {pattern!r}, wanted a glob that matches a parameter with noise, such as {next(iter(parameters))!r}"
        )
    return wanted


def _settings(policy: Policy, model: PreTrainedModel) -> tuple[dict[str, Setting], dict[str, str]]:
    """What happens to each parameter by canonical name, and the canonical name of every name, tied ones included."""
    parameters = {name: parameter for name, (_, parameter) in describe(model).items()}
    first = {id(tensor): name for name, (tensor, _) in describe(model).items()}
    names = {name: first[id(tensor)] for name, tensor in model.named_parameters(remove_duplicate=False)}
    return policy.settings(parameters, initial_values(model)), names


def describe_replay(drawn: torch.Tensor) -> str:
    """Shape, norm, SHA-256 of the float32 bytes and first values of ``N``."""
    digest = hashlib.sha256(drawn.numpy().data).hexdigest()
    first = " ".join(f"{value:.9g}" for value in drawn.flatten()[:4].tolist())
    return f"{tuple(drawn.shape)}  |N| {float(torch.linalg.vector_norm(drawn, dtype=torch.float64)):.6g}  sha256 {digest[:16]}  {first} ..."
