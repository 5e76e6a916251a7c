"""Evaluates a model under an intervention; the only output is the manifest, with one point of a curve."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from undo_core.attacks.interventions import Given, Intervention, intervened
from undo_core.models import forward_flops, load_model
from undo_core.models.layers import change_output, find_layers
from undo_core.pipeline.model_stage import ModelStage
from undo_core.pipeline.needs import Cost, Memory, Scene
from undo_core.pipeline.prepared import tested_sequences, train_sequences
from undo_core.pipeline.stage import Folder, Stage, Work, optional
from undo_core.training.losses import cross_entropy

if TYPE_CHECKING:
    from undo_core.pipeline.memory.meta import Meta


@dataclass(frozen=True, kw_only=True)
class Intervene(ModelStage):
    """Changes a model's weights, activations or input, and evaluates it.

    Attributes:
        attack: the intervention, at one point of its grid.
        model: the attacked model.
        original: the model before the unlearning, if the intervention needs it.
    """

    kind = "intervene"
    time_from = "attacks"
    attack: Intervention
    model: Stage | Folder
    original: Stage | Folder | None = optional()

    def _json(self) -> dict[str, Any]:
        values = super()._json()
        return values | {"attack": self.attack.settings()}

    def run(self, work: Work) -> dict[str, Any]:
        data = work.inputs["prepared"]
        model = load_model(work.inputs["model"])
        texts = {name: train_sequences(data, [name]) for name in ("forget", "retain")}
        given = Given(**texts, original=lambda: load_model(work.inputs["original"]), seed=self.attack.seed or 0)
        with intervened(model, self.attack, given) as evaluate:
            scores = {name: evaluate(model, sequences) for name, sequences in tested_sequences(data).items()}
        point = {name: {key: score[key] for key in ("value", "low", "high", "n")} for name, score in scores.items()}
        return {"curve": [{"step": 0, **point}]}

    def memory(self, meta: Meta) -> list[Memory]:
        """Memory of the passes over text and of an evaluation, with the original beside the model if it is needed."""
        models = [meta.model() for _ in range(2 if self.attack.needs_original else 1)]
        loading = Memory("loading", weights=4 * meta.elements * len(models) + meta.reading(torch.float32))
        for model in models:
            meta.hold([*model.parameters(), *model.buffers()], "weights")
        model, effort = models[0], self.attack.effort()
        if effort.steps:
            model.requires_grad_(False)
            batch = meta.batch(effort.sequences)
            with meta.counted("forward"), torch.set_grad_enabled(effort.passes > 1):
                handle = change_output(find_layers(model)[0], _with_gradient)  # as if all layers above were run for a gradient
                loss = cross_entropy(model, batch, 1)
                if effort.passes > 1:
                    loss.backward()
                handle.remove()
                del loss
        with meta.counted("evaluation"):
            meta.evaluate(model)
        return [loading, *meta.peaks()]

    @property
    def sized_by(self) -> dict[str, Any]:
        """Points of a grid, and other kinds that compute alike, need the same memory."""
        return {"original": self.attack.needs_original, "effort": dataclasses.asdict(self.attack.effort())}

    def cost(self, scene: Scene) -> Cost:
        """The passes over training text, and only a manifest on disk."""
        effort = self.attack.effort()
        positions = effort.steps * effort.sequences * scene.length
        flops = effort.passes * forward_flops(scene.model, scene.length) * positions
        return Cost(0, effort.steps, effort.sequences, effort.passes, positions, flops)


def _with_gradient(hidden: torch.Tensor) -> torch.Tensor:
    return hidden + torch.zeros(hidden.shape[-1], device=hidden.device, requires_grad=True)


def intervene_stage(
    attack: Intervention,
    prepared: Stage | Folder,
    model: Stage | Folder,
    original: Stage | Folder | None,
    title: str,
) -> Intervene:
    """Returns the stage that tries one point of an intervention's grid.

    Raises:
        ValueError: the intervention needs the original, and there is none.
    """
    if attack.needs_original and original is None:
        raise ValueError(f"kind: got {attack.kind}, which needs the original model; wanted one (--original)")
    given = original if attack.needs_original else None
    return Intervene(attack=attack, prepared=prepared, model=model, original=given, title=title)
