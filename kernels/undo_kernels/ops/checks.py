"""Checks of the public functions' arguments. Each raises a ``ValueError`` that names the argument, what came and what was expected."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOST = 2**63 - 1  # of torch's integers
_ELEMENTS = 2**59  # of a tensor of 8 bytes each whose bytes such an integer counts
_LONGEST = 400  # characters of what an error shows
LEAST = 2.0**-126  # of the positive numbers that float32 holds with all digits
LARGEST = (2 - 2.0**-23) * 2.0**127  # of float32, in which the kernels compute


def fail(name: str, got: Any, wanted: str) -> NoReturn:
    """Raises the ``ValueError`` for an argument."""
    raise ValueError(f"{name}: got {got if isinstance(got, str) else shown(got)}, wanted {wanted}")


def shown(value: Any) -> str:
    """Returns any value as a short line. Python itself prints no integers of more than 4300 digits, and tensors as many lines."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, torch.Tensor):
        return "a nested tensor" if value.is_nested else f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    line = " ".join((repr(value) if isinstance(value, str) else str(value)).split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "..."


def dense(name: str, value: Any, shape: str) -> torch.Tensor:
    """Returns ``value`` if it is a tensor that holds each of its elements, neither sparse nor nested."""
    if not isinstance(value, torch.Tensor):
        fail(name, type(value).__name__, f"a tensor {shape}")
    if value.layout != torch.strided or value.is_nested:
        fail(name, shown(value) if value.is_nested else f"a tensor of layout {value.layout}", f"a dense tensor {shape}")
    return value


def float_tensor(name: str, value: Any, shape: str, ndim: int | None = None) -> torch.Tensor:
    """Returns ``value`` if it is a tensor of a supported float dtype with ``ndim`` dimensions (None: at least one)."""
    dense(name, value, shape)
    if value.dtype not in FLOATS:
        fail(name, value.dtype, "float32, bfloat16, float16 or float64")
    if (ndim is None and value.ndim < 1) or (ndim is not None and value.ndim != ndim):
        fail(name, f"shape {tuple(value.shape)}", shape)
    return value


def head(prefix: str, hidden: Any, weight: Any, bias: Any) -> None:
    """Checks that the hidden states, weight and bias of one head fit each other."""
    float_tensor(f"{prefix}hidden", hidden, "[..., d]")
    float_tensor(f"{prefix}weight", weight, "[V, d]", 2)
    if not weight.shape[0] or not weight.shape[1]:
        fail(f"{prefix}weight", f"shape {tuple(weight.shape)}", "[V, d] with V >= 1 and d >= 1")
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
    value = dense(name, replicated(name, value), "[...]")
    right = {"bool": value.dtype == torch.bool, "int": whole(value), "float": value.is_floating_point()}[kind]
    if not right:
        fail(name, value.dtype, {"bool": "bool", "int": "an integer dtype", "float": "a float dtype"}[kind])
    if value.shape != leading:
        fail(name, f"shape {tuple(value.shape)}", f"{tuple(leading)}, the leading shape of the hidden states")
    if value.device != device:
        fail(name, f"device {value.device}", f"{device}, where the hidden states are")
    return value


def whole(value: torch.Tensor) -> bool:
    """Returns whether a tensor has an integer dtype."""
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def number(name: str, value: Any, wanted: str, low: float = -LARGEST, high: float = LARGEST, open_ends: bool = False) -> float:
    """Returns ``value`` as a float if it is a number of float32 in [low, high], or in (low, high) with open ends."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(name, value, wanted)
    if not (low < value < high if open_ends else low <= value <= high):  # comparisons alone can be traced into a graph
        fail(name, value, wanted)
    return float(value)


def positive(name: str, value: Any, wanted: str = "a number > 0") -> float:
    """Returns ``value`` as a float if float32 holds it as a positive number; it would round smaller ones to 0."""
    return number(name, value, f"{wanted} that float32 holds", LEAST)


def integer(name: str, value: Any, wanted: str, low: int, high: int = _MOST) -> int:
    """Returns ``value`` if it is an integer in [low, high]; torch and C++ hold no larger ones than ``high``'s default."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        fail(name, value, wanted)
    return value


def seed(value: Any) -> int:
    """Returns ``value`` if it is a seed of Philox, an unsigned 64-bit integer."""
    return integer("seed", value, "an integer in [0, 2**64)", 0, 2**64 - 1)


def ignore_index(value: Any) -> int:
    """Returns ``value`` if it is a label that a 64-bit tensor can hold; it may be an integer of NumPy."""
    value = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value
    return integer("ignore_index", value, "a 64-bit integer", -_MOST - 1)


def flag(name: str, value: Any) -> bool:
    """Returns ``value`` if it is True or False."""
    if not isinstance(value, bool):
        fail(name, value, "True or False")
    return value


def text(name: str, value: Any, wanted: str) -> str:
    """Returns ``value`` if it is a string that UTF-8 can encode; a lone surrogate has no bytes to hash."""
    if not isinstance(value, str) or value.encode(errors="ignore").decode() != value:
        fail(name, shown(value), wanted)
    return value


def sizes(name: str, value: Any, wanted: str) -> tuple[int, ...]:
    """Returns a shape as a tuple if it is a sequence of integers >= 0, with no more elements than a tensor can have."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        fail(name, type(value).__name__, wanted)
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in value):
        fail(name, value, wanted)
    if math.prod(value) > _ELEMENTS:
        fail(name, value, f"{wanted}, and at most 2**59 elements")
    return tuple(value)


def device(value: Any) -> torch.device:
    """Returns ``value`` as a device."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError):  # of a name, of another type, of an integer beyond 64 bits
        fail("device", shown(value), "a torch.device, or its name, such as cpu or cuda")


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Returns ``value`` if it is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        fail(name, shown(value), "one of " + ", ".join(choices))
    return value


def vocabulary(value: Any, entries: int | None) -> int | None:
    """Returns ``vocab_size`` if it is None or at most ``entries``, the rows of the weight; None: they are not known yet."""
    if value is None:
        return None
    wanted = f"an integer {'>= 1' if entries is None else f'in [1, {entries}]'}, or None"
    return integer("vocab_size", value, wanted, 1, _MOST if entries is None else entries)


def workspace(value: Any) -> int | None:
    """Returns ``workspace_bytes`` if it is a positive integer or None."""
    return None if value is None else integer("workspace_bytes", value, "a positive number of bytes, or None", 1)


def labels_within(labels: torch.Tensor, counted: torch.Tensor, size: int, ignore_index: int) -> None:
    """Checks on CPUs that every counted label is a vocabulary entry. On a GPU or in a compiled graph this would make the host wait."""
    if looks(labels) and labels.numel():
        inside = (labels >= 0) & (labels < size) | ~counted
        if not inside.all():
            fail("labels", int(labels[~inside][0]), f"vocabulary entries in [0, {size}) or ignore_index, {ignore_index}")


def looks(tensor: torch.Tensor) -> bool:
    """Returns whether the host may read a tensor's values. It may not on a GPU, for which it would wait, nor in a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def sparse_teacher(
    indices: Any, logprobs: Any, leading: torch.Size, vocabulary: int, counted: torch.Tensor | None, like: torch.Tensor
) -> None:
    """Checks the known entries of a teacher: their shapes, their device and, on CPUs, the values of counted tokens.

    No index may repeat at a token or leave the vocabulary. The probabilities of a token may sum to at most 1, with a tolerance of 1e-3
    in float32 and of 64 roundings in 16 bits; logits passed by mistake exceed that by factors.
    """
    wanted = "integers [..., k], with the leading shape of the hidden states"
    dense("teacher_indices", indices, wanted)
    if not whole(indices) or indices.ndim == 0 or indices.shape[:-1] != leading:
        fail("teacher_indices", f"shape {tuple(indices.shape)} and {indices.dtype}", wanted)
    float_tensor("teacher_logprobs", logprobs, "[..., k]")
    if logprobs.shape != indices.shape:
        fail("teacher_logprobs", f"shape {tuple(logprobs.shape)}", f"{tuple(indices.shape)}, like teacher_indices")
    same_device("teacher_indices", indices, like)
    same_device("teacher_logprobs", logprobs, like)
    if not looks(indices):
        return
    kept = slice(None) if counted is None else counted
    flat = indices.reshape(leading.numel(), indices.shape[-1])[kept].long()
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
