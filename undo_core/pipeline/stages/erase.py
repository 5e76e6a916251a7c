"""Erases the tokens that are characteristic of the forget text from a model's embedding and head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from undo_core.data.characteristic import characteristic
from undo_core.io.untrusted import Shape
from undo_core.models import load_model, load_tokenizer
from undo_core.noise.erase import EraseConfig, erase_
from undo_core.pipeline.model_stage import save
from undo_core.pipeline.needs import Memory
from undo_core.pipeline.prepared import train_sequences
from undo_core.pipeline.stage import Folder, Stage, Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from undo_core.pipeline.memory.meta import Meta


@dataclass(frozen=True, kw_only=True)
class Erase(Stage):
    """Erases the most characteristic tokens.

    Attributes:
        config: how many tokens, and what takes their place.
        seed: seed of re-drawn rows.
        prepared: the prepared data, which ranks the tokens.
        model: the model to damage.
    """

    kind = "erase"
    entries: ClassVar[Shape] = {"erased": [{"token": str}]}
    config: EraseConfig
    seed: int
    prepared: Stage | Folder
    model: Stage | Folder

    def run(self, work: Work) -> dict[str, Any]:
        source, data = work.inputs["model"], work.inputs["prepared"]
        model = load_model(source, self.stored())
        texts = {name: train_sequences(data, [name]) for name in ("forget", "retain")}
        scores = characteristic(**texts, vocabulary=_vocabulary(model))
        positive = int((scores > 0).sum())
        if self.config.tokens > positive:
            raise ValueError(
                f"erase.tokens: got {self.config.tokens}, wanted at most {positive}: no more tokens occur more often in the "
                "forget text than in the retain text"
            )
        tokens = scores.argsort(descending=True, stable=True)[: self.config.tokens]
        erase_(model, tokens, fill=self.config.fill, seed=self.seed)
        tokenizer = load_tokenizer(source)
        save(model, tokenizer, work.output)
        named = tokenizer.convert_ids_to_tokens(tokens.tolist())
        return {"erased": [{"token": text, "id": i} for text, i in zip(named, tokens.tolist(), strict=True)]}

    def check(self, model: PreTrainedModel) -> None:
        """More than the tokens that are characteristic, which only the data tell, are refused later."""
        if self.config.tokens >= (size := _vocabulary(model)):
            raise ValueError(f"erase.tokens: got {self.config.tokens}, wanted fewer than the {size} tokens of the vocabulary")

    def results(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        return {"erased": [entry["token"] for entry in facts["erased"]]}

    def memory(self, meta: Meta) -> list[Memory]:
        """The model, and the kept rows of the largest matrix in float64."""
        weights = meta.stored.itemsize * meta.elements + meta.reading(meta.stored)
        return [Memory("loading", weights=weights, activations=16 * meta.largest)]


def _vocabulary(model: PreTrainedModel) -> int:
    """Number of tokens that have a row in the embedding and in the head."""
    return min(len(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings()))
