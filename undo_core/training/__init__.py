"""The training loop, with its settings, batches, losses, optimizers and checkpoints."""

from undo_core.training.batches import Batch, Source, as_source, sequence_source
from undo_core.training.config import TrainConfig
from undo_core.training.loop import DivergedError, TrainResult, train
from undo_core.training.optimizers import bytes_per_parameter

__all__ = [
    "Batch",
    "DivergedError",
    "Source",
    "TrainConfig",
    "TrainResult",
    "as_source",
    "bytes_per_parameter",
    "sequence_source",
    "train",
]
