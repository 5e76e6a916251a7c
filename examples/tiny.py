"""A model, a tokenizer and text of a few kilobytes, in the place of yours."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "tree",
    "river",
    "sees",
    "hears",
    "finds",
    "red",
    "old",
]


def model(seed: int = 0) -> LlamaForCausalLM:
    """Stands in for ``AutoModelForCausalLM.from_pretrained(...)``."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes))


def tokenizer() -> PreTrainedTokenizerFast:
    """Stands in for ``AutoTokenizer.from_pretrained(...)``; a word is a token."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def texts(count: int, seed: int = 0) -> list[str]:
    """Sentences of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 13, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(4, len(WORDS), (n,), generator=generator)) for n in lengths]


def batch(seed: int, rows: int = 4) -> dict[str, torch.Tensor]:
    """A padded batch, with -100 as the label of padding."""
    made = tokenizer()(texts(rows, seed), return_tensors="pt", padding=True, return_token_type_ids=False)
    return {**made, "labels": made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)}
