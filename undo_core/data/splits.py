"""Makes the splits of a run from its data settings."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from transformers import PreTrainedTokenizerBase

from undo_core.data import arithmetic, text, tokenizers
from undo_core.data.question_sequences import question_splits
from undo_core.data.questions import MultipleChoiceConfig
from undo_core.data.sequences import Sequences
from undo_core.models import load_tokenizer

TRAIN_SPLITS = {"retain": "train_retain", "forget": "train_forget", "distill": "train_distill"}


def distilled(splits: Container[str]) -> list[str]:
    """Returns the names of the training data for distillation: its own text if ``splits`` has one, else retain and forget."""
    return ["distill"] if TRAIN_SPLITS["distill"] in splits else ["retain", "forget"]


def heldout_text(splits: Container[str], name: str) -> str:
    """Returns the name of the validation split of text for ``name`` (retain or forget).

    With questions, ``valid_retain`` and ``valid_forget`` hold questions, and the text is in a split of its own.
    """
    beside = f"valid_text_{name}"
    return beside if beside in splits else f"valid_{name}"


def make_splits(
    settings: dict[str, Any], positions: int | None = None
) -> tuple[PreTrainedTokenizerBase, dict[str, Sequences], dict[str, int]]:
    """Makes the tokenizer and the token sequences of every split.

    The splits are train, valid, test and, for some data, heldout, each for retain and forget.

    With questions, valid and test hold the questions. The validation part of the text is then in ``valid_text_retain`` and
    ``valid_text_forget``, and its test part is dropped.

    Args:
        settings: the fields of :class:`undo_core.data.config.DataConfig`, with the seed set.
        positions: number of the model's positions; None if it has no limit.

    Returns:
        Tokenizer, sequences by split, and for each split of questions how many lost their beginning to fit into ``positions``.
    """
    check_lengths(settings, positions)
    tokenizer, splits = _training_splits(settings)
    questions = settings.get("questions")
    if questions is None:
        return tokenizer, splits, {}
    for name in ("retain", "forget"):
        splits[f"valid_text_{name}"] = splits[f"valid_{name}"]
    chosen = {name: MultipleChoiceConfig(**questions[name]) for name in ("retain", "forget")}
    how = {"valid_fraction": questions["valid_fraction"], "seed": settings["seed"], "positions": positions}
    asked, cut = question_splits(tokenizer, chosen, **how)
    return tokenizer, {**splits, **asked}, cut


def check_lengths(settings: dict[str, Any], positions: int | None) -> None:
    """Raises a ValueError, before any text is read, if packed sequences would be longer than the model can read.

    The arguments are those of :func:`make_splits`.
    """
    if positions is None or settings["kind"] == "arithmetic-compact":
        return
    for name, length in (("length", settings["length"]), ("distill.length", settings["distill"]["length"])):
        if length is not None and length - 1 > positions:  # the last token is only a label
            raise ValueError(
                f"data.{name}: got {length}, wanted at most {positions + 1}: the model has {positions} positions, and a "
                "sequence's last token is a label alone"
            )


def _training_splits(settings: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, dict[str, Sequences]]:
    """Makes the tokenizer and splits of the data that a run trains on, without questions."""
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
        parse=settings["special_tokens"] == "parse",
        beginning=settings.get("beginning", "documents"),
    )
