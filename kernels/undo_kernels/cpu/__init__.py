"""Thin bindings to the C++ kernels of ``csrc/``; torch must be imported first, for its OpenMP threads to be shared.

The vocabulary losses are in ``losses.py``, RMU's in ``rmu.py``. Of the noise, C++ covers Xavier-uniform on float32 so far; other laws and dtypes are
defined by the reference and run there.
"""

from __future__ import annotations

import torch

from undo_kernels.cpu import losses, rmu
from undo_kernels.library import mark_unavailable, register
from undo_kernels.reference.noise import amplitude, noise_tensor_
from undo_kernels.reference.philox import name_hash

try:
    from undo_kernels import _cpu
except ImportError as error:
    _cpu = None
    mark_unavailable("cpu", f"the C++ extension was not built ({error}); install a C++17 compiler and run pip install again")

__all__ = ["losses", "rmu"]


@register("noise_", "cpu")
@torch.no_grad()
def noise_cpu_(
    tensor: torch.Tensor,
    *,
    name: str,
    shape: tuple[int, ...],
    start: int,
    alpha: float,
    beta: float,
    seed: int,
    law: str,
    std: float | None,
    stochastic_rounding: bool,
) -> None:
    """:func:`undo_kernels.reference.noise.noise_tensor_`, bit for bit."""
    if law == "xavier_uniform" and tensor.dtype == torch.float32:
        k, c = torch.tensor([1.0 - alpha, alpha * beta * amplitude(law, shape, std)], dtype=torch.float64).float().tolist()
        _cpu.noise_uniform_f32(tensor.data_ptr(), tensor.numel(), start, seed, name_hash(name), k, c)
        return
    options = {"alpha": alpha, "beta": beta, "seed": seed, "law": law, "std": std, "stochastic_rounding": stochastic_rounding}
    noise_tensor_(tensor, name=name, shape=shape, start=start, **options)
