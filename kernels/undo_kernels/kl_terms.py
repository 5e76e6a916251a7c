"""Elementwise terms of KL(p || q) and differences q - p of two probability tensors, without cancellation.

Both functions take ``x = log q - log p`` in addition to the probabilities, because computing ``q - p`` directly loses precision
where the two nearly agree.
"""

from __future__ import annotations

import torch

_MOST = 1e30  # finite in float32, so that its product with a probability of 0 is 0


def log_ratio(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Returns ``log q - log p``; 0 where both probabilities are zero, since such an outcome contributes nothing."""
    return torch.where((log_q == -torch.inf) & (log_p == -torch.inf), 0.0, log_q - log_p)


def expm1(x: torch.Tensor) -> torch.Tensor:
    """Returns ``e**x - 1``, accurate near 0 also under torch.compile.

    Inductor's C++ backend replaces ``torch.expm1`` by ``exp(x) - 1``, which rounds to 0 for small x.
    """
    if not torch.compiler.is_compiling():
        return torch.expm1(x)
    near = x.abs() < 0.5
    small = torch.where(near, x, 0.0)
    series = torch.ones_like(small)
    for n in range(16, 1, -1):  # Horner's scheme; the truncation error 0.5**16 / 17! is below float64's rounding
        series = 1 + small * series / n
    return torch.where(near, small * series, x.exp() - 1)


def expm1_(x: torch.Tensor) -> torch.Tensor:
    """Returns :func:`expm1` of ``x``; overwrites ``x``, except under torch.compile."""
    return expm1(x) if torch.compiler.is_compiling() else x.expm1_()


def bregman(p: torch.Tensor, q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns ``p * (expm1(x) - x)``, the terms of ``KL(p || q)``; +inf where only q is zero, and q where only p is zero.

    Where ``|x| > 1`` it computes ``q - p * (1 + x)`` instead, which does not cancel there and avoids overflow in ``expm1`` and
    0 * inf.
    """
    near = x.clamp(-1, 1)
    far = q - p * (1 + x.clamp_max(_MOST))  # x is +inf where p is 0
    return torch.where(x.abs() <= 1, p * (expm1(near) - near), far)


def difference(p: torch.Tensor, q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns ``q - p``, computed from the larger of the two and ``x`` so that nothing cancels."""
    return torch.maximum(p, q) * -expm1(-x.abs()) * x.sign()
