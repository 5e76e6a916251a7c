"""Builds tokenizers, so that none must be downloaded."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Fuse
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from undo_core.data.encoding import encoded
from undo_core.data.reading import read_documents

PAD, BOS = "<pad>", "<bos>"


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one token per character.

    Its ids are ``<pad>`` 0, ``<bos>`` 1 (which also ends a text), then the characters of ``alphabet`` in order. The tokenizer
    raises an error for a character outside the alphabet.
    """
    if len(set(alphabet)) < len(alphabet) or not alphabet:
        raise ValueError(f"alphabet: got {alphabet!r}, wanted one or more different characters")
    vocabulary = {PAD: 0, BOS: 1, **{character: index + 2 for index, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))  # without an id, so that unknown characters raise
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=BOS)


def train_bpe(sources: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer of at most ``vocab_size`` tokens, which can encode any text.

    Args:
        sources: as for :func:`undo_core.data.reading.read_documents`.
        vocab_size: at least 258: two special tokens and the 256 bytes.
    """
    alphabet = ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ValueError(
            f"data.vocab_size: got {vocab_size}, wanted at least {len(alphabet) + 2}: two special tokens and 256 bytes"
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=[PAD, BOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(read_documents(sources), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=BOS)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the token ids of ``text`` without special tokens.

    Raises:
        ValueError: the tokenizer has no token for a character.
    """
    (ids,) = encoded(tokenizer, [text])
    if tokenizer.unk_token_id in ids:
        raise ValueError(f"text: got {text!r}, which has a character outside the tokenizer's alphabet")
    return ids
