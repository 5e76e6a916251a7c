"""Elementary functions for the kernels, without libdevice, which the interpreter and AMD targets lack.

``tl.exp`` is accurate to a few units in the last place, but ``e**u - 1`` and functions of it lose precision near zero, so those
use polynomials there. Coefficients are Taylor's; the first omitted term is below 1e-8 of the result.
"""

import triton
import triton.language as tl


@triton.jit
def expm1(u):
    """``e = e**u``, ``w = e - 1`` and ``q = w - u >= 0`` for ``u <= 0``, none with cancellation."""
    near = u > -0.34657359
    r = tl.where(near, u, 0.0)
    y = r * (1.0 / 5040.0) + 1.0 / 720.0
    y = y * r + 1.0 / 120.0
    y = y * r + 1.0 / 24.0
    y = y * r + 1.0 / 6.0
    y = y * r + 0.5
    square = r * r * y
    e = tl.exp(u)
    far = e - 1.0
    return e, tl.where(near, r + square, far), tl.where(near, square, far - u)


@triton.jit
def tanh(x):
    """Returns tanh from ``expm1(-2 |x|)``, which is accurate for small arguments."""
    _, w, _ = expm1(-2.0 * tl.abs(x))
    y = w / (w + 2.0)  # -tanh |x|
    return tl.where(x < 0.0, y, -y)


@triton.jit
def log1p_near(a):
    """``l = log(1 + a)`` and ``h = a - l >= 0`` without cancellation where ``near``: ``-0.26 < a < 0.35``; 0 elsewhere."""
    s = a / (a + 2.0)  # l = 2 s + 2 s**3 / 3 + ... and a - 2 s = a s
    near = tl.abs(s) < 0.15
    s = tl.where(near, s, 0.0)
    s2 = s * s
    y = s2 * (2.0 / 11.0) + 2.0 / 9.0
    y = y * s2 + 2.0 / 7.0
    y = y * s2 + 2.0 / 5.0
    y = y * s2 + 2.0 / 3.0
    h = s * (a - s2 * y)
    return a - h, h, near


@triton.jit
def log1p(a, b):
    """``l = log(1 + a)`` and ``h = a - l >= 0`` for ``a > -1``; ``b`` is ``1 + a``, if possible more exact than the sum."""
    l, h, near = log1p_near(a)
    far = tl.log(tl.where(near, 1.0, b))
    return tl.where(near, l, far), tl.where(near, h, a - far)
