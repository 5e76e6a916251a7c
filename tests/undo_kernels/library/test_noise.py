"""The noise as a torch.library op."""

import torch
from undo_kernels import backend

from undo_core import ops


def test_opcheck_of_the_noise():
    tensors = [torch.randn(3, 4), torch.randn(5).bfloat16(), torch.randn(2)]
    options = {
        "names": ["a", "b", "c"], "laws": ["uniform", "normal", "elements"], "keep": [0.5, 0.5, 0.5], "scale": [1e-9, 0.1, 0.5],
        "first": [0, 0, 0], "run": [0, 0, 0], "stride": [0, 0, 0], "seed": -1, "stochastic_rounding": True, "backend": "cpu",
    }  # fmt: skip
    torch.library.opcheck(torch.ops.undo.noise_.default, (tensors, [None, None, torch.ones(2)]), options)


def test_the_noise_of_the_largest_seed_is_that_of_the_reference():
    results = []
    for name in ("cpu", "reference"):
        tensor = torch.ones(7, 5)
        with backend(name):
            ops.noise_({"w": tensor}, alpha=0.5, beta=1.0, seed=2**64 - 1)
        results.append(tensor)
    assert torch.equal(*results) and not torch.equal(results[0], torch.full((7, 5), 0.5))
