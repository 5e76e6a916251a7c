"""Predicts the time of a training step on this machine."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from undo_core.data.sequences import Sequences
from undo_core.models import forward_flops, initialise
from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.described import model_config
from undo_core.training import TrainConfig, sequence_source, train
from undo_core.training.losses import cross_entropy

MEASURED_PARAMETERS = 20_000_000  # models up to this size are timed by real steps
REPEATS = 3
# FLOP rate of a training step relative to bare matrix products of the same width, measured on small models.
MATRIX_EFFICIENCY = 0.5


class Measure:
    """Estimates the seconds of a training step on this machine: from real steps of a small model, else from matrix products."""

    def __init__(self, config: RunConfig, model: PreTrainedModel, parameters: int) -> None:
        self.config, self.model = config, model
        self.real = initialise(model_config(config), 0) if parameters <= MEASURED_PARAMETERS else None
        self.rate = None if self.real is not None else self._matrix_rate()
        self.known: dict[tuple[int, int], float] = {}

    def seconds(self, sequences: int, passes: float, length: int) -> float:
        """Returns the seconds of a step of ``passes`` forward passes on ``sequences`` sequences of ``length`` tokens."""
        if self.real is None:
            return passes * forward_flops(self.model, length) * sequences * length / (self.rate * MATRIX_EFFICIENCY)
        if (sequences, length) not in self.known:
            self.known[sequences, length] = self._step(sequences, length)
        return self.known[sequences, length] * passes / 3

    def _step(self, sequences: int, length: int) -> float:
        ids = torch.randint(
            1, self.model.config.get_text_config().vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0)
        )
        source = {"text": sequence_source(Sequences(ids, pad_id=0), sequences, 0)}
        loss = lambda model, batches, counted: cross_entropy(model, batches["text"], counted["text"])  # noqa: E731
        train(self.real, loss, source, TrainConfig(steps=1, batch_size=sequences), progress=False)  # the first step warms up
        times = []
        for _ in range(REPEATS):  # the fastest, because whatever else the machine does makes a step slower, never faster
            began = time.perf_counter()
            train(self.real, loss, source, TrainConfig(steps=2, batch_size=sequences), progress=False)
            times.append((time.perf_counter() - began) / 2)
        return min(times)

    def _matrix_rate(self) -> float:
        """Measures the FLOP/s of a float32 matrix product at the model's width."""
        width = self.model.config.get_text_config().hidden_size
        device = "cuda" if torch.cuda.is_available() else "cpu"
        a, b = torch.randn(1024, width, device=device), torch.randn(width, 4 * width, device=device)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            float((a @ b)[0, 0])
            times.append(time.perf_counter() - began)
        return 2 * a.shape[0] * width * 4 * width / min(times)


def basis(parameters: int) -> str:
    """Describes how the times of a model with this many parameters were obtained."""
    if parameters <= MEASURED_PARAMETERS:
        return f"two real steps of this model, the fastest of {REPEATS} tries, measured now"
    return f"FLOPs over {MATRIX_EFFICIENCY:.0%} of this machine's matrix-product rate, measured now"
