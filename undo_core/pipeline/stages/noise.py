"""Damages a model's parameters with the published noise, from disk to disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from undo_kernels.ops.noise_rules import NoiseRule

from undo_core.io.untrusted import NUMBER, Shape
from undo_core.noise.checkpoint import check_noise, noise_checkpoint
from undo_core.noise.parameters import Left, Parts, summary
from undo_core.pipeline.needs import Memory
from undo_core.pipeline.stage import Folder, Stage, Work, optional

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from undo_core.pipeline.memory.meta import Meta

LEFT: Shape = {str: {"reason": str, "elements": int, "share": NUMBER}}


@dataclass(frozen=True, kw_only=True)
class Noise(Stage):
    """Applies the noise ``theta <- (1 - alpha) * theta + alpha * beta * N``.

    Attributes:
        alpha: strength, in [0, 1].
        beta: scale of the noise.
        law: distribution of N.
        seed: seed of N.
        std: standard deviation of the normal law.
        rules: other settings for some parameters; later rules win.
        parts: which part of a multimodal model is noised: text or all.
        stochastic_rounding: round 16-bit parameters stochastically; False rounds to nearest.
        like: settings of the noise whose distance is matched, as JSON values; ``alpha`` is then not read.
        model: the model to damage.
    """

    kind = "noise"
    entries: ClassVar[Shape] = {
        "tensors": {str: dict.fromkeys(("before", "after", "change", "shrink", "noise"), NUMBER)},
        **{"left": LEFT, "alpha?": NUMBER, "distance?": NUMBER},
    }
    alpha: float
    beta: float
    law: str
    seed: int
    std: float | None = optional()
    rules: tuple[NoiseRule, ...] = optional(())
    parts: Parts = optional("text")
    stochastic_rounding: bool = optional(True)
    like: dict[str, Any] | None = optional()
    model: Stage | Folder

    def run(self, work: Work) -> dict[str, Any]:
        rounding = self.stochastic_rounding
        source, settings = work.inputs["model"], self._given()
        report = noise_checkpoint(source, work.output, **settings, stochastic_rounding=rounding, title=work.title)
        matched = {} if report.alpha is None else {"alpha": report.alpha, "distance": report.distance}
        return {"tensors": as_dicts(report), "left": as_dicts(report.left), **matched}

    def check(self, model: PreTrainedModel) -> None:
        check_noise(model, **self._given())

    def _given(self) -> dict[str, Any]:
        names = ("alpha", "beta", "seed", "law", "std", "rules", "parts")
        return {name: getattr(self, name) for name in names} | {"like": with_rules(self.like)}

    def memory(self, meta: Meta) -> list[Memory]:
        """The largest tensor: one is read at a time, from the mapped file; to match a distance it is copied."""
        copied = 0 if self.like is None else meta.stored.itemsize * meta.largest
        return [Memory("loading", weights=meta.mapped * meta.largest, activations=copied)]

    @property
    def sized_by(self) -> dict[str, Any]:
        """The memory is that of the largest tensor under any other settings."""
        return {"matched": self.like is not None}

    def results(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        matched = {name: facts[name] for name in ("alpha", "distance") if name in facts}
        return left_entry(facts) | ({"noise": matched} if matched else {})


def with_rules(like: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Settings of other noise with its rules as :class:`NoiseRule`, from JSON values."""
    return None if like is None else {**like, "rules": tuple(NoiseRule(**rule) for rule in like.get("rules", []))}


def as_dicts(named: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Converts a mapping of dataclasses to JSON values."""
    return {name: dataclasses.asdict(facts) for name, facts in named.items()}


def left_entry(facts: Mapping[str, Any]) -> dict[str, str]:
    """The results entry ``left``: a line about parameters that the damage did not change; empty if there are none."""
    said = left_line(facts)
    return {"left": said} if said else {}


def left_line(facts: Mapping[str, Any]) -> str:
    """The line about parameters that the damage did not change; empty if there are none."""
    return summary({name: Left(one["reason"], one["elements"], one["share"]) for name, one in facts["left"].items()})
