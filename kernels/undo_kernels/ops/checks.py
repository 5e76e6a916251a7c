"""Checks of the public functions' arguments. Each raises a ``ValueError`` that names the argument, what came and what was expected."""

from __future__ import annotations

import math
import sys
from typing import Any, NoReturn

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(name: str, got: Any, wanted: str) -> NoReturn:
    """Raises the ``ValueError`` for an argument."""
    raise ValueError(f"{name}: got {got}, wanted {wanted}")


def float_tensor(name: str, value: Any, shape: str, ndim: int | None = None) -> torch.Tensor:
    """Returns ``value`` if it is a tensor of a supported float dtype with ``ndim`` dimensions (None: at least one)."""
    if not isinstance(value, torch.Tensor):
        fail(name, type(value).__name__, f"a tensor {shape}")
    if value.dtype not in FLOATS:
        fail(name, value.dtype, "float32, bfloat16, float16 or float64")
    if (ndim is None and value.ndim < 1) or (ndim is not None and value.ndim != ndim):
        fail(name, f"shape {tuple(value.shape)}", shape)
    return value


def head(prefix: str, hidden: Any, weight: Any, bias: Any) -> None:
    """Checks that the hidden states, weight and bias of one head fit each other."""
    float_tensor(f"{prefix}hidden", hidden, "[..., d]")
    float_tensor(f"{prefix}weight", weight, "[V, d]", 2)
    if hidden.shape[-1] != weight.shape[1]:
        fail(f"{prefix}weight", f"shape {tuple(weight.shape)}", f"[V, {hidden.shape[-1]}], the width of {prefix}hidden")
    same_device(f"{prefix}weight", weight, hidden)
    if bias is not None:
        float_tensor(f"{prefix}bias", bias, "[V]", 1)
        if bias.shape[0] != weight.shape[0]:
            fail(f"{prefix}bias", f"shape {tuple(bias.shape)}", f"[{weight.shape[0]}], one number for each vocabulary entry")
        same_device(f"{prefix}bias", bias, hidden)


def is_dtensor(value: Any) -> bool:
    """Returns whether ``value`` is a ``DTensor``. It imports nothing: a ``DTensor`` exists only where its module is loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def replicated(name: str, value: Any) -> Any:
    """Returns the local tensor of a replicated ``DTensor``; other values as they are."""
    if not is_dtensor(value):
        return value
    if not all(placement.is_replicate() for placement in value.placements):
        fail(name, f"a DTensor with placements {tuple(value.placements)}", "Replicate(), or a plain tensor")
    return value.to_local(grad_placements=value.placements)


def same_device(name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    """Checks that ``value`` is on the device of the hidden states."""
    if value.device != like.device:
        fail(name, f"device {value.device}", f"{like.device}, where the hidden states are")


def per_token(name: str, value: Any, leading: torch.Size, kind: str, device: torch.device) -> torch.Tensor:
    """Returns ``value`` if it is a tensor with one entry per token; ``kind`` is bool, int or float."""
    value = replicated(name, value)
    if not isinstance(value, torch.Tensor):
        fail(name, type(value).__name__, f"a tensor {list(leading)}")
    right = {
        "bool": value.dtype == torch.bool,
        "int": not value.is_floating_point() and value.dtype != torch.bool,
        "float": value.is_floating_point(),
    }[kind]
    if not right:
        fail(name, value.dtype, {"bool": "bool", "int": "an integer dtype", "float": "a float dtype"}[kind])
    if value.shape != leading:
        fail(name, f"shape {tuple(value.shape)}", f"{tuple(leading)}, the leading shape of the hidden states")
    if value.device != device:
        fail(name, f"device {value.device}", f"{device}, where the hidden states are")
    return value


def number(
    name: str, value: Any, wanted: str, low: float = -math.inf, high: float = math.inf, open_ends: bool = False
) -> float:
    """Returns ``value`` as a float if it is a finite number in [low, high], or in (low, high) with open ends."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        fail(name, value, wanted)
    if not (low < value < high if open_ends else low <= value <= high):
        fail(name, value, wanted)
    return float(value)


