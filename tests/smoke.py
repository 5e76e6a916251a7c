"""Checks that an installed wheel computes with its C++ kernels: `python tests/smoke.py`, in an environment with only the wheel.

Run by `make dist` and by the workflow that builds wheels. Losses and gradients are compared with plain torch in float64, and
the noise with the reference backend, bit for bit.
"""

from pathlib import Path

import torch
import undo_kernels

from undo_core import ops

REPOSITORY = Path(__file__).resolve().parents[1]
LIMIT = 1e-4  # what the ops promise for float32 inputs whose KL is above 1e-3


def main() -> None:
    installed = Path(undo_kernels.__file__)
    assert REPOSITORY not in installed.parents or "site-packages" in installed.parts, (
        f"{installed} is the checkout, not a wheel"
    )
    assert (installed.parent / "py.typed").is_file()
    missing = undo_kernels.unavailable().get("cpu")
    assert missing is None, missing

    torch.manual_seed(0)
    tokens, width, vocabulary = 256, 64, 4096  # enough that the C++ plan is chosen over plain torch
    hidden, teacher_hidden = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    weight, teacher_weight = torch.randn(vocabulary, width, requires_grad=True), torch.randn(vocabulary, width)

    with undo_kernels.recorded() as calls:
        loss = ops.linear_kl_div(hidden, weight, teacher_hidden, teacher_weight, temperature=4.0)
        gradients = torch.autograd.grad(loss, (hidden, weight))
    assert {call.backend for call in calls} == {"cpu"}, calls

    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    student = (wide[0] @ wide[1].T / 4.0).log_softmax(-1)
    teacher = (teacher_hidden.double() @ teacher_weight.double().T / 4.0).log_softmax(-1)
    exact = (teacher.exp() * (teacher - student)).sum(-1).mean()
    pairs = zip((loss, *gradients), (exact, *torch.autograd.grad(exact, wide)), strict=True)
    errors = [((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs]
    assert max(errors) < LIMIT, errors

    noised = {}
    for backend in ("cpu", "reference"):
        noised[backend] = torch.ones(64, 64)
        with undo_kernels.backend(backend):
            ops.noise_({"weight": noised[backend]}, alpha=0.5, beta=1.0, seed=0)
    assert noised["cpu"].equal(noised["reference"])

    form = ", ".join(sorted({call.form for call in calls}))
    print(f"torch {torch.__version__}: C++ kernels ({form}) agree with float64 to {max(errors):.1e}; noise is bit-equal")


if __name__ == "__main__":
    main()
