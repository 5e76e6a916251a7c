"""The problems that the vocabulary benchmarks measure: sizes, inputs, float64 oracles, and what counts as the same answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest relative errors (loss, gradients) of "same"; beyond the second pair a contender computes something else.
TOLERANCE = {"float32": ((1e-5, 1e-4), (1e-4, 1e-3)), "bfloat16": ((1e-3, 1e-2), (5e-2, 2e-1))}

Outputs = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]
DEFAULT, ALL = "default", "all"  # groups of rows: measured without further words, and with --all


@dataclass(frozen=True)
class Row:
    """One problem size and who runs it.

    Attributes:
        id: on the command line and in the results.
        tokens: ``N``.
        vocabulary: ``V``.
        width: ``d`` of the student, and of the teacher where there is one.
        dtype: of everything.
        softcap: of all logits, or None.
        contenders: names, in the order in which they are shown.
        group: default or all.
        model: whose head has this shape, or nothing.
    """

    id: str
    tokens: int
    vocabulary: int
    width: int
    dtype: str
    softcap: float | None
    contenders: tuple[str, ...]
    group: str = DEFAULT
    model: str = ""


@dataclass(frozen=True)
class Inputs:
    """One problem. The student's two tensors are leaves that require gradients.

    Attributes:
        student_hidden: ``[N, d_s]``.
        student_weight: ``[V, d_s]``.
        teacher_hidden: ``[N, d_t]``; of the divergences.
        teacher_weight: ``[V, d_t]``; of the divergences.
        labels: ``[N]`` int64; of the cross-entropies.
        softcap: of the logits, or None.
        workspace_bytes: for the contenders that take one.
    """

    student_hidden: torch.Tensor
    student_weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    labels: torch.Tensor
    softcap: float | None = None
    workspace_bytes: int | None = None

    @property
    def output_bytes(self) -> int:
        """Of the two gradients."""
        return sum(t.numel() * t.element_size() for t in (self.student_hidden, self.student_weight))

    @property
    def heads(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight

    def without_softcap(self) -> Inputs:
        return replace(self, softcap=None)

    def without_gradients(self) -> Inputs:
        """The same tensors, none of which asks for a gradient."""
        return replace(self, student_hidden=self.student_hidden.detach(), student_weight=self.student_weight.detach())

    def first(self, tokens: int) -> Inputs:
        """The problem of the first tokens."""
        hidden = self.student_hidden.detach()[:tokens].clone().requires_grad_()
        return replace(
            self, student_hidden=hidden, teacher_hidden=self.teacher_hidden[:tokens], labels=self.labels[:tokens]
        )  # fmt: skip

    def to(self, dtype: torch.dtype, device: str) -> Inputs:
        hidden, weight = (t.detach().to(device, dtype).clone().requires_grad_() for t in self.heads[:2])
        teacher = [t.to(device, dtype) for t in self.heads[2:]]
        return replace(self, student_hidden=hidden, student_weight=weight, teacher_hidden=teacher[0], teacher_weight=teacher[1],
                       labels=self.labels.to(device))  # fmt: skip


def draw(row: Row, device: str, teacher: bool = True, seed: int = 0) -> Inputs:
    """Student and teacher unrelated, logits of standard deviation 2: the time of no contender depends on the values.

    Without a ``teacher`` its tensors are empty.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, row.width, generator=generator).mul_(scale).to(device, DTYPES[row.dtype])

    scale = 2.0 / math.sqrt(row.width)
    student = [normal(row.tokens, 1.0).requires_grad_(), normal(row.vocabulary, scale).requires_grad_()]
    others = [normal(row.tokens * teacher, 1.0), normal(row.vocabulary * teacher, scale)]
    labels = torch.randint(row.vocabulary, (row.tokens,), generator=generator).to(device)
    return Inputs(*student, *others, labels, softcap=row.softcap)


def small(dtype: str, device: str, seed: int, step: float | None = None, spread: float = 2.0) -> Inputs:
    """Odd sizes and two widths. Unrelated heads, or with ``step`` the teacher's plus that much of eight further directions.

    The further directions stand in columns of their own, so that a difference of any size survives the rounding of the inputs.
    """
    tokens, vocabulary, width, extra = 67, 4099, 61, 8
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(tokens, width), normal(vocabulary, width) * spread / math.sqrt(width)
    if step is None:
        teacher_hidden, teacher_weight = normal(tokens, width - extra), normal(vocabulary, width - extra)
        teacher_weight = teacher_weight * spread / math.sqrt(width - extra)
    else:
        teacher_hidden, teacher_weight = hidden[:, :-extra], weight[:, :-extra]
        hidden = torch.cat([teacher_hidden, step * hidden[:, -extra:]], 1)
    hidden, weight, teacher_hidden, teacher_weight = (
        t.to(device, DTYPES[dtype]).contiguous() for t in (hidden, weight, teacher_hidden, teacher_weight)
    )
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight, labels)


# -- oracles -------------------------------------------------------------------------------------------------------------------


def _log_probabilities(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits - logits.logsumexp(-1, keepdim=True)


def _oracle(inputs: Inputs, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> Outputs:
    hidden, weight = (t.detach().double().requires_grad_() for t in (inputs.student_hidden, inputs.student_weight))
    loss = loss_of(_log_probabilities(hidden, weight, inputs.softcap))
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def divergence_oracle(inputs: Inputs) -> Outputs:
    """Forward KL by its definition, in float64, of the same (rounded) inputs; it shares no code with any contender."""
    log_t = _log_probabilities(inputs.teacher_hidden.double(), inputs.teacher_weight.double(), inputs.softcap)
    return _oracle(inputs, lambda log_s: (log_t.exp() * (log_t - log_s)).sum(-1).mean())


def cross_entropy_oracle(inputs: Inputs) -> Outputs:
    """Cross-entropy by its definition, likewise."""
    return _oracle(inputs, lambda log_s: -(F.one_hot(inputs.labels, log_s.shape[1]) * log_s).sum(-1).mean())


def errors(got: Outputs, wanted: Outputs) -> dict[str, float]:
    """Relative errors of the loss and, in L2, of both gradients."""

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() - b).norm() / b.norm())

    return dict(zip(("loss", "d_hidden", "d_weight"), map(relative, got, wanted), strict=True))


def verdict(found: dict[str, float], dtype: str) -> str:
    """same, rounded or different."""
    worst = max(found["d_hidden"], found["d_weight"])

    def within(bounds: tuple[float, float]) -> bool:
        return found["loss"] <= bounds[0] and worst <= bounds[1]  # false for NaN

    same, rounded = TOLERANCE[dtype]
    return "same" if within(same) else "rounded" if within(rounded) else "different"


def at_divergence(target: float, dtype: str, device: str, seed: int) -> tuple[Inputs, Outputs]:
    """A small problem whose true KL, of the rounded inputs, is ``target`` within 2 %, and its oracle."""
    step = math.sqrt(target)
    for _ in range(40):
        inputs = small(dtype, device, seed, step, spread=3.0)
        wanted = divergence_oracle(inputs)
        loss = float(wanted[0])
        if abs(loss / target - 1) < 0.02:
            return inputs, wanted
        step *= math.sqrt(target / loss)  # the divergence grows with the step squared, or more slowly
    raise RuntimeError(f"no step gives a KL of {target:g}; the last gave {loss:g}")
