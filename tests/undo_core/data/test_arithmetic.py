import re
import time
from collections import Counter

import pytest
import torch

from undo_core.data import arithmetic, templates
from undo_core.data.tokenizers import character_tokenizer

SPLITS = [f"{split}_{group}" for split in ("train", "valid", "test", "heldout") for group in ("retain", "forget")]


@pytest.fixture(scope="module")
def compact():
    return arithmetic.compact_splits(seed=7, train_rows=4000, eval_prompts=300)


def texts(tokenizer, sequences):
    return [tokenizer.decode(sequence[sequence != sequences.pad_id]) for sequence in sequences.input_ids]


def parse(text):
    a, op, b, c = re.fullmatch(r"<bos>(\d+)([-+*/])(\d+)=(\d+)<bos>", text).groups()
    return int(a), op, int(b), int(c)


def key(text):
    """Returns the key of a held-out problem, which ignores the order of operands of a commutative operation."""
    a, op, b, _ = parse(text)
    return (op, *((a, b) if op == "/" else sorted((a, b))))


def test_compact_problems_are_right_and_in_range(compact):
    tokenizer, splits = compact
    assert list(splits) == SPLITS and len(tokenizer) == 17
    for name, sequences in splits.items():
        seen = Counter()
        for text in texts(tokenizer, sequences):
            a, op, b, c = parse(text)
            assert eval(f"{a}{op}{b}") == c
            seen[op] += 1
            if op in "+-":
                assert 1 <= b <= 50 and 1 <= a <= 50 and a >= (b if op == "-" else 1)
            else:
                assert 1 <= b <= 20 and 1 <= (a if op == "*" else c) <= 20
        assert set(seen) == set("+-" if "retain" in name else "*/")
        assert min(seen.values()) > 0.4 * len(sequences)


def test_held_out_pairs_are_nowhere_else(compact):
    tokenizer, splits = compact
    seen = {key(text) for name in SPLITS[:6] for text in texts(tokenizer, splits[name])}
    held = {key(text) for name in SPLITS[6:] for text in texts(tokenizer, splits[name])}
    assert held and not seen & held
    division = {k for k in seen | held if k[0] == "/"}
    assert len({k for k in held if k[0] == "/"}) / len(division) == pytest.approx(0.1, abs=0.02)


def test_answers_are_masked_with_their_end(compact):
    tokenizer, splits = compact
    assert splits["train_forget"].answer_mask is None
    sequences = splits["test_forget"]
    for ids, mask, group in zip(sequences.input_ids, sequences.answer_mask, sequences.group, strict=True):
        _, op, _, c = parse(tokenizer.decode(ids[ids != 0]))
        assert tokenizer.decode(ids[mask]) == f"{c}<bos>" and sequences.group_names[group] == op


def test_everything_is_a_function_of_the_seed():
    first, again, other = (arithmetic.compact_splits(seed=s, train_rows=50, eval_prompts=20)[1] for s in (1, 1, 2))
    assert all(torch.equal(first[n].input_ids, again[n].input_ids) for n in SPLITS)
    assert not torch.equal(first["train_retain"].input_ids, other["train_retain"].input_ids)
    assert "heldout_retain" not in arithmetic.compact_splits(seed=1, train_rows=5, eval_prompts=5, held_out=0.0)[1]


def test_a_hundred_thousand_sequences_take_seconds():
    began = time.monotonic()
    arithmetic.compact_splits(seed=0, train_rows=100_000)
    assert time.monotonic() - began < 30


def test_templates():
    for operation in "+-*/":
        train, valid = templates.TRAIN[operation], templates.VALID[operation]
        assert len(train) == 20 and len(valid) == 10 and len({*train, *valid}) == 30
        for prompt, tail in train + valid:
            assert "{n1}" in prompt and "{n2}" in prompt and prompt.endswith(" ") and tail.endswith(".")
    assert len(set(templates.NAMES)) >= 300 and len(set(templates.OBJECTS)) > 190
    assert len(templates.PLACES) == len(set(templates.CONTAINERS)) == len(set(templates.GROUPS)) == 20


@pytest.mark.parametrize("held_out", [False, True])
def test_published_problems(held_out):
    for problem in arithmetic.problems("equation", "+-*/", 500):
        a, op, b, c = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = ([\d.]+)", problem.text).groups()
        assert str(eval(f"{a} {op} {b}")) == c == problem.answer, "a quotient is written as a float"
        assert problem.operation == op and not problem.tail
    tokenizer = character_tokenizer(arithmetic.CHARACTERS)
    for problem in arithmetic.problems("word_problem", "+-*/", 2000, held_out_templates=held_out):
        first, second = (int(n) for n in re.findall(r"\d+", problem.prompt))
        wanted = {
            "+": {first + second},
            "-": {first - second, second - first},
            "*": {first * second},
            "/": {first / second, second / first},
        }
        assert int(problem.answer) in wanted[problem.operation], problem.text
        assert tokenizer.pad_token_id not in tokenizer.encode(problem.text, add_special_tokens=False), problem.text
        assert "{" not in problem.text and problem.text[0].isupper() | problem.text[0].isdigit()


def test_the_published_evaluation():
    chosen = arithmetic.evaluation_problems()
    assert len(chosen) == 800 and Counter((p.operation, p.kind) for p in chosen) == {
        (o, k): 100 for o in "+-*/" for k in ("equation", "word_problem")
    }
    assert chosen == arithmetic.evaluation_problems()
    training = {prompt for table in templates.TRAIN.values() for prompt, _ in table}
    assert not training & {prompt for table in templates.VALID.values() for prompt, _ in table}


def test_published_splits_pack_whole_problems():
    tokenizer = character_tokenizer(arithmetic.CHARACTERS)
    splits = arithmetic.published_splits(tokenizer, length=128, seed=3, train_rows=60, eval_prompts=40)
    stream = "".join(tokenizer.decode(sequence[sequence != 0]) for sequence in splits["train_forget"].input_ids)
    assert stream == "".join("<bos>" + p.text for p in arithmetic.mixture("*/", 60, 3)) + "<bos>"
    isolated = arithmetic.published_splits(tokenizer, length=128, seed=3, train_rows=60, eval_prompts=40, isolated=True)
    assert torch.equal(isolated["train_forget"].input_ids, splits["train_forget"].input_ids)
    assert splits["train_forget"].starts is None
    train = isolated["train_forget"]
    assert torch.equal(train.starts & train.text_mask(), train.input_ids == tokenizer.bos_token_id)
    sequences = splits["test_retain"]
    assert len(sequences) == 40 and sequences.group_names == ("+", "-", "*", "/") and set(sequences.group.tolist()) == {0, 1}
    for ids, mask in zip(sequences.input_ids, sequences.answer_mask, strict=True):
        answer = tokenizer.decode(ids[mask])
        assert re.fullmatch(r"\d+(<bos>| )", answer), answer


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(("sum", "+", 1), "kind"), (("equation", "%", 1), "operations"), (("equation", "", 1), "operations")],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        list(arithmetic.problems(*arguments))
