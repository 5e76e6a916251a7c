"""Device functions shared by the kernels: logits from products, and loss and gradient of one (token, vocabulary entry) pair.

In a form that does not cancel, with ``x = log p_s - log p_t``::

    forward   KL(t||s) = sum p_t (expm1(x) - x)     dKL/dz_s = p_t expm1(x)
    reverse   KL(s||t) = sum p_s (expm1(-x) + x)    dKL/dz_s = p_s (x - KL)
    jsd       sum m (beta phi(t/m - 1) + (1 - beta) phi(s/m - 1)),  phi(y) = (1 + y) log(1 + y) - y
              dJSD/dz_s = (1 - beta) p_s (log(s/m) - KL(s||m)),     m = beta t + (1 - beta) s

All are computed from the larger of the two probabilities and ``u = -|x|``: nothing overflows or cancels, and every term is >=
0. ``offset`` is the KL inside reverse's and jsd's gradients. Infinite logits follow the limits of these formulas, which
``reference/divergence.py`` states.

Clamps use ``tl.where``, because ``tl.maximum`` drops NaN, which must reach the token's loss.
"""

import triton
import triton.language as tl

from undo_kernels.triton.math import expm1, log1p, log1p_near, tanh

OWN = tl.constexpr(0)
FORWARD = tl.constexpr(1)
REVERSE = tl.constexpr(2)
JSD = tl.constexpr(3)

# Partial sums of one part of a token's logits.
M_S = tl.constexpr(0)
L_S = tl.constexpr(1)
M_T = tl.constexpr(2)
L_T = tl.constexpr(3)
CROSS_S = tl.constexpr(4)  # sum of e**u (u - v), u = z_s - its max, v = z_t - its max
ENERGY_T = tl.constexpr(5)  # sum of e**(z_t - max) (z_t - max)
TOP_S = tl.constexpr(6)
TOP_T = tl.constexpr(7)
DIFFERENCE = tl.constexpr(8)  # sum of e**u - e**v

LOWEST = tl.constexpr(-3.0e38)  # finite, so that a difference of two of them is 0 and not NaN
LARGE = tl.constexpr(1.0e30)


@triton.jit
def shape_logits(z, bias, inner, outer, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """``outer * tanh(inner * (z + bias))``: inner = scale / c, outer = c / temperature; uncapped, scale / temperature."""
    if HAS_BIAS:
        z += bias
    z *= inner
    if CAPPED:
        z = outer * tanh(z)
    return z


@triton.jit
def cut(x):
    """Returns ``x``, at least -200: it multiplies a probability that is 0 there, and 0 * inf would be NaN."""
    return tl.where(x < -200.0, -200.0, x)


@triton.jit
def log_difference(u, v, x):
    """Returns ``x``, the difference of logarithms ``u`` and ``v``, but 0 where both exponentials underflow; keeps NaN."""
    return tl.where((u < -87.0) & (v < -87.0), 0.0, x)


@triton.jit
def loss_and_slope(s, t, base_s, base_t, log_sum_s, log_sum_t, gap, offset, beta_t, beta_s, TARGET: tl.constexpr):
    """Returns the term of the divergence, jsd's term of KL(s||m), ``p_s``, and d divergence / d z_s.

    ``base`` is usually the token's maximum; ``gap`` is the difference of the logarithms of the sums of ``e**(z - base)``.
    """
    u_s = s - base_s
    log_s = u_s - log_sum_s
    if TARGET == OWN:
        p_s = tl.exp(log_s)
        value = p_s * 0.0
        mixed = value
        slope = value
    else:
        u_t = t - base_t
        log_t = u_t - log_sum_t
        # Subtract what is exact: s - t if the logits nearly agree; else u_s - u_t, small for probable entries.
        shift = base_s - base_t
        x = tl.where(tl.abs(shift) < 1.0, (s - t) - shift, u_s - u_t) - gap
        up = x > 0.0  # the student's probability is the larger one
        log_big = tl.where(up, log_s, log_t)
        if TARGET == FORWARD:  # noqa: SIM108
            x = log_difference(log_s, log_t, x)
        else:  # saves a register; a NaN still reaches the result through the token's offset
            x = tl.where(log_big < -87.0, 0.0, x)
        big = tl.exp(log_big)
        u = -tl.abs(x)
        if TARGET == JSD:
            u = cut(u)
        e, w, q = expm1(u)  # q is infinite where the smaller side is 0
        p_s = tl.where(up, big, big * e)
        if TARGET == JSD:
            low = tl.where(up, beta_t, beta_s)  # weights of the smaller and of the larger side in m
            high = tl.where(up, beta_s, beta_t)
            ratio = high + low * e  # m / big = 1 + low w
            l, h = log1p(low * w, ratio)  # log(m / big); m phi(big / m - 1) = big h
            y = high * w / ratio  # small / m - 1
            l_y, h_y, near = log1p_near(y)
            l_small = tl.where(near, l_y, u - l)  # log(small / m)
            phi = tl.where(near, ratio * (y * y - (1.0 + y) * h_y), e * l_small - high * w)
            phi = tl.where(phi < 0.0, 0.0, phi)
            h = tl.where(h < 0.0, 0.0, h)
            value = big * (high * h + low * phi)
            mixed = big * tl.where(up, h, phi)
            slope = beta_s * p_s * (tl.where(up, -l, l_small) - offset)
        else:
            # KL's term is big * q if the larger side is the first argument, else big * (e * u - w), rewritten where that
            # cancels.
            u = cut(u)
            other = tl.where(u > -0.34657359, u * u - q * (1.0 - u), e * u - w)
            if TARGET == FORWARD:
                value = big * tl.where(up, other, q)
                slope = big * tl.where(up, -w, w)
            else:
                value = big * tl.where(up, q, other)
                slope = p_s * (cut(x) - offset)
            mixed = value
    return value, mixed, p_s, slope


@triton.jit
def rescale_difference(rescale_s, rescale_t, shift):
    """Returns ``rescale_s - rescale_t`` without cancellation; ``shift`` is the difference of their logarithms."""
    _, w, _ = expm1(-tl.abs(shift))
    return tl.where(shift < 0.0, rescale_t * w, -rescale_s * w)


@triton.jit
def narrow(x, ptr):
    """Casts ``x`` to the dtype that ``ptr`` points to; float16 saturates instead of overflowing to infinity."""
    if ptr.dtype.element_ty == tl.float16:
        x = tl.where(x > 65504.0, 65504.0, x)
        x = tl.where(x < -65504.0, -65504.0, x)
    return x.to(ptr.dtype.element_ty)
