"""Device functions of one (token, vocabulary entry) pair: its logits from products, and its loss and gradient.

A logit is ``unit * outer * q``. ``q`` is what a product turns into by bias, scale and softcap; ``outer`` is a constant of the call::

    no softcap   q = product + bias                        outer = scale / (temperature unit)
    softcap c    q = tanh(scale (product + bias) / c)      outer = c / (temperature unit)

With EXACT functions (see math.py) the unit is 1. Else it is log 2, so that exponentials are ex2 instructions, and
``tanh u = 1 - 2 / (1 + e**2u)`` takes one exponential and one reciprocal. It errs by 3e-7, which is too much for the difference of
two near logits. Where both sides are shaped alike (SAME) that is formed as ``tanh(a - b) (1 - tanh a tanh b)``, with a polynomial;
else the loss kernels (FINE) use a polynomial for the tanh of small logits. The cap itself is the base of the exponentials, where
they cannot underflow (BOUNDED): no running maximum.

The divergences, in a form that does not cancel, with ``x = log p_s - log p_t``::

    forward   KL(t||s) = sum p_t (expm1(x) - x)     dKL/dz_s = p_t expm1(x)
    reverse   KL(s||t) = sum p_s (expm1(-x) + x)    dKL/dz_s = p_s (x - KL)
    jsd       sum m (beta phi(t/m - 1) + (1 - beta) phi(s/m - 1)),  phi(y) = (1 + y) log(1 + y) - y
              dJSD/dz_s = (1 - beta) p_s (log(s/m) - KL(s||m)),     m = beta t + (1 - beta) s
              for x near 0: log(s/m) = x - K(x) and the sum's term m (x K'(x) - K(x)), K(x) = log(beta + (1 - beta) e**x)

``offset`` is the KL inside reverse's and jsd's gradients. ``x`` comes from the difference of the ``q`` of both sides (SAME:
multiplied by the one ``outer`` that they share), or of the products, so a student that is its teacher gets exactly 0: a difference of two products
would be contracted to a fused multiply-add on a GPU, which leaves half a unit in the last place. Nothing overflows or cancels,
and every term is >= 0. Infinite logits follow the limits of these formulas, which ``reference/divergence.py`` states.

Clamps use ``tl.where``, because ``tl.maximum`` drops NaN, which must reach the token's loss.
"""

import triton
import triton.language as tl

from undo_kernels.triton.math import EXACT, LN2, LOG2E, divide, exp2, expm1, fast_tanh, fine_tanh, log, log1p, log1p_near, tanh

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
def squash(z, side, FINE: tl.constexpr):
    """Returns ``q`` of a product with its bias; ``side``: Logits or Head."""
    if side.CAPPED:
        if side.MATH == EXACT:
            z = tanh(side.inner * z)
        elif FINE:
            z = fine_tanh(z, side.inner, side.MATH)
        else:
            z = fast_tanh(z, side.inner, side.MATH)
    return z


@triton.jit
def natural(q, side):
    """Returns the logit of ``q``."""
    outer = side.outer
    if side.MATH != EXACT:
        outer *= LN2
    return outer * q


@triton.jit
def cut(x):
    """Returns ``x``, at least -200: it multiplies a probability that is 0 there, and 0 * inf would be NaN."""
    return tl.where(x < -200.0, -200.0, x)


@triton.jit
def log_difference(u, v, x):
    """Returns ``x``, the difference of logarithms ``u`` and ``v``, but 0 where both exponentials underflow; keeps NaN."""
    return tl.where((u < -87.0) & (v < -87.0), 0.0, x)


