"""Fits a classifier to a labelled sample and uses it to drop sequences of the distillation data: filter-then-distill."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from undo_core.data.sequences import Sequences
from undo_core.distillation.gate import SEQUENCES_AT_ONCE, GateConfig, fit_classifier, labelled
from undo_core.io.untrusted import refused
from undo_core.pipeline.needs import Cost, Memory, Scene
from undo_core.pipeline.prepared import distill_sequences, heldout_sequences, train_sequences
from undo_core.pipeline.stage import Folder, Stage, Work

if TYPE_CHECKING:
    from undo_core.pipeline.memory.meta import Meta

KEPT = "gate.safetensors"
TRIED = 1000  # sequences on which its time is estimated, at most


@dataclass(frozen=True, kw_only=True)
class Gate(Stage):
    """Fits the classifier and stores which sequences it keeps.

    Attributes:
        config: labelled share and settings of the classifier, with a seed.
        prepared: the prepared data.
    """

    kind = "gate"
    model_from = "prepared"
    config: GateConfig
    prepared: Stage | Folder

    def _json(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self.config).items() if name != "alphas"}

    def run(self, work: Work) -> dict[str, Any]:
        data, seed = work.inputs["prepared"], self.config.seed or 0
        # Different seeds, so that forget and retain are drawn independently.
        seeds = {"forget": seed, "retain": seed + 1}
        known = {name: labelled(train_sequences(data, [name]), self.config.share, seed) for name, seed in seeds.items()}
        fitted = fit_classifier(known["forget"], known["retain"], self.config)
        text = distill_sequences(data)
        kept = ~fitted.forget(text)
        if not kept.any():
            raise ValueError(
                f"controls.gate: got a classifier that drops all {len(text)} sequences, wanted one that keeps some"
            )
        save_file({"kept": kept, "weight": fitted.weight, "bias": fitted.bias}, work.output / KEPT)
        return {
            **{f"labelled_{name}_tokens": sequences.tokens() for name, sequences in known.items()},
            "labelled_rows": {name: len(sequences) for name, sequences in known.items()},
            "heldout": fitted.quality(*(heldout_sequences(data, name) for name in ("forget", "retain"))),
            "kept_rows": int(kept.sum()),
            "rows": len(text),
        }

    def memory(self, meta: Meta) -> list[Memory]:
        """The features of the sequences that are scored at once; those of the few labelled sequences are not counted."""
        return [Memory("forward", activations=8 * self.config.buckets * SEQUENCES_AT_ONCE)]

    def cost(self, scene: Scene) -> Cost:
        return Cost(disk=scene.sequences + 8 * self.config.buckets)

    def estimated_seconds(self, scene: Scene) -> float | None:
        """Time of a fit on random sequences, of which its share is labelled, and of scoring them, for as many as it is given."""
        if not scene.sequences:
            return None
        generator, tried = torch.Generator().manual_seed(0), min(scene.sequences, TRIED)

        def drawn(number: int) -> Sequences:
            return Sequences(torch.randint(1, 1000, (number, scene.length), generator=generator), pad_id=0)

        few = max(1, round(self.config.share * tried / 2))
        began = time.perf_counter()
        fitted = fit_classifier(drawn(few), drawn(few), self.config)
        fitted.forget(drawn(tried))
        return (time.perf_counter() - began) * scene.sequences / tried


def kept_sequences(folder: Path, sequences: int) -> torch.Tensor:
    """Returns a ``[sequences]`` bool mask over the distillation data: True for those that the gate in ``folder`` keeps."""
    with refused(f"{folder / KEPT}: not what a gate keeps"):
        kept = load_file(folder / KEPT)["kept"]
        if kept.dtype != torch.bool or kept.shape != (sequences,):
            raise ValueError(f"got kept as {kept.dtype} of shape {tuple(kept.shape)}, wanted bool of shape ({sequences},)")
        return kept
