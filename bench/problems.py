"""Problems of the vocabulary benchmarks: sizes, inputs, float64 oracles, and what counts as the same answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest relative errors (loss, gradients) of "same" and of "rounded"; beyond these a contender computes something else.
TOLERANCE = {"float32": ((1e-5, 1e-4), (1e-4, 1e-3)), "bfloat16": ((1e-3, 1e-2), (5e-2, 2e-1))}

Outputs = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]
DEFAULT, ALL = "default", "all"  # groups of rows: those measured by default, and those measured with --all
ORACLE_PAIRS = 1 << 25  # (token, vocabulary entry) pairs that the oracle holds at a time, in several arrays of float64
ERROR_PAIRS = {"cpu": 4_000_000, "cuda": 1 << 28}  # pairs in the problems in which the student approaches the teacher
_FURTHER = 8  # number of directions in which that student differs from its teacher


@dataclass(frozen=True)
class Row:
    """A problem size and its contenders.

    Attributes:
        id: name on the command line and in the results.
        tokens: number of tokens ``N``.
        vocabulary: vocabulary entries ``V``.
        width: width ``d`` of the student, and of the teacher if there is one.
        dtype: dtype of all inputs.
        softcap: softcap of all logits, or None.
        contenders: names of the contenders, in the order of the tables.
        group: default or all.
        model: name of a model whose head has this shape, or empty.
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
    """The inputs of a problem. The student's two tensors are leaves that require gradients.

    Attributes:
        student_hidden: ``[N, d_s]``.
        student_weight: ``[V, d_s]``.
        teacher_hidden: ``[N, d_t]``, for the divergences.
        teacher_weight: ``[V, d_t]``, for the divergences.
        labels: ``[N]`` int64, for the cross-entropies.
        softcap: softcap of the logits, or None.
        workspace_bytes: workspace for the contenders that take one.
        plan: plan for the contenders that take one.
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
        """Bytes of the two gradients."""
        return sum(t.numel() * t.element_size() for t in (self.student_hidden, self.student_weight))

    @property
    def heads(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight

    def without_softcap(self) -> Inputs:
        return replace(self, softcap=None)

    def without_gradients(self) -> Inputs:
        """Returns the same tensors without gradients."""
        return replace(self, student_hidden=self.student_hidden.detach(), student_weight=self.student_weight.detach())

    def part(self, tokens: slice) -> Inputs:
        """Returns the problem for some of the tokens."""
        hidden = self.student_hidden.detach()[tokens].clone().requires_grad_()
        return replace(self, student_hidden=hidden, teacher_hidden=self.teacher_hidden[tokens], labels=self.labels[tokens])

    def to(self, dtype: torch.dtype, device: str) -> Inputs:
        hidden, weight = (t.detach().to(device, dtype).clone().requires_grad_() for t in self.heads[:2])
        teacher = [t.to(device, dtype) for t in self.heads[2:]]
        return replace(self, student_hidden=hidden, student_weight=weight, teacher_hidden=teacher[0], teacher_weight=teacher[1],
                       labels=self.labels.to(device))  # fmt: skip


def draw(row: Row, device: str, teacher: bool = True, seed: int = 0) -> Inputs:
    """Draws an unrelated student and teacher, with logits of standard deviation 2, or a third of the softcap if that is larger.

    Logits that are small beside the softcap would not show whether a contender applies it. Otherwise the values affect the time
    of no contender except one that skips small gradients. Without ``teacher``, the teacher's tensors are empty.
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
    """A student at any distance from its teacher, in a row's shape and dtype, on at most ``tokens`` tokens.

    Both heads have the same weights. The student's hidden states are the teacher's plus a multiple of eight further directions,
    in columns where the teacher has zeros, so that a difference of any size survives the rounding of the inputs.
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
        """Returns the problem with ``step`` times the further directions."""

        def states(times: float) -> torch.Tensor:
            further = times * self.hidden[:, -_FURTHER:]
            return torch.cat([self.hidden[:, :-_FURTHER], further], 1).to(self.device, DTYPES[self.row.dtype])

        student = states(step).requires_grad_(), self.weight.detach().requires_grad_()
        return Inputs(*student, states(0.0), self.weight, self.labels, softcap=self.row.softcap)

    def within(self, target: float) -> tuple[Inputs, Outputs]:
        """Returns the problem whose true KL, of the rounded inputs, is within 2 % of ``target``, and its oracle."""
        for _ in range(40):
            inputs = self.at(self.step)
            loss = float(divergence_oracle(inputs, gradients=False)[0])
            if abs(loss / target - 1) < 0.02:
                return inputs, divergence_oracle(inputs)
            self.step *= math.sqrt(target / loss)  # the divergence grows with the square of the step, or more slowly
        raise RuntimeError(f"no step gives a KL of {target:g}; the last gave {loss:g}")


# -- oracles -------------------------------------------------------------------------------------------------------------------


def _log_probabilities(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits - logits.logsumexp(-1, keepdim=True)


def _oracle(inputs: Inputs, loss_of: Callable[[torch.Tensor, Inputs], torch.Tensor], gradients: bool) -> Outputs:
    """Returns the mean of ``loss_of`` (log-probabilities and their part of the problem) over tokens, and its gradients.

    It takes some tokens at a time and keeps only the gradients, so that a whole row of the benchmarks fits in float64.
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
    """Returns the forward KL by its definition, in float64, of the same (rounded) inputs; shares no code with any contender."""

    def loss(log_s: torch.Tensor, part: Inputs) -> torch.Tensor:
        log_t = _log_probabilities(part.teacher_hidden.double(), part.teacher_weight.double(), part.softcap)
        return (log_t.exp() * (log_t - log_s)).sum(-1)

    return _oracle(inputs, loss, gradients)


def cross_entropy_oracle(inputs: Inputs, gradients: bool = True) -> Outputs:
    """Returns the cross-entropy by its definition, in float64, of the same (rounded) inputs."""
    return _oracle(inputs, lambda log_s, part: -log_s.gather(1, part.labels[:, None]), gradients)


def errors(got: Outputs, wanted: Outputs) -> dict[str, float]:
    """Returns the relative errors of the loss and, in L2, of both gradients."""

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        apart, norm = 0.0, 0.0
        for x, y in zip(
            a.reshape(-1).split(1 << 24), b.reshape(-1).split(1 << 24), strict=True
        ):  # saves a second copy in float64
            apart, norm = apart + float((x.double() - y).square().sum()), norm + float(y.square().sum())
        return math.sqrt(apart / norm)

    return dict(zip(("loss", "d_hidden", "d_weight"), map(relative, got, wanted), strict=True))


def verdict(found: dict[str, float], dtype: str) -> str:
    """Returns same, rounded or different."""
    worst = max(found["d_hidden"], found["d_weight"])

    def within(bounds: tuple[float, float]) -> bool:
        return found["loss"] <= bounds[0] and worst <= bounds[1]  # false for NaN

    same, rounded = TOLERANCE[dtype]
    return "same" if within(same) else "rounded" if within(rounded) else "different"