@triton.jit
def difference(z_s, z_t, q_s, q_t, student, teacher, apart, form):
    """Returns the logits' difference less ``apart``; the products with their bias, ``z``, only serve approximate instructions."""
    if not form.SAME:
        x = natural(q_s, student) - natural(q_t, teacher) - apart
    else:
        x = natural(q_s - q_t, student) - apart
        if student.CAPPED and student.MATH != EXACT:  # tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b)
            w = z_s - z_t
            s = w * w
            gain = natural(student.inner, student)
            square = student.inner * student.inner
            y = gain + s * (gain * square * (-1.0 / 3.0) + s * (gain * square * square * (2.0 / 15.0)))  # off by 2e-5 at most
            near = tl.abs(w) < 0.25 / tl.abs(student.inner)
            x = tl.where(near, (w * y) * (1.0 - q_s * q_t) - apart, x)
    return x


@triton.jit
def loss_and_slope(
    z_s, z_t, q_s, q_t, student, teacher, base_s, base_t, log_sum_s, log_sum_t, gap, offset, beta_t, beta_s, form
):  # fmt: skip
    """Returns the term of the divergence, jsd's term of KL(s||m), ``p_s``, and d divergence / d z_s.

    ``base`` is usually the token's maximum; ``gap`` is the difference of the logarithms of the sums of ``e**(z - base)``.
    """
    if student.MATH == EXACT:
        value, mixed, p_s, slope = exact_loss(
            q_s, q_t, student, teacher, base_s, base_t, log_sum_s, log_sum_t, gap, offset, beta_t, beta_s, form
        )
    else:
        value, mixed, p_s, slope = fast_loss(
            z_s, z_t, q_s, q_t, student, teacher, base_s, base_t, log_sum_s, log_sum_t, gap, offset, beta_t, beta_s, form
        )
    return value, mixed, p_s, slope


@triton.jit
def exact_loss(
    q_s, q_t, student, teacher, base_s, base_t, log_sum_s, log_sum_t, gap, offset, beta_t, beta_s, form
):  # fmt: skip
    s = student.outer * q_s
    u_s = s - base_s
    log_s = u_s - log_sum_s
    if form.TARGET == OWN:
        p_s = tl.exp(log_s)
        value = p_s * 0.0
        mixed = value
        slope = value
    else:
        shift = base_s - base_t
        if form.UNIFORM:
            u_t = tl.zeros_like(q_s) - base_t  # not 0 * q_s, which is NaN for an infinite logit
            d = s - shift
        else:
            u_t = teacher.outer * q_t - base_t
            d = difference(q_s, q_t, q_s, q_t, student, teacher, shift, form)
        log_t = u_t - log_sum_t
        # Subtract what is exact: the logits if they nearly agree; else u_s - u_t, small for probable entries.
        x = tl.where(tl.abs(shift) < 1.0, d, u_s - u_t) - gap
        up = x > 0.0  # the student's probability is the larger one
        log_big = tl.where(up, log_s, log_t)
        if form.TARGET == FORWARD:  # noqa: SIM108
            x = log_difference(log_s, log_t, x)
        else:  # saves a register; a NaN still reaches the result through the token's offset
            x = tl.where(log_big < -87.0, 0.0, x)
        big = tl.exp(log_big)
        u = -tl.abs(x)
        if form.TARGET == JSD:
            value, mixed, p_s, slope = jsd_loss(big, up, cut(u), offset, beta_t, beta_s, student.MATH)
        else:
            e, w, q = expm1(u, EXACT)  # q is infinite where the smaller side is 0
            p_s = tl.where(up, big, big * e)
            # KL's term is big * q if the larger side is the first argument, else big * (e * u - w), rewritten where that
            # cancels.
            u = cut(u)
            other = tl.where(u > -0.34657359, u * u - q * (1.0 - u), e * u - w)
            if form.TARGET == FORWARD:
                value = big * tl.where(up, other, q)
                slope = big * tl.where(up, -w, w)
            else:
                value = big * tl.where(up, q, other)
                slope = p_s * (cut(x) - offset)
            mixed = value
    return value, mixed, p_s, slope


