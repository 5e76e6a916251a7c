"""Settings of the noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from undo_kernels.ops import checks
from undo_kernels.ops.noise_rules import NoiseRule, Policy, outside

from undo_core.noise.parameters import PARTS, Parts


@dataclass(frozen=True)
class NoiseConfig:
    """The damage: ``theta <- (1 - alpha) * theta + alpha * beta * N``.

    Attributes:
        alphas: strengths in [0, 1], one student for each.
        beta: scale of the noise.
        law: distribution of N.
        std: standard deviation of the normal law.
        rules: other settings for some parameters, matched by glob or by class (matrices, vectors, embeddings, layers:0-3,7);
            later rules win.
        layers: noise only these layers, such as 0-3,7; null for all parameters.
        parts: which part of a multimodal model is damaged: text (its decoder, embeddings and head) or all. Applies to
            ``damage`` too.
        seed: seed of N; None derives it from the run's seed.
    """

    alphas: list[float] = field(default_factory=lambda: [0.6])
    beta: float = 0.1
    law: Literal["xavier_uniform", "xavier_normal", "normal"] = "xavier_uniform"
    std: float | None = None
    rules: list[NoiseRule] = field(default_factory=list)
    layers: str | None = None
    parts: Parts = "text"
    seed: int | None = None

    def all_rules(self) -> list[NoiseRule]:
        """``rules``, with ``layers`` added as a last rule."""
        return list(self.rules) if self.layers is None else [*self.rules, outside(self.layers)]

    def __post_init__(self) -> None:
        for alpha in self.alphas:
            if not 0 <= alpha <= 1:
                raise ValueError(f"noise.alphas: got {alpha}, wanted numbers in [0, 1]")
        if len(set(self.alphas)) < len(self.alphas) or not self.alphas:
            raise ValueError(f"noise.alphas: got {self.alphas}, wanted one or more different numbers in [0, 1]")
        for alpha in self.alphas:
            Policy(alpha, self.beta, self.law, self.std, tuple(self.all_rules()))
        checks.choice("noise.parts", self.parts, PARTS)
