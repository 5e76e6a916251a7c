"""In-place parameter noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from undo_kernels.library import implementation
from undo_kernels.segment import Segment, amplitude

from undo_core.ops import checks

LAWS = ("xavier_uniform", "xavier_normal", "normal")
Toward = float | Mapping[str, float] | Callable[[str, torch.Tensor], float]

_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")


def noise_(
    tensors: nn.Module | Mapping[str, torch.Tensor],
    *,
    alpha: float,
    beta: float,
    seed: int,
    law: Literal["xavier_uniform", "xavier_normal", "normal"] = "xavier_uniform",
    std: float | None = None,
    toward: Toward = 0.0,
    stochastic_rounding: bool | None = None,
) -> None:
    """``theta <- (1 - alpha) * theta + alpha * beta * N`` in place (arXiv 2506.06278, its only numbered equation).

    ``N`` of an element depends only on the seed, the parameter's canonical name and the element's index in it (Philox-4x32-10):
    not on device, block size, dtype, order of the parameters or number of threads. Tensors of two and more dimensions get ``N``;
    one-dimensional ones (norms, biases) get none and shrink toward ``toward``. Tied parameters are noised once, under the first of
    their names. :func:`undo_core.noise_` finds ``toward`` for a Hugging Face model.

    Args:
        tensors: a module, whose parameters that require a gradient are taken (as published), or ``{name: tensor}``.
        alpha: strength, in [0, 1].
        beta: scale of the noise, >= 0.
        seed: in [0, 2**64).
        law: of ``N``; Xavier's fans come from the full shape, with further dimensions as a receptive field.
        std: of the normal law, >= 0; for that law alone.
        toward: what one-dimensional parameters shrink toward: a number, ``{name: number}``, or a function of name and tensor.
        stochastic_rounding: of 16-bit parameters; None rounds them stochastically, which has no bias.

    Memory: nothing of a tensor's size.

    Raises:
        ValueError: an argument is wrong, or a tensor is not a contiguous float tensor; nothing is changed.
    """
    checks.number("alpha", alpha, "a number in [0, 1]", 0, 1)
    checks.number("beta", beta, "a number >= 0", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        checks.fail("seed", seed, "an integer in [0, 2**64)")
    checks.choice("law", law, LAWS)
    if law == "normal":
        checks.number("std", std, "a number >= 0 with law='normal'", 0)
    elif std is not None:
        checks.fail("std", std, f"None with law={law!r}: its spread comes from the shape")
    targets = [(name, tensor, _target(toward, name, tensor)) for name, tensor in named(tensors).items()]
    for name, tensor, target in targets:
        if tensor.dtype not in checks.FLOATS or tensor.ndim == 0 or not tensor.is_contiguous():
            got = f"{tensor.dtype}, shape {tuple(tensor.shape)}, {'' if tensor.is_contiguous() else 'not '}contiguous"
            checks.fail(f"tensors[{name!r}]", got, "a contiguous float tensor with a dimension")
        checks.number("toward", target, f"a finite number for {name}")
    rounding = True if stochastic_rounding is None else bool(stochastic_rounding)
    segments = []
    for name, tensor, target in targets:
        if tensor.ndim == 1:
            kind, scale = "constant", alpha * target
        else:
            kind = "uniform" if law == "xavier_uniform" else "normal"
            scale = alpha * beta * amplitude(law, tensor.shape, std)
        segments.append(Segment(tensor.detach(), name, kind, 1.0 - alpha, scale))
    implementation("noise_", tensor.device)(segments, seed, rounding)


def replay(
    name: str,
    shape: Sequence[int],
    *,
    seed: int,
    law: Literal["xavier_uniform", "xavier_normal", "normal"] = "xavier_uniform",
    std: float | None = None,
) -> torch.Tensor:
    """``N`` of a whole parameter, for audit: ``shape``, float64, on the CPU; 8 bytes an element."""
    drawn = torch.zeros(tuple(shape), dtype=torch.float64)
    segment = Segment(drawn, name, "uniform" if law == "xavier_uniform" else "normal", 0.0, amplitude(law, shape, std))
    implementation("noise_", drawn.device)([segment], seed, False)
    return drawn


def canonical_name(name: str) -> str:
    """A parameter's name without the prefixes of wrappers (compile, data parallel, PEFT)."""
    while True:
        stripped = name.replace("._orig_mod.", ".")
        for prefix in _WRAPPERS:
            stripped = stripped.removeprefix(prefix)
        if stripped == name:
            return name
        name = stripped


def named(tensors: nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by canonical name, each storage once, under the first of its names.

    Raises:
        ValueError: no tensors, or two different ones of the same canonical name.
    """
    if isinstance(tensors, nn.Module):
        pairs = [(name, p) for name, p in tensors.named_parameters(remove_duplicate=False) if p.requires_grad]
    elif isinstance(tensors, Mapping):
        pairs = list(tensors.items())
    else:
        checks.fail("tensors", type(tensors).__name__, "a module or a mapping of names to tensors")
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for name, tensor in pairs:
        if not isinstance(tensor, torch.Tensor):
            checks.fail(f"tensors[{name!r}]", type(tensor).__name__, "a tensor")
        storage = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and storage in seen:
            continue
        seen.add(storage)
        if canonical_name(name) in found:
            checks.fail(
                "tensors", f"two tensors named {canonical_name(name)!r}", "different names once wrappers' prefixes are stripped"
            )
        found[canonical_name(name)] = tensor
    if not found:
        checks.fail("tensors", "none to noise", "at least one parameter that requires a gradient")
    return found


def _target(toward: Toward, name: str, tensor: torch.Tensor) -> float:
    if tensor.ndim != 1:
        return 0.0
    if callable(toward):
        return toward(name, tensor)
    if isinstance(toward, Mapping):
        if name not in toward:
            checks.fail("toward", sorted(toward), f"an entry for {name}")
        return toward[name]
    return toward
