"""Settings of further students: what is damaged how much, by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from undo_kernels.ops import checks
from undo_kernels.ops.noise_rules import NoiseRule

from undo_core.noise.erase import EraseConfig


@dataclass(frozen=True)
class GaussianConfig:
    """Gaussian noise before the other damage: ``theta + strength * rms(theta) * N``.

    N is standard normal and the root mean square is taken per matrix. If student and teacher share the noise, both get the same
    tensor, so that they agree on the damaged matrices as they did before. Noise on the student alone is damage and disagreement
    together; the difference between the two is what the disagreement does.

    Attributes:
        strength: a number >= 0; 0 for none.
        match: the matrices, as in a rule of the noise: head, embeddings, a glob, or one of these after ``not``.
        shared: whether the teacher gets the same noise.
    """

    strength: float = 0.0
    match: str = "*"
    shared: bool = False

    def __post_init__(self) -> None:
        checks.number("gaussian.strength", self.strength, "a finite number >= 0", 0)
        NoiseRule(self.match)


@dataclass(frozen=True)
class StudentConfig:
    """A further student, or another model of the run with some parameters drawn again.

    The steps come in the order of the settings: untie, gaussian, the noise with its rules, erase, the distillation, after.

    Attributes:
        model: undo makes a student of the unlearned model; unlearn, random and filter take that model of the run and change it
            only by ``untie`` and ``after``.
        untie: give a tied head a weight of its own first, a copy of the embedding's. The student then trains and stores one
            more matrix.
        gaussian: Gaussian noise, which student and teacher may share.
        alpha: strength of the noise, in [0, 1]; only with model undo.
        rules: rules for this student, after those of ``noise.rules``. With ``match: head``, ``match: embeddings`` and an alpha,
            the vocabulary matrices have a strength of their own.
        equal_distance: whether ``alpha`` is the strength of the noise without these rules whose distance the student gets: the
            alpha of all parameters to which no rule gives one is then computed (:mod:`undo_core.noise.distance`).
        erase: tokens whose rows are erased after the noise.
        after: rules of noise on the finished model, which changes only what they match. ``alpha: 1, law: normal, std: 0.02,
            beta: 1`` draws a matrix again.
    """

    model: Literal["undo", "unlearn", "random", "filter"] = "undo"
    untie: bool = False
    gaussian: GaussianConfig = field(default_factory=GaussianConfig)
    alpha: float | None = None
    rules: list[NoiseRule] = field(default_factory=list)
    equal_distance: bool = False
    erase: EraseConfig = field(default_factory=EraseConfig)
    after: list[NoiseRule] = field(default_factory=list)

    def __post_init__(self) -> None:
        checks.choice("students.model", self.model, ("undo", "unlearn", "random", "filter"))
        if self.model == "undo":
            if self.alpha is None or not 0 <= self.alpha <= 1:
                raise ValueError(f"students.alpha: got {self.alpha}, wanted a number in [0, 1]")
            if self.equal_distance and not any(rule.alpha is not None for rule in self.rules):
                raise ValueError(
                    "students.equal_distance: got true without a rule that gives an alpha, wanted one: else it changes nothing"
                )
            return
        given = {
            "gaussian": self.gaussian.strength > 0,
            "alpha": self.alpha is not None,
            "rules": bool(self.rules),
            "equal_distance": self.equal_distance,
            "erase": self.erase.tokens > 0,
        }
        for name in (name for name, there in given.items() if there):
            raise ValueError(f"students.{name}: got one with model {self.model}, wanted none: it changes a student of undo")
        if not self.after:
            raise ValueError(f"students.after: got no rules with model {self.model}, wanted some: else the model is unchanged")
