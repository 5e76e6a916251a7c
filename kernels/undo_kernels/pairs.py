"""One outcome under two distributions p and q: its term of KL(p || q) and the difference of its probabilities.

Both take ``x = log q - log p`` beside the probabilities, because ``q - p`` cancels where the two nearly agree.
"""

from __future__ import annotations

import torch

_MOST = 1e30  # finite in float32, so that its product with a probability of 0 is 0


def log_ratio(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """``log q - log p``; 0 where both probabilities are zero, since such an outcome adds nothing."""
    return torch.where((log_q == -torch.inf) & (log_p == -torch.inf), 0.0, log_q - log_p)


def expm1(x: torch.Tensor) -> torch.Tensor:
    """``e**x - 1`` without cancellation near 0, also where torch.compile computes it.

    Inductor's C++ replaces torch's own by ``exp(x) - 1``, which leaves nothing of a small x.
    """
    if not torch.compiler.is_compiling():
        return torch.expm1(x)
    near = x.abs() < 0.5
    small = torch.where(near, x, 0.0)
    series = torch.ones_like(small)
    for n in range(16, 1, -1):  # Horner's form; 0.5**16 / 17! is below float64's rounding
        series = 1 + small * series / n
    return torch.where(near, small * series, x.exp() - 1)


def expm1_(x: torch.Tensor) -> torch.Tensor:
    """:func:`expm1` of a tensor that nobody else needs, in its memory where nothing is compiled."""
    return expm1(x) if torch.compiler.is_compiling() else x.expm1_()


def bregman(p: torch.Tensor, q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``p * (expm1(x) - x)``, the terms of ``KL(p || q)``; +inf where q alone is zero, and q where p alone is.

    Where ``|x| > 1`` it is ``q - p * (1 + x)``: there is no cancellation there, and ``expm1`` would overflow or meet p = 0.
    """
    near = x.clamp(-1, 1)
    far = q - p * (1 + x.clamp_max(_MOST))  # x is +inf where p is 0
    return torch.where(x.abs() <= 1, p * (expm1(near) - near), far)


def difference(p: torch.Tensor, q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``q - p`` from the larger of the two, without cancellation."""
    return torch.maximum(p, q) * -expm1(-x.abs()) * x.sign()
