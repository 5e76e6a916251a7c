"""Control tokens that are written in a text stay text, and those that a tokenizer adds are at the right places."""

import pytest
import torch
from generated_questions import questions, write
from tokenizer_kinds import AROUND, BOS, EOS, KINDS, tokenizer_of
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from undo_core.data.arithmetic import published_splits
from undo_core.data.encoding import control_tokens, encoded, encoded_with_beginning, surroundings
from undo_core.data.question_sequences import question_splits
from undo_core.data.questions import MultipleChoiceConfig
from undo_core.data.text import text_splits
from undo_core.data.tokenizers import character_tokenizer, encode, train_bpe
from undo_core.evaluation import multiple_choice as module
from undo_core.models import build_model

LITERALS = "a<pad> b<bos>c <eos><|user|>"
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 310}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_control_token_in_a_text_is_text_unless_asked(kind):
    tokenizer = tokenizer_of(kind)
    tokenizer.add_tokens([AddedToken("<|user|>", special=True)])
    control = {0, BOS, EOS, len(tokenizer) - 1}
    (ids,) = encoded(tokenizer, [LITERALS])
    assert tokenizer.decode(ids) == LITERALS and len(ids) > 20 and not set(ids) & control
    (parsed,) = encoded(tokenizer, [LITERALS], parse=True)
    assert control < set(parsed) and tokenizer.decode(parsed) == LITERALS
    assert encoded(tokenizer, ["plain"]) == [tokenizer.encode("plain", add_special_tokens=False)]
    assert encoded(tokenizer, []) == []


def test_a_slow_tokenizer_does_the_same():
    tokenizer = ByT5Tokenizer()
    assert encoded(tokenizer, ["</s>", "<pad>"]) == [[token + 3 for token in text.encode()] for text in ("</s>", "<pad>")]
    assert encoded(tokenizer, ["</s>"], parse=True) == [[tokenizer.eos_token_id]]


