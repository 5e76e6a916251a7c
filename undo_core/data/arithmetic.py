"""Arithmetic data: addition and subtraction are retained, multiplication and division forgotten.

There are two variants. *Compact*, for the demo, has one problem per sequence (``<bos>12+34=46<bos>``) and 17 different tokens.
*Published* follows the generator in the code of arXiv 2506.06278, with our own word problems: equations with spaces and float
quotients, and word problems, packed. In both, ``<bos>`` separates problems and ends an answer, as published.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from undo_core.data import templates
from undo_core.data.encoding import fill_of, separator_of
from undo_core.data.sequences import Sequences
from undo_core.data.text import pack
from undo_core.data.tokenizers import character_tokenizer, encode

OPERATIONS = "+-*/"
GROUPS = {"retain": "+-", "forget": "*/"}
COMPACT_ALPHABET = "0123456789+-*/="
CHARACTERS = " .,;'=+-*/0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

MAX_ADD, MAX_MULTIPLY = 50, 20  # operands of + and - are drawn from 1..50, those of * and / from 1..20


def compact_splits(
    seed: int, train_rows: int, eval_prompts: int = 1000, held_out: float = 0.1
) -> tuple[PreTrainedTokenizerFast, dict[str, Sequences]]:
    """Makes the demo's tokenizer and splits: train, valid, test and heldout, each for retain and forget.

    Operations are drawn uniformly within a group and operands as published; quotients are integers. ``valid_*`` and ``test_*``
    are drawn like the training sequences, as published, so they repeat training problems (a forget group has 720 different
    ones). ``heldout_*`` are drawn from operand pairs that no other split has: the share ``held_out`` of each operation's pairs,
    where ``a + b`` and ``b + a`` count as one. Pairs are held out for each operation independently, so training may contain the
    inverse of a held-out product.

    Args:
        seed: seed of the draws and of the choice of held-out pairs.
        train_rows: problems in each of ``train_retain`` and ``train_forget``.
        eval_prompts: problems in each other split.
        held_out: in [0, 1); 0 makes no held-out splits.
    """
    generator = np.random.default_rng(seed)
    held = _held_pairs(generator, held_out)
    tokenizer = character_tokenizer(COMPACT_ALPHABET)
    longest = max(f"{MAX_ADD}+{MAX_ADD}={2 * MAX_ADD}", f"{MAX_MULTIPLY**2}/{MAX_MULTIPLY}={MAX_MULTIPLY}", key=len)
    splits = {}
    for split in ("train", "valid", "test", "heldout") if held_out else ("train", "valid", "test"):
        for group, operations in GROUPS.items():
            count = train_rows if split == "train" else eval_prompts
            problems = _draw_pairs(generator, operations, count, held if split == "heldout" else ~held)
            splits[f"{split}_{group}"] = _compact_sequences(problems, len(longest) + 2, scored=split != "train")
    return tokenizer, splits


def _held_pairs(generator: np.random.Generator, share: float) -> np.ndarray:
    """Returns ``[4, 51, 51]`` bool: which operand pairs of each operation are held out; symmetric except for division."""
    held = np.zeros((4, MAX_ADD + 1, MAX_ADD + 1), dtype=bool)
    for index, operation in enumerate(OPERATIONS):
        largest = MAX_ADD if operation in "+-" else MAX_MULTIPLY
        pairs = [(a, b) for a in range(1, largest + 1) for b in range(1, largest + 1) if operation == "/" or a <= b]
        for chosen in generator.permutation(len(pairs))[: round(share * len(pairs))]:
            a, b = pairs[chosen]
            held[index, a, b] = True
            if operation != "/":
                held[index, b, a] = True
    return held


def _draw_pairs(generator: np.random.Generator, operations: str, count: int, allowed: np.ndarray) -> np.ndarray:
    """Draws ``[count, 3]`` int64, operation and operands: uniform over the operations, then over the allowed pairs."""
    drawn = np.empty((count, 3), dtype=np.int64)
    drawn[:, 0] = [OPERATIONS.index(o) for o in np.array(list(operations))[generator.integers(0, len(operations), count)]]
    for index in {OPERATIONS.index(o) for o in operations}:
        largest = MAX_ADD if OPERATIONS[index] in "+-" else MAX_MULTIPLY
        pairs = np.argwhere(allowed[index, 1 : largest + 1, 1 : largest + 1]) + 1
        chosen = drawn[:, 0] == index
        drawn[chosen, 1:] = pairs[generator.integers(0, len(pairs), int(chosen.sum()))]
    return drawn


def _compact_sequences(problems: np.ndarray, length: int, scored: bool) -> Sequences:
    ids = np.zeros((len(problems), length), dtype=np.int32)
    answers = np.zeros((len(problems), length), dtype=bool)
    lengths = np.zeros(len(problems), dtype=np.int32)
    token = {character: index + 2 for index, character in enumerate(COMPACT_ALPHABET)}
    for sequence, (operation, a, b) in enumerate(problems.tolist()):
        prompt, answer = _equation(OPERATIONS[operation], a, b)
        tokens = [1, *(token[character] for character in prompt + answer), 1]
        ids[sequence, : len(tokens)] = tokens
        lengths[sequence] = len(tokens)
        answers[sequence, len(prompt) + 1 : len(tokens)] = True
    if not scored:
        return Sequences(torch.from_numpy(ids), 0, lengths=torch.from_numpy(lengths))
    group = torch.from_numpy(problems[:, 0].astype(np.int16))
    return Sequences(
        torch.from_numpy(ids), 0, torch.from_numpy(answers), group, tuple(OPERATIONS), lengths=torch.from_numpy(lengths)
    )


def _equation(operation: str, a: int, b: int) -> tuple[str, str]:
    """Returns prompt and answer. Subtraction puts the larger operand first; division divides ``a * b`` by ``b``."""
    if operation == "-":
        a, b = max(a, b), min(a, b)
    elif operation == "/":
        a *= b
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operation]
    return f"{a}{operation}{b}=", str(result)


@dataclass(frozen=True)
class Problem:
    """A published problem; its text is ``prompt + answer + tail``.

    Attributes:
        prompt: text up to the answer, including the space before it.
        answer: digits; for the quotient of an equation a float, such as ``20.0``.
        tail: for a word problem, a space and the rest of the sentence; empty for an equation.
        operation: one of + - * /.
        kind: equation or word_problem.
    """

    prompt: str
    answer: str
    tail: str
    operation: str
    kind: Literal["equation", "word_problem"]

    @property
    def text(self) -> str:
        return self.prompt + self.answer + self.tail


def problems(kind: str, operations: str, count: int, seed: int = 99, held_out_templates: bool = False) -> Iterator[Problem]:
    """Yields ``count`` published problems of one kind, with operations drawn uniformly; a pure function of the arguments.

    Args:
        kind: equation or word_problem.
        operations: such as ``"+-*/"``.
        count: number of problems.
        seed: seed of the draws; the published files use 99.
        held_out_templates: whether to use the ten held-out templates of each operation instead of the twenty for training.
    """
    if kind not in ("equation", "word_problem"):
        raise ValueError(f"kind: got {kind!r}, wanted equation or word_problem")
    if not operations or set(operations) - set(OPERATIONS):
        raise ValueError(f"operations: got {operations!r}, wanted characters of {OPERATIONS!r}")
    generator = random.Random(f"{seed}/{kind}/{operations}/{held_out_templates}")
    for _ in range(count):
        operation = generator.choice(operations)
        yield (
            _published_equation(generator, operation)
            if kind == "equation"
            else _word_problem(generator, operation, held_out_templates)
        )


def mixture(operations: str, count: int, seed: int = 99) -> list[Problem]:
    """Returns ``count`` problems, half equations and half word problems, shuffled, as in the published training files."""
    drawn = list(problems("equation", operations, count - count // 2, seed)) + list(
        problems("word_problem", operations, count // 2, seed)
    )
    random.Random(f"{seed}/shuffle").shuffle(drawn)
    return drawn


def evaluation_problems(per_operation: int = 100, seed: int = 42) -> list[Problem]:
    """Returns the published evaluation: 100 problems per operation and kind, 800 in all, with held-out templates."""
    return [
        problem
        for operation in OPERATIONS
        for kind in ("equation", "word_problem")
        for problem in problems(kind, operation, per_operation, seed, held_out_templates=True)
    ]


def published_splits(
    tokenizer: PreTrainedTokenizerBase, *, length: int, seed: int, train_rows: int, eval_prompts: int, isolated: bool = False
) -> dict[str, Sequences]:
    """Makes splits of published problems: training sequences packed to ``length``, evaluation sequences with one problem each.

    As published, the templates of word problems are held out from training, and equations are not; there is no held-out split.
    In an evaluation sequence, the tokens of the answer and the one that ends it are scored.

    Args:
        tokenizer: a fast tokenizer with a token for the beginning or the end of a text.
        length: tokens in a packed sequence.
        seed: seed of the draws.
        train_rows: problems in each of ``train_retain`` and ``train_forget``.
        eval_prompts: problems in each other split, divided among operations and kinds.
        isolated: whether packed problems must not attend to each other.

    Raises:
        ValueError: the tokenizer is not fast, or has neither token.
    """
    splits = {}
    separator, fill = separator_of(tokenizer), fill_of(tokenizer)
    if not tokenizer.is_fast:
        raise ValueError(
            f"data.tokenizer: got a {type(tokenizer).__name__}, wanted a fast tokenizer, which tells where an answer begins"
        )
    for group, operations in GROUPS.items():
        train = (encode(tokenizer, problem.text) for problem in mixture(operations, train_rows, seed))
        splits[f"train_{group}"] = pack(train, length, separator, fill, isolated=isolated)
        for split in ("valid", "test"):
            chosen = [
                p
                for p in evaluation_problems(-(-eval_prompts // 4), seed=seed * 2 + (split == "test"))
                if p.operation in operations
            ]
            splits[f"{split}_{group}"] = _scored_sequences(tokenizer, chosen)
    return splits


def _published_equation(generator: random.Random, operation: str) -> Problem:
    a, b = _operands(generator, operation)
    if operation == "-":
        a, b = max(a, b), min(a, b)
    elif operation == "/":
        a *= b
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operation]
    return Problem(f"{a} {operation} {b} = ", str(result), "", operation, "equation")


def _word_problem(generator: random.Random, operation: str, held_out: bool) -> Problem:
    prompt, tail = generator.choice((templates.VALID if held_out else templates.TRAIN)[operation])
    a, b = _operands(generator, operation)
    if operation == "+":
        n1, n2, answer = a, b, a + b
    elif operation == "-":
        n1, n2, answer = a + b, a, b
    elif operation == "*":
        n1, n2, answer = a, b, a * b
    else:
        n1, n2, answer = a * b, a, b
    name, name2 = generator.sample(templates.NAMES, 2)
    fields = {
        "n1": n1,
        "n2": n2,
        "name": name,
        "name2": name2,
        "object": generator.choice(templates.OBJECTS),
        "place": generator.choice(templates.PLACES),
        "container": generator.choice(templates.CONTAINERS),
        "group": generator.choice(templates.GROUPS),
    }
    filled = prompt.format(**fields)
    return Problem(filled[0].upper() + filled[1:], str(answer), " " + tail.format(**fields), operation, "word_problem")


def _operands(generator: random.Random, operation: str) -> tuple[int, int]:
    largest = MAX_ADD if operation in "+-" else MAX_MULTIPLY
    return generator.randint(1, largest), generator.randint(1, largest)


def _scored_sequences(tokenizer: PreTrainedTokenizerBase, chosen: list[Problem]) -> Sequences:
    separator, encoded = separator_of(tokenizer), []
    for problem in chosen:
        # Tokenise the whole text, as in training, because a BPE token may join the answer to the text before it.
        whole = tokenizer(problem.text, add_special_tokens=False, return_offsets_mapping=True)
        start, end = len(problem.prompt), len(problem.prompt) + len(problem.answer)
        inside = [low < end and high > start for low, high in whole["offset_mapping"]]
        first, last = inside.index(True), len(inside) - inside[::-1].index(True)
        tokens = [separator, *whole["input_ids"], separator]
        encoded.append((tokens[: last + 2], first + 1))
    lengths = torch.tensor([len(tokens) for tokens, _ in encoded], dtype=torch.int32)
    ids = torch.full((len(encoded), int(lengths.max())), fill_of(tokenizer), dtype=torch.int32)
    answers = torch.zeros(ids.shape, dtype=torch.bool)
    for sequence, (tokens, start) in enumerate(encoded):
        ids[sequence, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        answers[sequence, start : len(tokens)] = True
    group = torch.tensor([OPERATIONS.index(problem.operation) for problem in chosen])
    return Sequences(ids, fill_of(tokenizer), answers, group, tuple(OPERATIONS), lengths=lengths)
