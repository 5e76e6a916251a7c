"""The problems that the vocabulary benchmarks measure: sizes, inputs, float64 oracles, and what counts as the same answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest relative errors (loss, gradients) of "same"; beyond the second pair a contender computes something else.
TOLERANCE = {"float32": ((1e-5, 1e-4), (1e-4, 1e-3)), "bfloat16": ((1e-3, 1e-2), (5e-2, 2e-1))}

Outputs = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]
DEFAULT, ALL = "default", "all"  # groups of rows: measured without further words, and with --all
ORACLE_PAIRS = 1 << 25  # (token, vocabulary entry) pairs that the oracle holds at a time, in several arrays of float64
ERROR_PAIRS = {"cpu": 4_000_000, "cuda": 1 << 28}  # of the problems in which the student approaches the teacher
_FURTHER = 8  # directions in which that student leaves its teacher


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
        plan: likewise.
    """

    student_hidden: torch.Tensor
    student_weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    labels: torch.Tensor
    softcap: float | None = None
    workspace_bytes: int | None = None
    plan: str = "auto"

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

    def part(self, tokens: slice) -> Inputs:
        """The problem of some of the tokens."""
        hidden = self.student_hidden.detach()[tokens].clone().requires_grad_()
        return replace(self, student_hidden=hidden, teacher_hidden=self.teacher_hidden[tokens], labels=self.labels[tokens])

    def to(self, dtype: torch.dtype, device: str) -> Inputs:
        hidden, weight = (t.detach().to(device, dtype).clone().requires_grad_() for t in self.heads[:2])
        teacher = [t.to(device, dtype) for t in self.heads[2:]]
        return replace(self, student_hidden=hidden, student_weight=weight, teacher_hidden=teacher[0], teacher_weight=teacher[1],
                       labels=self.labels.to(device))  # fmt: skip


