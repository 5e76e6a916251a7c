"""Random calls of the C++ ops, each compared with the reference: shapes from nothing to primes, strides, masks, dtypes, hard values.

A call is a function of its seed. ``python tests/support/random_calls.py FIRST COUNT [EXTENSION]`` makes the calls of so many seeds, with
the kernels of another file if one is named, such as those that were compiled with a sanitizer.
"""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))
    import torch  # first, because the kernels use its OpenMP

    if len(sys.argv) > 3:  # found by undo_kernels, which is imported below, in the place of its own
        specification = importlib.util.spec_from_file_location("undo_kernels._cpu", sys.argv[3])
        sys.modules["undo_kernels._cpu"] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(sys.modules["undo_kernels._cpu"])

import pytest
import random_losses
import torch
import undo_kernels
from random_draws import DTYPES, Draw, bits
from rounding import assert_as_exact_as, compare_lazily, gamma, unit
from undo_kernels import cpu, ops
from undo_kernels.library.backends import implementation_on
from undo_kernels.noise_segments import Segment

COUNTS = (0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 255, 1021, 1025, 4099)
FARTHEST = (
    0,
    1,
    3,
    1021,
    2**31 - 5,
    2**32 + 3,
    2**40 + 1,
    2**57,
)  # flat indices: the counter has 56 bits, for four elements each
SMALL_TILES = (128, 384, 8192)


def check_noise(d):
    """In-place noise on segments of a parameter: the bits of the reference."""
    dtype = d.choose("dtype", (*DTYPES, torch.float64))
    stochastic = d.often(0.5, "stochastic")
    segments = []
    for number in range(d.choose("segments", (1, 1, 2, 5))):
        run, law = d.choose("run", (0, 1, 3, 64, 1000)), d.choose("law", ("uniform", "normal", "constant", "elements"))
        count = d.choose(
            "count", [n for n in COUNTS if not run or n <= 20 * run]
        )  # the reference takes a millisecond for each run
        theta = d.normal(count) * d.choose("size", (1.0, 1e-3, 1e4))
        theta = d.spoiled(theta, d.choose("values", ("zero", "subnormal", "infinite", "NaN")), 0.1)
        first = 0 if law == "elements" else d.choose("first", FARTHEST)
        stride = run + (0 if law == "elements" else d.choose("gap", (0, 1, 5, 2**33)))
        target = d.normal(count) if law == "elements" else None
        scale = d.choose("scale", (0.0, 0.3 / 2**24 if law == "uniform" else 0.3, 1e30))
        keep = d.choose("keep", (0.0, 0.7, 1.0))
        placed = d.placed("theta", theta.to(dtype), ("whole", "odd elements", "odd bytes"))
        segments.append(Segment(placed, f"w{number}", law, keep, scale, first, run, stride, target))
    copies = [Segment(**{**vars(one), "tensor": one.tensor.clone()}) for one in segments]
    seed = d.random.randrange(2**64)
    sums = implementation_on("noise_", "cpu")(segments, seed, stochastic)
    wanted = implementation_on("noise_", "reference")(copies, seed, stochastic)
    for got, want in zip(segments, copies, strict=True):
        same = bits(got.tensor) == bits(want.tensor)
        nan = (got.tensor.isnan() & want.tensor.isnan()).repeat_interleave(got.tensor.itemsize)  # whose payload is free
        assert (same | nan).all(), f"{got.name}: other bits"
    assert_as_exact_as(sums, wanted, wanted, gamma(max(COUNTS), torch.float64), "sums of squares")


def check_rmu(d):
    """RMU's loss: value and gradient against the reference in float64."""
    tokens, width = d.choose("tokens", random_losses.TOKENS), d.choose("width", [w for w in COUNTS if w])
    leading = (tokens,) if tokens % 2 else (2, tokens // 2)
    values = d.choose("values", ("normal", "normal", "zero", "subnormal", "infinite", "NaN"))
    normalize, own = d.choose("normalize", ("all", "masked", "sequence")), d.often(0.5, "own targets")
    if normalize == "sequence" and len(leading) < 1:
        normalize = "all"
    tensors = [d.normal(tokens, width).view(*leading, width), d.normal(*((*leading, width) if own else (width,)))]
    if values != "normal":
        tensors = [d.spoiled(t, values, 0.1 if values in ("zero", "subnormal") else 0.3 / (t.numel() + 1)) for t in tensors]
    kinds = [d.choose("dtype", DTYPES), d.choose("target's dtype", (*DTYPES, torch.float64))]
    hidden, target = (d.placed(name, t.to(kind)) for name, t, kind in zip(("hidden", "target"), tensors, kinds, strict=True))
    mask = random_losses._mask(d, tokens)
    options = {"coefficient": d.choose("coefficient", (1.0, 6.5, -1e-3)), "normalize": normalize}
    options["mask"] = None if mask is None else mask.view(leading)

    def run(backend, hidden, target):
        hidden = hidden.requires_grad_()
        with undo_kernels.backend(backend):
            loss = ops.rmu_loss(hidden, target, **options)
            return loss.detach(), torch.autograd.grad(1.5 * loss, hidden)[0]

    before = bits(hidden).clone()
    want = run("reference", hidden.double(), target.double())
    copy = hidden.clone()
    got = run("cpu", hidden, target)
    assert torch.equal(bits(hidden), before), "hidden was written to"
    terms = hidden.detach().double().abs() + abs(options["coefficient"]) * target.double().abs()
    finite = float(terms.nan_to_num(0, 0, 0).norm())
    stored = {torch.float32: 0.0, torch.bfloat16: 4, torch.float16: 2}[hidden.dtype] * unit(hidden.dtype)
    share = 3.0 * finite / width / (1 if mask is not None and normalize != "all" else max(tokens, 1))
    tiny = torch.finfo(hidden.dtype).smallest_normal * unit(hidden.dtype) * 2 * hidden.numel()

    def compare(plain):
        assert_as_exact_as(got[0], plain[0], want[0], gamma(8 + 2048), "loss")
        assert_as_exact_as(got[1], plain[1], want[1], gamma(8) + stored, "gradient", scale=share + tiny)

    compare_lazily(compare, want, lambda: run("reference", copy, target))


KINDS = {"losses": random_losses.check, "noise": check_noise, "rmu": check_rmu}
SHARES = ("losses", "losses", "losses", "losses", "noise", "noise", "rmu")


def check(seed):
    """Makes the call of a seed; returns its kind. A failure's message holds the seed and the call."""
    d = Draw(seed)
    kind = d.random.choice(SHARES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNDO_CPU_ISA", d.choose("instruction set", (*cpu.vector_units(), *cpu.bfloat16_products())))
        patch.setattr(cpu.plan, "_BLOCK_V", d.choose("tile", SMALL_TILES))
        try:
            KINDS[kind](d)
        except Exception as error:
            raise AssertionError(f"{kind}, {d}\n{type(error).__name__}: {error}") from error
    return kind


def main(first, count, extension=None):
    """Makes the calls of the seeds from ``first`` on; prints how many of each kind there were."""
    assert extension in (None, cpu.extension.kernels.__file__), f"other kernels were loaded: {cpu.extension.kernels.__file__}"
    print(dict(Counter(check(seed) for seed in range(int(first), int(first) + int(count)))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
