"""Reads the sequences of a prepared folder, and evaluates models on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from undo_core.data.sequences import Sequences
from undo_core.data.splits import TRAIN_SPLITS, distilled, heldout_text
from undo_core.evaluation.metrics import evaluate
from undo_core.models import load_model


def split_path(data: Path, split: str) -> Path:
    """Path of a split in a prepared folder."""
    return data / "data" / f"{split}.safetensors"


def load_split(data: Path, split: str) -> Sequences:
    """Loads a split of a prepared folder."""
    return Sequences.load(split_path(data, split))


def train_sequences(data: Path, splits: Sequence[str]) -> Sequences:
    """The training sequences of the named splits, one after the other; a batch mixes them in proportion to their sizes."""
    return Sequences.joined([load_split(data, TRAIN_SPLITS[name]) for name in splits])


def distill_sequences(data: Path) -> Sequences:
    """The sequences that students are distilled on."""
    return train_sequences(data, distilled(_splits(data)))


def heldout_sequences(data: Path, name: str) -> Sequences:
    """The validation text of retain or forget, also in a run that is scored by questions."""
    return load_split(data, heldout_text(_splits(data), name))


def tested_sequences(data: Path) -> dict[str, Sequences]:
    """The test sequences of forget and retain."""
    return {name: load_split(data, f"test_{name}") for name in ("forget", "retain")}


def retain_performance(model: PreTrainedModel, data: Path) -> float:
    """The model's performance on the validation sequences of retain."""
    return evaluate(model, load_split(data, "valid_retain"))["value"]


def evaluate_folder(folder: Path, data: Path) -> dict[str, Any]:
    """Returns every test and held-out metric of the model in ``folder``, by name."""
    model = load_model(folder)
    names = {
        "retain": "test_retain",
        "forget": "test_forget",
        "heldout_retain": "heldout_retain",
        "heldout_forget": "heldout_forget",
    }
    return {name: evaluate(model, load_split(data, split)) for name, split in names.items() if split_path(data, split).exists()}


def _splits(data: Path) -> set[str]:
    return {path.stem for path in (data / "data").glob("*.safetensors")}
