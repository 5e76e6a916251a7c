"""Predicted memory of the stages of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable

from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.needs import Memory
from undo_core.pipeline.predictor import Predictor
from undo_core.pipeline.stage import Stage
from undo_core.planning.models import model_config, row_length

Predict = Callable[[Stage], Memory]


def predictor(config: RunConfig) -> Predict:
    """Memory of a stage of the run; stages read rows of different lengths."""

    @functools.cache
    def of_length(length: int) -> Predictor:
        data = 0 if config.data.kind == "text" else 2 * 2 * 4 * config.data.train_rows * length  # both splits, and their union
        scored = {"answers": config.data.metric == "accuracy", "choices": 4 if config.data.questions else 0}  # as most have
        return Predictor(model_config(config), length, **scored, data_bytes=data)

    return lambda stage: of_length(row_length(config, stage))(stage)