@triton.jit
def fast_loss(
    z_s, z_t, q_s, q_t, student, teacher, base_s, base_t, log_sum_s, log_sum_t, gap, offset, beta_t, beta_s, form
):  # fmt: skip
    """With approximate instructions and logarithms to base 2; near 0, polynomials whose first omitted term is below 2e-5."""
    FINITE: tl.constexpr = student.CAPPED and (form.UNIFORM or teacher.CAPPED)  # no logit is infinite
    log_s = student.outer * q_s - (base_s + log_sum_s)
    if form.TARGET == OWN:
        p_s = exp2(log_s, student.MATH)
        value = p_s * 0.0
        mixed = value
        slope = value
    else:
        apart = ((base_s - base_t) + gap) * LN2
        if form.UNIFORM:
            log_t = tl.zeros_like(q_s) - (base_t + log_sum_t)
            x = natural(q_s, student) - apart
        else:
            log_t = teacher.outer * q_t - (base_t + log_sum_t)
            x = difference(z_s, z_t, q_s, q_t, student, teacher, apart, form)
        near = tl.abs(x) < 0.25
        if form.TARGET == JSD:
            up = x > 0.0
            log_big = tl.where(up, log_s, log_t)
            if not FINITE:
                x = tl.where(log_big < -126.0, 0.0, x)
            big = exp2(log_big, student.MATH)
            u = -tl.abs(x)
            if not FINITE:
                u = cut(u)
            if form.EXTREME:
                value, mixed, p_s, slope = jsd_loss(big, up, u, offset, beta_t, beta_s, student.MATH)
            else:
                value, mixed, p_s, slope = fast_jsd(big, up, near, x, u, offset, beta_t, beta_s, student.MATH)
        else:
            p_s = exp2(log_s, student.MATH)
            p_t = exp2(log_t, student.MATH)
            far = p_s - p_t
            if form.TARGET == FORWARD:
                product = p_t * x
                if not FINITE:
                    product = tl.where(p_t == 0.0, 0.0, product)
                bend = p_t * (x * x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0)))))  # p_t (expm1(x) - x)
                slope = tl.where(near, product + bend, far)
                value = tl.where(near, bend, far - product)
            else:
                product = p_s * x
                if not FINITE:
                    product = tl.where(p_s == 0.0, 0.0, product)
                bend = p_s * (x * x * (0.5 - x * (1.0 / 6.0 - x * (1.0 / 24.0 - x * (1.0 / 120.0)))))  # p_s (expm1(-x) + x)
                value = tl.where(near, bend, product - far)
                slope = product - p_s * offset
            mixed = value
    return value, mixed, p_s, slope


@triton.jit
def fast_jsd(big, up, near, x, u, offset, beta_t, beta_s, MATH: tl.constexpr):
    """:func:`jsd_loss` for weights of both sides that are not close to 0; its logarithm errs by 2**-22, not relatively.

    ``x`` is the difference of the logarithms, ``near`` whether it is below 0.25, and ``u`` is ``-|x|``.
    """
    e = exp2(u * LOG2E, MATH)
    p_s = tl.where(up, big, big * e)
    low = tl.where(up, beta_t, beta_s) * e
    ratio = tl.where(up, beta_s, beta_t) + low  # m / big
    m = big * ratio
    l = log(ratio, MATH)
    # The cumulants of a variable that is 1 with probability beta_s, else 0: K's derivatives at 0.
    k2 = beta_s * beta_t
    k3 = k2 * (beta_t - beta_s)
    k4 = k2 * (1.0 - 6.0 * k2)
    k5 = k3 * (1.0 - 12.0 * k2)
    log_ratio = x * (beta_t - x * (k2 * 0.5 + x * (k3 * (1.0 / 6.0) + x * (k4 * (1.0 / 24.0)))))  # log(s/m)
    log_ratio = tl.where(near, log_ratio, tl.where(up, 0.0, u) - l)
    value = m * (x * x * (k2 * 0.5 + x * (k3 * (1.0 / 3.0) + x * (k4 * 0.125 + x * (k5 * (1.0 / 30.0))))))
    value = tl.where(near, value, big * low * u - m * l)
    a = log_ratio
    mixed = p_s * (a * a * (0.5 - a * (1.0 / 6.0 - a * (1.0 / 24.0 - a * (1.0 / 120.0)))))  # p_s (expm1(-a) + a)
    mixed = tl.where(near, mixed, p_s * (a - 1.0) + m)
    slope = beta_s * p_s * (log_ratio - offset)
    return value, mixed, p_s, slope


