"""The promise of the difference form: as a student approaches its teacher, from a KL of 1 to 1e-6, the errors do not grow.

Problems with their float64 answers, the errors of a result, and the limits that DESIGN's contract on numerics sets.
"""

from dataclasses import dataclass

import torch
from rounding import relative
from vocab_losses import divergence, gradients, logits

KINDS = ("forward", "reverse", "jsd")
SOFTCAP = 30.0
SIZES = (
    4.0,
    2.0,
    1.0,
    0.4,
    0.1,
    0.03,
    0.01,
    0.003,
    0.0015,
)  # of the student's distance, in norms of the teacher's hidden states
LOSS_LIMIT = 1e-3
LOSS_SCALE = 65536  # that of mixed-precision training: float16's own range ends before these gradients do


def gradient_limit(dtype, kl):
    return 0.01 if dtype != torch.float32 else 1e-4 if kl >= 1e-3 else 3e-3


@dataclass(frozen=True)
class Near:
    """A student near its teacher, who share a head.

    Attributes:
        kl: mean divergence in float64.
        hidden, weight, teacher: inputs in the dtype of the problem.
        gradients: of LOSS_SCALE times the divergence for hidden states and weight, in float64.
    """

    kl: float
    hidden: torch.Tensor
    weight: torch.Tensor
    teacher: torch.Tensor
    gradients: list[torch.Tensor]

    def errors(self, loss, scale=LOSS_SCALE):
        """Relative errors of loss and gradients of ``loss(hidden, weight)``; an error of 1 for a negative loss."""
        leaves = [tensor.clone().requires_grad_() for tensor in (self.hidden, self.weight)]
        got = loss(*leaves)
        found = [gradient.double() * (LOSS_SCALE / scale) for gradient in gradients(got * scale, leaves)]
        value = float(got.detach())
        wrong = abs(value - self.kl) / self.kl if value >= 0 else 1.0
        apart = [relative(ours, exact) for ours, exact in zip(found, self.gradients, strict=True)]
        return wrong, float(torch.tensor(apart, dtype=torch.float64).max())  # torch's maximum is NaN where one of them is


def random_teacher(spread):
    """Hidden states, weight and a direction for the student; the logits have about this standard deviation."""
    generator = torch.Generator().manual_seed(5)
    teacher = torch.randn(96, 64, generator=generator) * spread
    weight = torch.randn(2311, 64, generator=generator) / 8
    return teacher, weight, torch.randn(96, 64, generator=generator) * spread


def approach(teacher, weight, step, kind, dtype):
    """Problems of decreasing KL, those within 5e-7 and 2; asserts that they span what the promise is about."""
    teacher, weight = teacher.to(dtype), weight.to(dtype)
    z_t, found = logits(teacher, weight, softcap=SOFTCAP), []
    for size in SIZES:
        hidden = (teacher.float() + size * step * (teacher.float().norm() / step.norm())).to(dtype)
        exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
        wanted = divergence(logits(*exact, softcap=SOFTCAP), z_t, kind).mean()
        if 5e-7 < wanted.item() < 2:
            found.append(Near(wanted.item(), hidden, weight, teacher, gradients(wanted * LOSS_SCALE, exact)))
    kls = [near.kl for near in found]
    assert max(kls) > 0.2 and min(kls) < 1e-4, kls
    return found
