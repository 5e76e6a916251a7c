"""Elementary functions for the kernels, without libdevice, which the interpreter and AMD targets lack.

``e**u - 1`` and functions of it lose precision near zero, so those use polynomials there (Taylor's coefficients).

MATH says how exponentials, logarithms and reciprocals are computed:

    EXACT      to a few units in the last place of float32: for float32 inputs, and for softcaps too large for fast_tanh
    CUDA       NVIDIA's approximate instructions, one each, for 16-bit inputs. PTX documents a relative error of 2**-22 for
               ex2.approx and 2**-23 for rcp.approx, and 2**-22 for lg2.approx, absolute between 1/2 and 2.
    PORTABLE   base-2 functions and division of the compiler: for 16-bit inputs on other GPUs
    SIMULATED  the interpreter's, off by up to the errors that PTX documents, in a way that depends on the argument alone
"""

import triton
import triton.language as tl

EXACT = tl.constexpr(0)
CUDA = tl.constexpr(1)
PORTABLE = tl.constexpr(2)
SIMULATED = tl.constexpr(3)

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def disturbed(y, x, error: tl.constexpr):
    """Returns ``y`` off by at most ``error``, relatively; a hash of ``x`` decides by how much."""
    hashed = (x.to(tl.int32, bitcast=True) * 1640531527) >> 8
    return y * (1.0 + error * ((hashed & 65535).to(tl.float32) / 32767.5 - 1.0))


@triton.jit
def exp2(x, MATH: tl.constexpr):
    if MATH == CUDA:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    elif MATH == SIMULATED:
        y = disturbed(tl.exp2(x), x, 2.0**-22)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def reciprocal(x, MATH: tl.constexpr):
    if MATH == CUDA:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    elif MATH == SIMULATED:
        y = disturbed(1.0 / x, x, 2.0**-23)
    else:
        y = 1.0 / x
    return y


@triton.jit
def log(x, MATH: tl.constexpr):
    """Returns the natural logarithm."""
    if MATH == EXACT:
        y = tl.log(x)
    elif MATH == CUDA:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1) * LN2
    elif MATH == SIMULATED:
        y = disturbed(tl.log2(x), x, 2.0**-22) * LN2
    else:
        y = tl.log2(x) * LN2
    return y


@triton.jit
def exp(u, MATH: tl.constexpr):
    """Returns ``e**u``."""
    y = tl.exp(u) if MATH == EXACT else exp2(u * LOG2E, MATH)
    return y


@triton.jit
def divide(a, b, MATH: tl.constexpr):
    y = a / b if MATH == EXACT else a * reciprocal(b, MATH)
    return y


@triton.jit
def expm1(u, MATH: tl.constexpr):
    """``e = e**u``, ``w = e - 1`` and ``q = w - u >= 0`` for ``u <= 0``, none with cancellation."""
    near = u > -0.34657359
    r = tl.where(near, u, 0.0)
    y = r * (1.0 / 5040.0) + 1.0 / 720.0
    y = y * r + 1.0 / 120.0
    y = y * r + 1.0 / 24.0
    y = y * r + 1.0 / 6.0
    y = y * r + 0.5
    square = r * r * y
    e = exp(u, MATH)
    far = e - 1.0
    return e, tl.where(near, r + square, far), tl.where(near, square, far - u)


@triton.jit
def tanh(x):
    """Returns tanh from ``expm1(-2 |x|)``, which is accurate for small arguments."""
    _, w, _ = expm1(-2.0 * tl.abs(x), EXACT)
    y = w / (w + 2.0)  # -tanh |x|
    return tl.where(x < 0.0, y, -y)


@triton.jit
def fast_tanh(z, inner, MATH: tl.constexpr):
    """Returns the tanh of ``inner * z`` with an error of 3e-7 (not relative)."""
    return 1.0 - 2.0 * reciprocal(1.0 + exp2(z * (inner * (2.0 * LOG2E)), MATH), MATH)


@triton.jit
def fine_tanh(z, inner, MATH: tl.constexpr):
    """Returns the tanh of ``inner * z``; below 0.55 from a polynomial with a relative error of 4e-8 (fitted, not Taylor's)."""
    u = inner * z
    s = u * u
    y = s * 0.0164320088 - 0.0526680259
    y = y * s + 0.1332064333
    y = y * s - 0.3333294116
    return tl.where(tl.abs(u) < 0.55, u + u * s * y, fast_tanh(z, inner, MATH))


@triton.jit
def log1p_near(a, MATH: tl.constexpr):
    """``l = log(1 + a)`` and ``h = a - l >= 0`` without cancellation where ``near``: ``-0.26 < a < 0.35``; 0 elsewhere."""
    s = divide(a, a + 2.0, MATH)  # l = 2 s + 2 s**3 / 3 + ... and a - 2 s = a s
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
def log1p(a, b, MATH: tl.constexpr):
    """``l = log(1 + a)`` and ``h = a - l >= 0`` for ``a > -1``; ``b`` is ``1 + a``, if possible more exact than the sum."""
    l, h, near = log1p_near(a, MATH)
    far = log(tl.where(near, 1.0, b), MATH)
    return tl.where(near, l, far), tl.where(near, h, a - far)