def test_a_vocabulary_that_has_a_control_token_as_a_piece():
    """Unigram and word vocabularies list the control token among their pieces; it is split, or refused."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in "ab</s>")]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
    assert tokenizer("a</s>b", add_special_tokens=False, split_special_tokens=True)["input_ids"] == [2, 1, 3]
    (ids,) = encoded(tokenizer, ["a</s>b"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<", "/", "s", ">", "b"]
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "s": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="s")
    with pytest.raises(ValueError, match=r"^text: got 'a s a', of which the tokenizer makes a control token"):
        encoded(tokenizer, ["a s a"])


def test_a_trained_tokenizer_and_its_sequences_keep_literals_as_text(tmp_path):
    lines = [f"number {number} writes <pad> and <bos> in a sequence" for number in range(60)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    sources = [str(tmp_path / "a.txt")]
    tokenizer = train_bpe(sources, 300)
    assert tokenizer.decode(encoded(tokenizer, lines[:1])[0]) == lines[0]
    how = {"retain": sources, "forget": sources, "length": 16, "valid_fraction": 0.2, "seed": 0, "isolated": True}
    for parse in (False, True):
        sequences = text_splits(tokenizer, **how, parse=parse)["train_retain"]
        text = sequences.input_ids[sequences.text_mask()]
        documents = int((sequences.starts & sequences.text_mask()).sum()) - 1  # and the end of the last one
        assert bool((text == 0).any()) == parse, "no padding in mid-sequence"
        assert int((text == 1).sum()) - 1 == documents * (1 + parse)
        assert int((sequences.position_ids() == 0).sum()) <= documents + 1 + len(sequences)


def test_a_document_that_brings_its_ends_along_has_them_once(tmp_path):
    tokenizer, lines = tokenizer_of("gpt2"), [f"{'<eos>' * (n % 2)}document {n}{'<eos>' * (n % 3 > 0)}" for n in range(60)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    sources = [str(tmp_path / "a.txt")]
    splits = text_splits(tokenizer, retain=sources, forget=sources, length=16, valid_fraction=0.2, seed=0, parse=True)
    sequences = splits["train_retain"]
    stream = tokenizer.decode(sequences.input_ids[sequences.text_mask()])
    assert "<eos><eos>" not in stream and stream.removesuffix("<eos>").count("<eos>") == stream.count("document") > 20


def test_a_character_without_a_token_is_an_error_and_not_padding():
    tokenizer = character_tokenizer("ab")
    assert encode(tokenizer, "abba") == [2, 3, 3, 2]
    with pytest.raises(ValueError, match=r"^text: got 'abc', which has a character outside the tokenizer's alphabet"):
        encode(tokenizer, "abc")
    with pytest.raises(ValueError, match=r"^text: got 'xa'"):
        encoded(tokenizer, ["ab", "xa"])
    same = tokenizer_of("gpt2")  # its unknown token is its end of text, which it never needs
    assert encode(same, "any text: £") and control_tokens(same).keys() == {0, BOS}


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_put_around_a_text(kind):
    """It also works for a tokenizer that knows few characters, because it is tried on the text itself."""
    assert encoded_with_beginning(character_tokenizer("ab"), ["ba", ""]) == [[3, 2], []]
    before, after = surroundings(tokenizer_of(kind), "Answer")
    around = AROUND.get(kind, "")
    assert (before, after) == ([BOS] * ("<bos>" in around), [EOS] * ("<eos>" in around))
    (ids,) = encoded_with_beginning(tokenizer_of(kind), ["Answer:"])
    assert ids == before + tokenizer_of(kind).encode("Answer:", add_special_tokens=False)
    twice = encoded_with_beginning(tokenizer_of(kind), ["<bos>Answer:"], parse=True)[0]
    assert twice.count(BOS) == 1, "one beginning, also where the text has one"


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return write(tmp_path_factory.mktemp("asked") / "q.jsonl", questions(24, seed=5))


@pytest.fixture(scope="module")
def model():
    made = build_model({"model_type": "llama", **SHAPE}, tokenizer_of("padded"), 0).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return made


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_letter_is_what_is_scored(model, asked, kind):
    """The right answers are those of transformers' logits after the tokens of the prompt."""
    tokenizer, config = tokenizer_of(kind), MultipleChoiceConfig([asked], description="About {subject}. <eos>\n\n")
    right, (found, texts) = [], module.posed(config)
    begin = [BOS] * AROUND.get(kind, "").startswith("<bos>")
    letters = [tokenizer.convert_tokens_to_ids(f"Ġ{letter}") for letter in "ABCD"]
    for question, text in zip(found, texts, strict=True):
        ids = begin + [token for token in tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1, letters]
        right.append(int(logits.argmax()) == question.answer)
        given, added = module.encode(tokenizer, text, " B")
        assert given == ids and added == letters[1:2]
    assert 0 < sum(right) < len(right)
    got = module.multiple_choice(model, tokenizer, config)
    assert got["value"] == sum(right) / len(right)
    sequences, _ = question_splits(tokenizer, {"forget": config}, valid_fraction=0.5, seed=0, positions=None)
    for part in sequences.values():
        assert set(part.choices.flatten().tolist()) == set(letters)
        ends = part.input_ids.gather(1, part.lengths[:, None].long() - 1)[:, 0]
        assert set(ends.tolist()) <= set(letters) and torch.equal(part.input_ids[part.answer_mask], ends)


def test_white_space_before_a_continuation_belongs_to_it():
    """As in lm-eval, because a prompt that ends with a space would be tokenised differently from the whole."""
    tokenizer = tokenizer_of("llama")
    assert module.encode(tokenizer, "Answer: ", "B") == module.encode(tokenizer, "Answer:", " B")
    with pytest.raises(ValueError, match=r"^tokenizer: got no token for ''"):
        module.encode(tokenizer, "Answer:", "")


def test_letters_without_tokens_of_their_own_are_refused(model, asked):
    made = Tokenizer(models.WordLevel({"<unk>": 0, "Answer:": 1}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    with pytest.raises(ValueError, match=r"^tokenizer: got the tokens \[0\] for more than one letter"):
        module.multiple_choice(model, tokenizer, MultipleChoiceConfig([asked], description=""))


def test_arithmetic_takes_a_tokenizer_without_a_beginning_of_text():
    splits = published_splits(tokenizer_of("qwen"), length=32, seed=0, train_rows=8, eval_prompts=8)
    assert splits["train_forget"].input_ids[0, 0] == EOS
    ends = splits["test_retain"].lengths.long()[:, None] - 1
    assert splits["test_retain"].answer_mask.gather(1, ends).all()
    with pytest.raises(ValueError, match=r"^data\.tokenizer: got a ByT5Tokenizer, wanted a fast tokenizer"):
        published_splits(ByT5Tokenizer(), length=32, seed=0, train_rows=8, eval_prompts=8)


def test_bad_settings_are_named(asked):
    from undo_core.data.config import DataConfig

    for make, name in (
        (lambda: MultipleChoiceConfig([asked], special_tokens="x"), ""),
        (lambda: DataConfig(special_tokens="x"), "data."),
    ):
        with pytest.raises(ValueError, match=f"^{name}special_tokens: got 'x', wanted text or parse"):
            make()
