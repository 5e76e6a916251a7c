"""Generated multiple-choice questions, files of them, and a tokenizer that has a token for each letter."""

import json
import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from undo_core.data.questions import Question

WORDS = ["virus", "enzyme", "packet", "kernel", "buffer", "protein", "cell", "port", "shell", "spore", "vector", "heap"]


def questions(count, seed=0, subjects=("biology", "computer_security"), choices=(4, 4)):
    draw = random.Random(seed)
    sentence = lambda low, high: " ".join(draw.choices(WORDS, k=draw.randint(low, high)))  # noqa: E731
    made = []
    for _ in range(count):
        asked = sentence(2, 9) + "? "
        answers = tuple(sentence(1, 3) for _ in range(choices[0] if choices[0] == choices[1] else draw.randint(*choices)))
        made.append(Question(asked, answers, draw.randrange(len(answers)), draw.choice(subjects)))
    return made


def write(path, asked):
    path.write_text("".join(json.dumps(vars(question)) + "\n" for question in asked))
    return str(path)


def bytewise_tokenizer():
    """A byte-level BPE tokenizer with a token for each of four letters after a space, and one that it puts before a text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<bos>", "<eos>"], initial_alphabet=alphabet)
    made.train_from_iterator([f"{question.prompt()} {'ABCD'[question.answer]}" for question in questions(50, seed=9)], trainer)
    made.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
