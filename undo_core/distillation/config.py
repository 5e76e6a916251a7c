"""Settings of the distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from undo_core.distillation.on_policy import OnPolicyConfig
from undo_core.distillation.teacher import TeacherConfig
from undo_core.training.config import TrainConfig


@dataclass(frozen=True)
class DistillConfig:
    """Distillation of the suppressed model into a damaged copy or a random student.

    Attributes:
        train: optimizer, learning rates, batch sizes; ``steps`` is the limit.
        recover: the student (and the data-filtering control) stops at the first evaluation within this distance of the
            teacher's retain performance (the published rule): an absolute difference of accuracy (arithmetic, questions) or a
            relative one of cross-entropy. None trains for ``steps``.
        teacher: where the teacher's outputs come from. A cache is made once for all students of the run and of its sweeps.
        hidden_weight: factor on the relative squared error of the student's hidden states, added to the KL of the logits; needs
            a resident or streamed teacher. 0, as published, leaves it out.
        hidden_layers: layers after which hidden states are compared: 0 is the embeddings, the last layer is taken after the
            final norm; null for every layer.
        vocab_size: number of real tokens, for a head that is padded to more vocabulary entries; the KL leaves the padding out.
            null for all entries.
        on_policy: steps that train on continuations which the student draws, by the reverse KL; none by default, as published.
            Needs a resident or streamed teacher.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    recover: float | None = 0.05
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    hidden_weight: float = 0.0
    hidden_layers: list[int] | None = None
    vocab_size: int | None = None
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)

    def __post_init__(self) -> None:
        self.on_policy.check(self.teacher.kind)
        if not (math.isfinite(self.hidden_weight) and self.hidden_weight >= 0):
            raise ValueError(f"distill.hidden_weight: got {self.hidden_weight}, wanted a finite number >= 0")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"distill.vocab_size: got {self.vocab_size}, wanted an integer >= 1, or null")
        if self.teacher.vocab_size not in (None, self.vocab_size):
            raise ValueError(
                f"distill.teacher.vocab_size: got {self.teacher.vocab_size}, wanted null: distill.vocab_size, "
                f"{self.vocab_size}, holds for the cache too"
            )
        if self.hidden_weight and self.teacher.kind in ("cached", "topk"):
            raise ValueError(
                f"distill.hidden_weight: got {self.hidden_weight} with distill.teacher.kind {self.teacher.kind}, which stores "
                "no hidden states of the layers; wanted a resident or streamed teacher"
            )
