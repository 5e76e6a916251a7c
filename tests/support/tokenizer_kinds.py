"""One byte-level vocabulary as tokenizers of several kinds, which differ in the tokens that pad, begin and end a text."""

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
KINDS = {
    "gpt2": {"bos_token": "<eos>", "eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "<eos>"},
    "qwen": {"eos_token": "<eos>", "pad_token": "<eos>"},
    "unpadded": {"bos_token": "<eos>", "eos_token": "<eos>"},
    "padded": {"bos_token": "<eos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    "llama": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    "ending": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    "between": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
}
AROUND = {"llama": "<bos> $A", "ending": "$A <eos>", "between": "<bos> $A <eos>"}


@functools.cache
def _trained():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([f"Answer: {letter}" for letter in "ABCD"] * 9, trainer)
    return made.to_str()


def tokenizer_of(kind):
    made = Tokenizer.from_str(_trained())
    if kind in AROUND:
        around = AROUND[kind]
        made.post_processor = processors.TemplateProcessing(around, f"{around} $B", [("<bos>", BOS), ("<eos>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=made, **KINDS[kind])
