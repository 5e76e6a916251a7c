"""Bounds of rounding errors, derived rather than observed, so that they hold on every processor and with every torch.

The instruction set, the number of threads and the library decide in which order a sum is formed and whether products are fused.
None of them can leave these bounds (Higham, "Accuracy and Stability of Numerical Algorithms", sections 3.1 and 4.2):

- one operation is right to ``u``, half the distance of neighbouring numbers: 2**-24 in float32;
- a sum, or an inner product, of n terms in any order is within ``gamma(n) = n u / (1 - n u)`` times the sum of the terms'
  magnitudes;
- the exponential of an x that carries the absolute error e is relatively wrong by e, plus what the library's ``exp`` adds.
"""

import torch

EXPONENTIAL = 8  # units of rounding that any exp, expm1, log, log1p or tanh in use may be off by; libraries promise 4 or fewer


def unit(dtype=torch.float32):
    """Largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def gamma(terms, dtype=torch.float32):
    """Bound on the error of a sum of so many terms, relative to the sum of their magnitudes."""
    product = terms * unit(dtype)
    assert product < 0.5, "too many terms for this dtype"
    return product / (1 - product)


def probability_error(hidden, weight, terms=128):
    """Bound on the relative error of a softmax probability of ``softcap(scale * hidden @ weight.T + bias)`` with float32 sums.

    A logit errs by ``gamma(d)`` times the product of the magnitudes, and by a few units of its size in bias, scale, softcap and
    temperature. The probability takes that error from its own logit and once more from the log-sum-exp, together with the
    exponential's and that of a sum of ``terms`` exponentials (128 in the C++ kernels, which go on in float64).
    """
    hidden, weight = hidden.detach().double().abs(), weight.detach().double().abs()
    largest = float((hidden @ weight.T).max()) if hidden.numel() else 0.0
    logit = gamma(hidden.shape[-1] + 8 + EXPONENTIAL) * (largest + 1)
    return 2 * logit + gamma(terms + 2 * EXPONENTIAL)


def relative(got, want):
    """Frobenius norm of the error over that of ``want``."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))


def error(got, want):
    """Frobenius norm of the error."""
    return float((got.double() - want.double()).norm())


def assert_as_exact_as(got, yardstick, want, floor, name="", scale=0.0, factor=2.0):
    """``got`` errs at most ``factor`` times as much as ``yardstick``, torch's own result in the same dtype, plus what rounding
    may do.

    That is ``floor``, relative to the norm of ``want`` or to ``scale``, the norm of what ``want`` is a difference of. It is
    needed where torch happens to be exact. Infinities and NaN are compared by place.
    """
    got, yardstick, want = got.detach().double(), yardstick.detach().double(), want.detach().double()
    assert got.shape == want.shape, (name, got.shape, want.shape)
    assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaN in {got}, wanted in {want}"
    infinite = want.isinf()
    assert torch.equal(got.isinf(), infinite), f"{name}: infinite in {got}, wanted in {want}"
    assert torch.equal(got[infinite], want[infinite]), f"{name}: signs of infinities"
    finite = want.isfinite()
    if not finite.any():
        return
    yardstick = torch.where(yardstick.isfinite(), yardstick, want)  # torch is not a yardstick if it overflows
    ours, theirs = error(got[finite], want[finite]), error(yardstick[finite], want[finite])
    floor = floor * max(float(want[finite].norm()), scale)
    assert ours <= factor * theirs + floor, f"{name}: error {ours:.3g}, wanted at most {factor} * {theirs:.3g} + {floor:.3g}"


def difference_form_error(z_s, z_t, terms=128):
    """Elementwise bound on the error of a divergence's gradient that is formed from the difference of given float32 logits.

    The maxima are subtracted with one rounding, u and v; their difference x and the gap of the log-sum-exps with another each.
    The gap is a mean of x under the probabilities, so it errs by the mean of x's errors and by those of its sums, and so does
    the KL that reverse KL and JSD subtract. A probability errs by u's error under the exponential.
    """
    s, t = (z.double().log_softmax(-1) for z in (z_s, z_t))
    away = sum((z.double() - z.double().amax(-1, keepdim=True)).abs() for z in (z_s, z_t))
    x, p = (s - t).abs(), torch.maximum(s, t).exp()
    each = 3 * unit() * (away + x) + (gamma(terms + 4 * EXPONENTIAL) + unit() * away) * x
    return 2 * p * (each + (p * each).sum(-1, keepdim=True))


PATH = 512  # roundings on the longest path through a tiny model and back: layers, inner products of up to 64 terms, softmaxes


def assert_same_function(got, plain, want, name=""):
    """``got`` and ``plain`` are float32 results of one function of a tiny model, computed in two ways; ``want`` is ``plain`` in
    float64.

    Neither way is the more exact one, so ``got`` may err twice as much as ``plain`` does, and by as many roundings as a path
    through such a model has. Each may be a tensor, a number, or a sequence of tensors, whose errors are measured together.
    """
    got, plain, want = (_flat(value) for value in (got, plain, want))
    assert_as_exact_as(got, plain, want, gamma(PATH), name)


PATH_16 = 32  # results on that path that are rounded to 16 bits; the sums inside products are not


def assert_same_training(got, other, start, steps, dtype=torch.float32):
    """``got`` and ``other`` are parameters that steps of SGD, which is linear in the gradient, made of ``start``, with
    roundings of their own.

    Both gradients err by the roundings of a path through a tiny model; each step is rounded into the weight.
    """
    got, other, start = (_flat(value).double() for value in (got, other, start))
    moved = float((other - start).norm())
    path = gamma(PATH) if dtype == torch.float32 else gamma(PATH_16, dtype)
    allowed = 2 * path * moved + 2 * steps * unit() * float(other.norm())
    assert moved > 4 * steps * unit() * float(start.norm()), "the steps are too small to see a difference"
    assert error(got, other) <= allowed, f"error {error(got, other):.3g} of a movement of {moved:.3g}, wanted {allowed:.3g}"


def _flat(value):
    if isinstance(value, torch.Tensor | float):
        return torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor) else torch.float64).detach().flatten()
    return torch.cat([tensor.detach().flatten() for tensor in value])


def assert_rounded(got, want, magnitude, terms=4):
    """Every element of ``got`` is ``want`` up to float32 roundings of a sum whose terms' magnitudes add up to ``magnitude``."""
    allowed = gamma(terms) * torch.as_tensor(magnitude).double() + torch.finfo(torch.float32).tiny
    off = (got.detach().double() - want.double()).abs()
    assert (off <= allowed).all(), f"error {float((off - allowed).max()):.3g} above what {terms} roundings allow"


def compare_lazily(compare, want, run_plain):
    """Calls ``compare(yardstick)`` with an exact yardstick, and only if that fails with torch's own result, which takes time."""
    try:
        compare(want)
    except AssertionError:
        compare(run_plain())
