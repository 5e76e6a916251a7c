"""The model that a configuration describes, on the meta device, and whether every stage accepts it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from undo_core.checkpoints.files import settled_configuration
from undo_core.data import arithmetic
from undo_core.data.splits import check_lengths
from undo_core.models import architecture, load_tokenizer, positions_of, skeleton
from undo_core.models.untying import untied_configuration
from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.stage import Stage


def model_config(config: RunConfig) -> Any:
    """Returns the Hugging Face configuration of a run's models."""
    if config.model.path:
        return settled_configuration(Path(config.model.path))
    if config.data.tokenizer:
        size = len(load_tokenizer(config.data.tokenizer))
    else:
        alphabets = {"arithmetic-compact": arithmetic.COMPACT_ALPHABET, "arithmetic": arithmetic.CHARACTERS}
        size = config.data.vocab_size if config.data.kind == "text" else len(alphabets[config.data.kind]) + 2
    settings = {"vocab_size": size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, **config.model.config}
    return architecture(settings)


def planned_skeleton(config: RunConfig, untied: bool = False) -> PreTrainedModel:
    """Returns a run's model on the meta device; ``untied`` gives it a head of its own.

    Raises:
        ValueError: the sequences are longer than the model can read.
    """
    described = model_config(config)
    check_lengths(dataclasses.asdict(config.data), positions_of(described))
    return skeleton(untied_configuration(described) if untied else described)


def check_stages(config: RunConfig, stages: Iterable[Stage]) -> None:
    """Raises a ValueError that names the stage if one would refuse its model, as far as that can be known without weights or data."""
    described = functools.cache(functools.partial(planned_skeleton, config))
    for stage in stages:
        source = None if stage.model_from is None else stage.inputs[stage.model_from]
        model = described(isinstance(source, Stage) and source.untied)
        try:
            stage.check(model)
        except ValueError as error:
            raise ValueError(f"{stage.title}: {error}") from None
