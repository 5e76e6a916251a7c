"""The splits of a run, from its data settings."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from transformers import PreTrainedTokenizerBase

from undo_core.data import arithmetic, text, tokenizers
from undo_core.data.rows import Rows
from undo_core.models import load_tokenizer

TRAIN_SPLITS = {"retain": "train_retain", "forget": "train_forget", "distill": "train_distill"}


def distilled(splits: Container[str]) -> list[str]:
    """What students are distilled on, of the splits that there are: text of its own, or the whole mix."""
    return ["distill"] if TRAIN_SPLITS["distill"] in splits else ["retain", "forget"]


def make_splits(settings: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, dict[str, Rows]]:
    """Tokenizer and token rows of every split: train, valid and test, each for retain and forget, and held-out where there is one.

    Args:
        settings: the fields of :class:`undo_core.config.DataConfig`, its seed set.
    """
    kind, seed = settings["kind"], settings["seed"]
    if kind == "arithmetic-compact":
        return arithmetic.compact_splits(
            seed=seed, train_rows=settings["train_rows"], eval_prompts=settings["eval_prompts"], held_out=settings["held_out"]
        )
    given = settings["tokenizer"] and load_tokenizer(settings["tokenizer"])
    isolated = settings["documents"] == "isolated"
    if kind == "arithmetic":
        tokenizer = given or tokenizers.character_tokenizer(arithmetic.CHARACTERS)
        return tokenizer, arithmetic.published_splits(
            tokenizer,
            length=settings["length"],
            seed=seed,
            train_rows=settings["train_rows"],
            eval_prompts=settings["eval_prompts"],
            isolated=isolated,
        )
    tokenizer = given or tokenizers.train_bpe([*settings["retain"], *settings["forget"]], settings["vocab_size"])
    return tokenizer, text.text_splits(
        tokenizer,
        retain=settings["retain"],
        forget=settings["forget"],
        length=settings["length"],
        valid_fraction=settings["valid_fraction"],
        seed=seed,
        tokens=settings["tokens"],
        distill=settings["distill"],
        isolated=isolated,
    )