def draw(row: Row, device: str, teacher: bool = True, seed: int = 0) -> Inputs:
    """Student and teacher unrelated, logits of standard deviation 2, or of a third of the softcap where that is more.

    A softcap that nobody feels would leave unverified who knows it. Beyond that the time of no contender depends on the values,
    but for one that skips small gradients. Without a ``teacher`` its tensors are empty.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, row.width, generator=generator).mul_(scale).to(device, DTYPES[row.dtype])

    scale = max(2.0, (row.softcap or 0.0) / 3) / math.sqrt(row.width)
    student = [normal(row.tokens, 1.0).requires_grad_(), normal(row.vocabulary, scale).requires_grad_()]
    others = [normal(row.tokens * teacher, 1.0), normal(row.vocabulary * teacher, scale)]
    labels = torch.randint(row.vocabulary, (row.tokens,), generator=generator).to(device)
    return Inputs(*student, *others, labels, softcap=row.softcap)


class Approaching:
    """A student that comes as near to its teacher as one likes, in a row's shape and dtype, on at most ``tokens`` tokens.

    Both heads hold the same weights. The student's hidden states are the teacher's and, in columns of their own where the
    teacher has zeros, so much of eight further directions: a difference of any size survives the rounding of the inputs.
    """

    def __init__(self, row: Row, tokens: int, device: str, seed: int, spread: float = 3.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.row, self.device = row, device
        self.hidden = torch.randn(min(tokens, row.tokens), row.width, generator=generator)
        weight = torch.randn(row.vocabulary, row.width, generator=generator).mul_(spread / math.sqrt(row.width))
        self.weight = weight.to(device, DTYPES[row.dtype])
        self.labels = torch.randint(row.vocabulary, (len(self.hidden),), generator=generator).to(device)
        self.step = 1.0

    def at(self, step: float) -> Inputs:
        """The problem with ``step`` times the further directions."""

        def states(times: float) -> torch.Tensor:
            further = times * self.hidden[:, -_FURTHER:]
            return torch.cat([self.hidden[:, :-_FURTHER], further], 1).to(self.device, DTYPES[self.row.dtype])

        student = states(step).requires_grad_(), self.weight.detach().requires_grad_()
        return Inputs(*student, states(0.0), self.weight, self.labels, softcap=self.row.softcap)

    def within(self, target: float) -> tuple[Inputs, Outputs]:
        """The problem whose true KL, of the rounded inputs, is ``target`` within 2 %, and its oracle."""
        for _ in range(40):
            inputs = self.at(self.step)
            loss = float(divergence_oracle(inputs, gradients=False)[0])
            if abs(loss / target - 1) < 0.02:
                return inputs, divergence_oracle(inputs)
            self.step *= math.sqrt(target / loss)  # the divergence grows with the step squared, or more slowly
        raise RuntimeError(f"no step gives a KL of {target:g}; the last gave {loss:g}")


# -- oracles -------------------------------------------------------------------------------------------------------------------


def _log_probabilities(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits - logits.logsumexp(-1, keepdim=True)


def _oracle(inputs: Inputs, loss_of: Callable[[torch.Tensor, Inputs], torch.Tensor], gradients: bool) -> Outputs:
    """The mean of ``loss_of`` (log-probabilities and their part of the problem) over tokens, and its gradients.

    Some tokens at a time, and only the gradients stay: a whole row of the benchmarks must fit, in float64.
    """
    weight = inputs.student_weight.detach().double().requires_grad_(gradients)
    tokens = len(inputs.student_hidden)
    loss, d_hidden, d_weight = torch.zeros((), dtype=torch.float64, device=weight.device), [], None
    size = max(1, ORACLE_PAIRS // len(weight))
    for first in range(0, tokens, size):
        part = inputs.part(slice(first, first + size))
        hidden = part.student_hidden.detach().double().requires_grad_(gradients)
        own = loss_of(_log_probabilities(hidden, weight, inputs.softcap), part).sum() / tokens
        loss += own.detach()
        if gradients:
            of_hidden, of_weight = torch.autograd.grad(own, (hidden, weight))
            d_hidden.append(of_hidden)
            d_weight = of_weight if d_weight is None else d_weight.add_(of_weight)
    return loss, torch.cat(d_hidden) if gradients else weight[:0], weight[:0] if d_weight is None else d_weight


def divergence_oracle(inputs: Inputs, gradients: bool = True) -> Outputs:
    """Forward KL by its definition, in float64, of the same (rounded) inputs; it shares no code with any contender."""

    def loss(log_s: torch.Tensor, part: Inputs) -> torch.Tensor:
        log_t = _log_probabilities(part.teacher_hidden.double(), part.teacher_weight.double(), part.softcap)
        return (log_t.exp() * (log_t - log_s)).sum(-1)

    return _oracle(inputs, loss, gradients)


def cross_entropy_oracle(inputs: Inputs, gradients: bool = True) -> Outputs:
    """Cross-entropy by its definition, likewise."""
    return _oracle(inputs, lambda log_s, part: -log_s.gather(1, part.labels[:, None]), gradients)


def errors(got: Outputs, wanted: Outputs) -> dict[str, float]:
    """Relative errors of the loss and, in L2, of both gradients."""

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        apart, norm = 0.0, 0.0
        for x, y in zip(a.reshape(-1).split(1 << 24), b.reshape(-1).split(1 << 24), strict=True):  # no second copy in float64
            apart, norm = apart + float((x.double() - y).square().sum()), norm + float(y.square().sum())
        return math.sqrt(apart / norm)

    return dict(zip(("loss", "d_hidden", "d_weight"), map(relative, got, wanted), strict=True))


def verdict(found: dict[str, float], dtype: str) -> str:
    """same, rounded or different."""
    worst = max(found["d_hidden"], found["d_weight"])

    def within(bounds: tuple[float, float]) -> bool:
        return found["loss"] <= bounds[0] and worst <= bounds[1]  # false for NaN

    same, rounded = TOLERANCE[dtype]
    return "same" if within(same) else "rounded" if within(rounded) else "different"
