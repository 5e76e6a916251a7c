"""Converts text to token ids with any tokenizer, with control over special tokens around and inside the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager

from transformers import PreTrainedTokenizerBase

from undo_core.io.untrusted import refused


def encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, parse: bool = False) -> list[list[int]]:
    """Returns the token ids of ``texts``, without the special tokens that the tokenizer puts around a text.

    Args:
        tokenizer: any tokenizer of transformers.
        texts: documents or prompts; their contents need not be trusted.
        parse: whether a control token that is written out in a text (``</s>``, ``<pad>``) becomes that token. If not, it is
            encoded as plain text, so that a document that mentions an end-of-text token does not end there.

    Raises:
        ValueError: the tokenizer cannot encode a written-out control token as plain text, or a text has a character for which
            it has no token, not even an unknown one.
    """
    if not texts:
        return []
    texts = list(texts)
    try:
        with _encoding():
            found = tokenizer(texts, add_special_tokens=False, split_special_tokens=not parse)["input_ids"]
    except ValueError as error:
        if "Missing [UNK] token" not in str(error):
            raise
        if len(texts) > 1:
            return [ids for text in texts for ids in encoded(tokenizer, [text], parse=parse)]
        raise ValueError(f"text: got {_shown(texts[0])}, which has a character outside the tokenizer's alphabet") from None
    if parse:
        return found
    control = control_tokens(tokenizer)
    return [
        _as_text(tokenizer, text, control) if not control.keys().isdisjoint(ids) else ids
        for text, ids in zip(texts, found, strict=True)
    ]


def encoded_with_beginning(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, parse: bool = False) -> list[list[int]]:
    """Returns :func:`encoded` with the special tokens that the tokenizer puts before a text, once.

    Those that it puts after a text are left out, because the text continues.
    """
    before, _ = surroundings(tokenizer, max(texts, key=len))
    bare = encoded(tokenizer, texts, parse=parse)
    return [ids if before and ids[: len(before)] == before else [*before, *ids] for ids in bare]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Returns ids and contents of the special tokens, which plain text must not produce; leaves out the unknown token."""
    control = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    control |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    control.pop(tokenizer.unk_token_id, None)
    return control


def surroundings(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Returns the special tokens that the tokenizer puts before and after ``text`` by itself; either may be empty.

    Raises:
        ValueError: the tokenizer cannot encode the text, or does more to it than put tokens around it.
    """
    text = text.strip()[:8] or text  # a few characters are enough to see it
    with _encoding():
        whole, bare = (tokenizer(text, add_special_tokens=add, split_special_tokens=True)["input_ids"] for add in (True, False))
    for first in range(len(whole) - len(bare) + 1):
        if whole[first : first + len(bare)] == bare:
            return whole[:first], whole[first + len(bare) :]
    raise ValueError(
        f"tokenizer: got {whole} for {text!r} and {bare} without special tokens, wanted one that only puts tokens around it"
    )


def separator_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token that separates documents: beginning of text, or end of text if the tokenizer has no beginning.

    Raises:
        ValueError: the tokenizer has neither.
    """
    separator = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if separator is None:
        raise ValueError("data.tokenizer: got one without a token for the beginning or end of a text, wanted one with either")
    return separator


def fill_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id that pads sequences. Any id would do, since sequences record the length of their text."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _as_text(tokenizer: PreTrainedTokenizerBase, text: str, control: dict[int, str]) -> list[int]:
    """Encodes a text that contains a written-out control token as plain text, by cutting the control token into parts."""
    ids: list[int] = []
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        literals = re.compile("|".join(map(re.escape, sorted(control.values(), key=len, reverse=True))))
        with _encoding():
            if backend.normalizer is not None:
                text = backend.normalizer.normalize_str(text)
            pieces = [(text, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(text)
            for piece, _ in pieces:
                cuts = [match.start() + 1 for match in literals.finditer(piece)]
                for first, last in zip([0, *cuts], [*cuts, len(piece)], strict=True):
                    ids += [token.id for token in backend.model.tokenize(piece[first:last])]
    if not ids or not control.keys().isdisjoint(ids):
        raise ValueError(
            f"text: got {_shown(text)}, of which the tokenizer makes a control token even if cut; wanted text without it, or "
            f"special_tokens parse"
        )
    return ids


def _encoding() -> AbstractContextManager[None]:
    """Turns what a tokenizer raises about a text into a ValueError; Rust's errors are of no narrower kind than Exception."""
    return refused("text: got one that the tokenizer cannot encode")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