def seed(value: Any) -> int:
    """Returns ``value`` if it is a seed of Philox, an unsigned 64-bit integer."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        fail("seed", value, "an integer in [0, 2**64)")
    return value


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Returns ``value`` if it is one of ``choices``."""
    if value not in choices:
        fail(name, repr(value), "one of " + ", ".join(choices))
    return value


def vocabulary(value: Any, entries: int | None) -> int | None:
    """Returns ``vocab_size`` if it is None or at most ``entries``, the rows of the weight; None: they are not known yet."""
    inside = isinstance(value, int) and not isinstance(value, bool) and value >= 1 and (entries is None or value <= entries)
    if value is not None and not inside:
        fail("vocab_size", value, f"an integer {'>= 1' if entries is None else f'in [1, {entries}]'}, or None")
    return value


def workspace(value: Any) -> int | None:
    """Returns ``workspace_bytes`` if it is a positive integer or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        fail("workspace_bytes", value, "a positive number of bytes, or None")
    return value


def labels_within(labels: torch.Tensor, counted: torch.Tensor, size: int, ignore_index: int) -> None:
    """Checks on CPUs that every counted label is a vocabulary entry. On a GPU or in a compiled graph this would make the host wait."""
    if looks(labels) and labels.numel():
        inside = (labels >= 0) & (labels < size) | ~counted
        if not inside.all():
            fail("labels", int(labels[~inside][0]), f"vocabulary entries in [0, {size}) or ignore_index, {ignore_index}")


def looks(tensor: torch.Tensor) -> bool:
    """Returns whether the host may read a tensor's values. It may not on a GPU, for which it would wait, nor in a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def sparse_teacher(indices: Any, logprobs: Any, leading: torch.Size, vocabulary: int, counted: torch.Tensor | None) -> None:
    """Checks the known entries of a teacher: their shapes and, on CPUs, the values of counted tokens.

    No index may repeat at a token or leave the vocabulary. The probabilities of a token may sum to at most 1, with a tolerance of 1e-3
    in float32 and of 64 roundings in 16 bits; logits passed by mistake exceed that by factors.
    """
    wanted = f"integers {(*leading, 'k')}"
    if not isinstance(indices, torch.Tensor):
        fail("teacher_indices", type(indices).__name__, wanted)
    if indices.is_floating_point() or indices.ndim == 0 or indices.shape[:-1] != leading:
        fail("teacher_indices", f"shape {tuple(indices.shape)} and {indices.dtype}", wanted)
    float_tensor("teacher_logprobs", logprobs, "[..., k]")
    if logprobs.shape != indices.shape:
        fail("teacher_logprobs", f"shape {tuple(logprobs.shape)}", f"{tuple(indices.shape)}, like teacher_indices")
    if not looks(indices):
        return
    kept = slice(None) if counted is None else counted
    flat = indices.reshape(leading.numel(), indices.shape[-1])[kept]
    ordered = flat.sort(-1).values
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        fail("teacher_indices", "a token with a repeated index", "different indices at each token (-1 is padding)")
    if ((ordered < -1) | (ordered >= vocabulary)).any():
        fail("teacher_indices", "an index outside the vocabulary", f"-1 or [0, {vocabulary})")
    known = logprobs.detach().reshape(leading.numel(), indices.shape[-1])[kept].double().masked_fill(flat < 0, -math.inf)
    total = known.logsumexp(-1)
    largest = math.log1p(max(1e-3, 64 * torch.finfo(logprobs.dtype).eps))
    if (total > largest).any():
        got = f"a token whose exponentials sum to {math.exp(min(float(total[total > largest][0]), 700.0)):.4g}"
        fail(
            "teacher_logprobs",
            got,
            "log-probabilities over the whole vocabulary, whose exponentials sum to at most 1 (log_softmax)",
        )
