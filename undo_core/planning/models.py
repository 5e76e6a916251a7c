"""The memory of the models that a configuration describes, and the sizes of their data, without loading weights or data."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

from undo_core.data import arithmetic
from undo_core.data.config import Sources
from undo_core.data.splits import TRAIN_SPLITS, distilled
from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.described import model_config
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.needs import Memory
from undo_core.pipeline.stage import Stage
from undo_core.pipeline.store import Store

Predict = Callable[[Stage], Memory]
TOKEN_BYTES = 4  # of English text with a vocabulary of a pretrained model


def sequence_length(config: RunConfig, stage: Stage) -> int:
    """Returns the number of tokens in a sequence that a stage reads."""
    if config.data.kind == "arithmetic-compact":
        return arithmetic.compact_splits(seed=0, train_rows=2, eval_prompts=2)[1]["train_retain"].length
    own = config.data.distill if stage.own_text else None
    return (own.length if own is not None and own.sources else None) or config.data.length


def distilled_sequences(config: RunConfig, store: Store, prepared: Stage) -> int:
    """Returns the number of sequences that students are distilled on.

    Before the data are prepared it is an upper bound for arithmetic, whose problems may be packed, and an estimate for text: the
    training share of the tokens that the settings allow, but no more than one for each :data:`TOKEN_BYTES` bytes of the files.
    It is 0 for a hub data set without a limit.
    """
    if store.done(prepared):
        splits = store.manifest(prepared)["splits"]
        return sum(splits[name]["rows"] for name in (TRAIN_SPLITS[part] for part in distilled(splits)))
    data = config.data
    if data.kind != "text":
        return 2 * data.train_rows
    other = data.distill
    read = [(other.sources, other.tokens)] if other.sources else [(data.retain, data.tokens), (data.forget, data.tokens)]
    tokens = sum(_tokens(sources, limit) for sources, limit in read) * (1 - 2 * data.valid_fraction)
    return math.ceil(tokens / ((other.length if other.sources else None) or data.length))


def _tokens(sources: Sources, limit: int | None) -> int:
    """Estimates the number of tokens that are read from sources."""
    if isinstance(sources, dict):  # sources with shares are repeated until they have them
        return limit or 0
    if any("://" in source for source in sources):
        return limit or 0
    found = sum(Path(source).stat().st_size for source in sources) // TOKEN_BYTES
    return found if limit is None else min(limit, found)


def predictor(config: RunConfig, ranks: int = 1) -> Predict:
    """Returns a function that predicts the memory of a stage of the run, with one predictor for each sequence length."""
    of = predictor_of(config, ranks)
    return lambda stage: of(stage)(stage)


def predictor_of(config: RunConfig, ranks: int = 1) -> Callable[[Stage], Predictor]:
    """Returns a function from a stage of the run to the predictor for its sequence length, on one of ``ranks`` ranks.

    Raises:
        ValueError: they cannot be divided as ``config.parallel`` says.
    """
    config.parallel.check(ranks)

    @functools.cache
    def of_length(length: int) -> Predictor:
        # The token ids of retain and forget, once apart and once joined. Most questions have four choices.
        data = 0 if config.data.kind == "text" else 2 * 2 * 4 * config.data.train_rows * length
        scored = {"answers": config.data.metric == "accuracy", "choices": 4 if config.data.questions else 0}
        return Predictor(model_config(config), length, **scored, data_bytes=data, ranks=ranks, tensor=config.parallel.tensor)

    return lambda stage: of_length(sequence_length(config, stage))
