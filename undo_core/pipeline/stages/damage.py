"""Damages a model's matrices by another operator than the published noise, from disk to disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from undo_core.io.untrusted import NUMBER, OPTIONAL, Shape
from undo_core.noise.damage import ELEMENT_BYTES, Operator, check_damage, damage_checkpoint
from undo_core.noise.parameters import Parts
from undo_core.pipeline.needs import Memory
from undo_core.pipeline.stage import Folder, Stage, Work, optional
from undo_core.pipeline.stages.noise import LEFT, as_dicts, left_entry, with_rules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from undo_core.pipeline.memory.meta import Meta


@dataclass(frozen=True, kw_only=True)
class Damage(Stage):
    """Applies Gaussian noise, pruning or permutation, at a given strength or with the distance that the published noise has.

    Attributes:
        operator: see :mod:`undo_core.noise.damage`.
        seed: seed of the random draws.
        layers: damage only these layers, such as 0-3,7.
        like: settings of the noise whose distance is matched, as JSON values.
        parts: which part of a multimodal model is damaged: text or all.
        strength: strength of the operator, instead of ``like``.
        match: damage only the matrices that this matches, as in a rule of the noise; instead of ``layers``.
        model: the model to damage.
    """

    kind = "damage"
    entries: ClassVar[Shape] = {
        "tensors": {str: {"before": NUMBER, "change": NUMBER}},
        **{"left": LEFT, "strength": NUMBER, "distance": NUMBER, "wanted": OPTIONAL},
    }
    operator: Operator
    seed: int
    layers: str | None
    like: dict[str, Any] | None = optional()
    parts: Parts = optional("text")
    strength: float | None = optional()
    match: str | None = optional()
    model: Stage | Folder

    def run(self, work: Work) -> dict[str, Any]:
        facts = damage_checkpoint(
            work.inputs["model"],
            work.output,
            self.operator,
            **self._given(),
            title=work.title,
        )
        return {**facts, "tensors": as_dicts(facts["tensors"]), "left": as_dicts(facts["left"])}

    def check(self, model: PreTrainedModel) -> None:
        check_damage(model, self.operator, **self._given())

    def _given(self) -> dict[str, Any]:
        names = ("seed", "strength", "layers", "match", "parts")
        return {name: getattr(self, name) for name in names} | {"like": with_rules(self.like)}

    def memory(self, meta: Meta) -> list[Memory]:
        return [Memory("forward", weights=meta.mapped * meta.largest, activations=ELEMENT_BYTES * meta.largest)]

    def results(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        measured = {name: facts[name] for name in ("strength", "distance", "wanted")}
        return {"damage": {"operator": self.operator, **measured}, **left_entry(facts)}