@triton.jit
def jsd_loss(big, up, u, offset, beta_t, beta_s, MATH: tl.constexpr):
    """From the larger probability, whether it is the student's, and ``u = -|log p_s - log p_t|``."""
    e, w, _ = expm1(u, MATH)
    p_s = tl.where(up, big, big * e)
    low = tl.where(up, beta_t, beta_s)  # weights of the smaller and of the larger side in m
    high = tl.where(up, beta_s, beta_t)
    ratio = high + low * e  # m / big = 1 + low w
    l, h = log1p(low * w, ratio, MATH)  # log(m / big); m phi(big / m - 1) = big h
    y = divide(high * w, ratio, MATH)  # small / m - 1
    l_y, h_y, near = log1p_near(y, MATH)
    l_small = tl.where(near, l_y, u - l)  # log(small / m)
    phi = tl.where(near, ratio * (y * y - (1.0 + y) * h_y), e * l_small - high * w)
    phi = tl.where(phi < 0.0, 0.0, phi)
    h = tl.where(h < 0.0, 0.0, h)
    value = big * (high * h + low * phi)
    mixed = big * tl.where(up, h, phi)
    slope = beta_s * p_s * (tl.where(up, -l, l_small) - offset)
    return value, mixed, p_s, slope


@triton.jit
def add_block(q, keep, side, o_v, m, l, energy, top, STATISTICS: tl.constexpr):
    """Adds a block ``[lanes, entries]`` to each lane's maximum and sums, with approximate instructions.

    Returns the exponentials, the rescaling of the old sums, and the new sums. Where the logits are BOUNDED
    by a softcap the base of the exponentials is the cap, and ``m`` stays there.
    """
    b_y = tl.where(keep, side.outer * q, float("-inf"))
    if side.BOUNDED:
        b_e = exp2(b_y - side.outer, side.MATH)
        rescale = 1.0
        l += tl.sum(b_e, 1)
    else:
        here = tl.max(b_y, 1)
        m_new = tl.maximum(m, here)
        rescale = exp2(m - m_new, side.MATH)
        b_low = b_y - m_new[:, None]
        b_e = exp2(b_low, side.MATH)
        if STATISTICS:
            at = tl.min(tl.where(b_y == here[:, None], o_v, 2147483647), 1)
            top = tl.where(here > m, at, top)
            # Logits are relative to the maximum, so when it rises by a shift, shift * sum is subtracted.
            energy = (energy - l * (m_new - m)) * rescale + tl.sum(b_e * cut(b_low), 1)
        l = l * rescale + tl.sum(b_e, 1)
        m = m_new
    return b_e, rescale, m, l, energy, top


@triton.jit
def add_cross(b_e, q_s, q_t, student, teacher, SAME: tl.constexpr):
    """Returns each lane's sum of ``e**(z_s - base) (z_s - z_t)``, in units."""
    b_d = student.outer * (q_s - q_t) if SAME else student.outer * q_s - teacher.outer * q_t
    return tl.sum(tl.where(b_e == 0.0, 0.0, b_e * b_d), 1)


@triton.jit
def rescale_difference(rescale_s, rescale_t, shift):
    """Returns ``rescale_s - rescale_t`` without cancellation; ``shift`` is the difference of their logarithms."""
    _, w, _ = expm1(-tl.abs(shift), EXACT)
    return tl.where(shift < 0.0, rescale_t * w, -rescale_s * w)


@triton.jit
def narrow(x, ptr):
    """Casts ``x`` to the dtype that ``ptr`` points to; float16 saturates instead of overflowing to infinity."""
    if ptr.dtype.element_ty == tl.float16:
        x = tl.where(x > 65504.0, 65504.0, x)
        x = tl.where(x < -65504.0, -65504.0, x)
    return x.to(ptr.dtype.element_ty)
