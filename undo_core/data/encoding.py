"""Text to token ids, whatever the tokenizer: what it puts around a text by itself, and control tokens that are written out in one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, parse: bool = False) -> list[list[int]]:
    """Token ids of ``texts``, without what the tokenizer puts around a text.

    Args:
        tokenizer: any of transformers.
        texts: documents, prompts; not to be trusted.
        parse: a control token that is written out (``</s>``, ``<pad>``) becomes that token. Otherwise it is text like any other, as it was
            when it was written: nobody ends a document by writing about its end.

    Raises:
        ValueError: a text with a control token that the tokenizer cannot write as text, or with a character that it has no token for, not
            even an unknown one.
    """
    if not texts:
        return []
    texts = list(texts)
    try:
        found = tokenizer(texts, add_special_tokens=False, split_special_tokens=not parse)["input_ids"]
    except Exception as error:  # the Rust tokenizers raise nothing narrower
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
    """:func:`encoded`, after what the tokenizer puts before a text by itself, once.

    What it puts after a text is left out: the text goes on.
    """
    before, _ = surroundings(tokenizer, max(texts, key=len))
    bare = encoded(tokenizer, texts, parse=parse)
    return [ids if before and ids[: len(before)] == before else [*before, *ids] for ids in bare]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Ids and contents of the tokens that no text is made of; the unknown one is not among them."""
    control = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    control |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    control.pop(tokenizer.unk_token_id, None)
    return control


def surroundings(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after ``text`` by itself: a beginning or an end of text, both or neither.

    Raises:
        ValueError: a tokenizer that does more to a text than put tokens around it.
    """
    text = text.strip()[:8] or text  # a few characters show it
    whole, bare = (tokenizer(text, add_special_tokens=add, split_special_tokens=True)["input_ids"] for add in (True, False))
    for first in range(len(whole) - len(bare) + 1):
        if whole[first : first + len(bare)] == bare:
            return whole[:first], whole[first + len(bare) :]
    raise ValueError(
        f"tokenizer: got {whole} for {text!r} and {bare} without special tokens, wanted one that puts special tokens around a text alone"
    )


def separator_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before each document: the beginning of a text, or the end where the tokenizer has no beginning.

    Raises:
        ValueError: it has neither.
    """
    separator = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if separator is None:
        raise ValueError("data.tokenizer: got one without a token for the beginning or end of a text")
    return separator


def fill_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id with which rows are filled up; any would do, since padding is told by its position."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _as_text(tokenizer: PreTrainedTokenizerBase, text: str, control: dict[int, str]) -> list[int]:
    """Token ids of a text whose vocabulary has a control token as a word or piece of its own: it is cut up, and its parts encoded."""
    ids: list[int] = []
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        pieces = [(text, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(text)
        literals = re.compile("|".join(map(re.escape, sorted(control.values(), key=len, reverse=True))))
        for piece, _ in pieces:
            cuts = [match.start() + 1 for match in literals.finditer(piece)]
            for first, last in zip([0, *cuts], [*cuts, len(piece)], strict=True):
                ids += [token.id for token in backend.model.tokenize(piece[first:last])]
    if not ids or not control.keys().isdisjoint(ids):
        raise ValueError(
            f"text: got {_shown(text)}, of which the tokenizer makes a control token however it is cut; wanted text without it, or "
            f"special_tokens parse"
        )
    return ids


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
