import json
import sys

import pytest
from transformers import AutoTokenizer

from undo_core.data.text import pack, read_documents, text_splits
from undo_core.data.tokenizers import character_tokenizer, encode, train_bpe

LINES = ["The first document.", "A second one, rather longer than the first.", "세 번째 문서입니다.", "Fourth & last — «done»."]


@pytest.fixture
def sources(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.txt").write_text("\n".join([*LINES[:2], "", *LINES[2:]]) + "\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": line, "id": i}) for i, line in enumerate(LINES)))
    pyarrow.parquet.write_table(pyarrow.table({"text": LINES, "id": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    return tmp_path


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_every_reader_gives_the_documents(sources, ending):
    assert list(read_documents([str(sources / f"a.{ending}")])) == LINES


def test_hub_datasets_are_streamed(monkeypatch):
    class Datasets:
        @staticmethod
        def load_dataset(name, config, *, split, streaming):
            assert (name, config, split, streaming) == ("org/name", "kor", "train", True)
            return iter([{"text": line} for line in LINES])

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert list(read_documents(["hf://org/name:kor"])) == LINES
    Datasets.load_dataset = lambda *_, **__: iter([{"response": line, "text": "a question"} for line in LINES])
    assert list(read_documents(["hf://org/name#response"])) == LINES
    with pytest.raises(
        ValueError, match=r"^hf://org/name#answer, row 1: got no text in the field 'answer' \(the fields response, text\)"
    ):
        list(read_documents(["hf://org/name#answer"]))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'undo-core\[data\]'"):
        list(read_documents(["hf://org/name"]))


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("x.txt", "\n\n", "x.txt: got no document"),
        ("x.csv", "a", "x.csv: got the ending '.csv'"),
        ("x.jsonl", '{"text": "a"}\n{oops', "x.jsonl, line 2: not JSON"),
        ("x.jsonl", '{"body": "a"}', "x.jsonl, line 1: got no text in the field 'text'"),
        ("x.jsonl", "[1]", "x.jsonl, line 1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, content, wanted):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        list(read_documents([str(tmp_path / name)]))
    assert wanted in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        list(read_documents(["nowhere.txt"]))


@pytest.mark.parametrize("length", [2, 5, 7, 64])
def test_packing_keeps_every_token_in_order(length):
    documents = [[10, 11, 12], [20], list(range(30, 47)), [50, 51]]
    sequences = pack(documents, length, separator_id=1, pad_id=0)
    stream = sequences.input_ids.flatten().tolist()
    wanted = [token for document in documents for token in [1, *document]]
    wanted += [1] * (len(wanted) % length > 0)  # the end of the last document, if its sequence has room
    assert [t for t in stream if t] == wanted and all(t == 0 for t in stream[len(wanted) :]) and sequences.length == length
    assert sequences.tokens() == len(wanted) and sequences.lengths.tolist()[:-1] == [length] * (len(sequences) - 1)


def test_every_sequence_can_begin_with_the_separator():
    documents = [[10, 11, 12], [], [20], list(range(30, 41))]
    sequences = pack(documents, 5, separator_id=1, pad_id=0, beginning="sequences")
    assert sequences.input_ids.tolist() == [
        [1, 10, 11, 12, 1], [1, 20, 1, 30, 31], [1, 32, 33, 34, 35], [1, 36, 37, 38, 39], [1, 40, 1, 0, 0]
    ]  # fmt: skip
    assert sequences.lengths.tolist() == [5, 5, 5, 5, 3]
    with pytest.raises(ValueError, match=r"^beginning: got 'x'"):
        pack(documents, 5, separator_id=1, pad_id=0, beginning="x")


def test_the_published_packing_discards_what_overflows():
    sequences = pack([[2, 3, 4], [5, 6, 7], [8, 9]], 6, separator_id=1, pad_id=0, overflow="discard")
    assert sequences.input_ids.tolist() == [[1, 2, 3, 4, 1, 5], [1, 8, 9, 1, 0, 0]]


@pytest.mark.parametrize(
    ("changes", "name"), [({"length": 1}, "length"), ({"overflow": "x"}, "overflow"), ({"documents": []}, "documents")]
)
def test_bad_packing_is_named(changes, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        pack(**{"documents": [[2]], "length": 4, "separator_id": 1, "pad_id": 0, **changes})


def test_bpe_encodes_any_text_and_survives_the_disk(sources, tmp_path):
    tokenizer = train_bpe([str(sources / "a.txt")], 300)
    tokenizer.save_pretrained(tmp_path / "t")
    for text in [*LINES, "unseen ελληνικά \t 🙂"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert AutoTokenizer.from_pretrained(tmp_path / "t").encode(text, add_special_tokens=False) == ids
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, len(tokenizer)) == (0, 1, 300)
    with pytest.raises(ValueError, match=r"^data\.vocab_size: got 100"):
        train_bpe([str(sources / "a.txt")], 100)


def test_characters_survive_the_disk_and_strangers_are_refused(tmp_path):
    tokenizer = character_tokenizer("abc +")
    tokenizer.save_pretrained(tmp_path)
    back = AutoTokenizer.from_pretrained(tmp_path)
    assert encode(back, "a+b c") == encode(tokenizer, "a+b c") == [2, 6, 3, 5, 4] and back.decode([2, 6, 3, 5, 4]) == "a+b c"
    with pytest.raises(ValueError, match=r"^text: got 'a-b'"):
        encode(tokenizer, "a-b")
    with pytest.raises(ValueError, match=r"^alphabet: got"):
        character_tokenizer("aa")


def test_documents_fall_into_splits_by_hash(tmp_path):
    lines = {name: [f"{name} {i} words" for i in range(200)] for name in ("retain", "forget")}
    for name, texts in lines.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(texts + texts[:20]))
    paths = {name: [str(tmp_path / f"{name}.txt")] for name in lines}
    tokenizer = train_bpe(paths["retain"] + paths["forget"], 300)
    make = lambda seed: text_splits(tokenizer, **paths, length=16, valid_fraction=0.2, seed=seed)  # noqa: E731
    splits = make(1)
    assert set(splits) == {f"{s}_{g}" for s in ("train", "valid", "test") for g in ("retain", "forget")}
    for name, texts in lines.items():
        found = {}
        for split in ("train", "valid", "test"):
            sequences = splits[f"{split}_{name}"]
            assert sequences.answer_mask is None
            stream = tokenizer.decode(sequences.input_ids.flatten())
            found[split] = {t for t in stream.replace("<pad>", "").split("<bos>") if t}
        assert set.union(*found.values()) == set(texts) and sum(map(len, found.values())) == 200, (
            "a copy stays with its original"
        )
        assert 15 < len(found["valid"]) < 70
    assert not all(
        (make(2)[k].input_ids.shape == v.input_ids.shape) and bool((make(2)[k].input_ids == v.input_ids).all())
        for k, v in splits.items()
    )
    with pytest.raises(ValueError, match=r"^data\.valid_fraction: got 1e-09"):
        text_splits(tokenizer, **paths, length=16, valid_fraction=1e-9, seed=0)


@pytest.fixture
def mix(tmp_path):
    """Returns a tokenizer with one token per character, and settings for three files of 200 documents of ten characters."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name}{i:09}" for i in range(200)))
    tokenizer = character_tokenizer("abc0123456789")
    settings = {"retain": [str(tmp_path / "a.txt")], "forget": [str(tmp_path / "b.txt")], "length": 11, "valid_fraction": 0.1}
    return tokenizer, settings, {name: str(tmp_path / f"{name}.txt") for name in "abc"}


def first_letters(sequences):
    return ["abc"[token - 2] for token in sequences.input_ids[:, 1].tolist()]


def test_shares_are_of_a_budget_of_tokens(mix):
    tokenizer, settings, paths = mix
    shares = {paths["c"]: 1, paths["a"]: 3}
    splits = text_splits(tokenizer, **{**settings, "retain": shares}, seed=0, tokens=1100)
    letters = [letter for split in ("train", "valid", "test") for letter in first_letters(splits[f"{split}_retain"])]
    assert (letters.count("a"), letters.count("c"), letters.count("b")) == (75, 25, 0)
    assert sum(len(splits[f"{split}_forget"]) for split in ("train", "valid", "test")) == 100
    turned = text_splits(tokenizer, **{**settings, "retain": dict(reversed(shares.items()))}, seed=0, tokens=1100)
    assert turned["train_retain"].digest() == splits["train_retain"].digest(), "a mapping has no order"


def test_a_source_with_too_little_is_read_again_in_training(mix):
    tokenizer, settings, paths = mix
    splits = text_splits(tokenizer, **{**settings, "retain": {paths["a"]: 1.0}}, seed=0, tokens=5500)
    sequences = [splits[f"{split}_retain"] for split in ("train", "valid", "test")]
    assert sum(map(len, sequences)) == 500 and len(set(map(tuple, sequences[0].input_ids.tolist()))) == 200 - len(
        sequences[1]
    ) - len(sequences[2])
    listed = text_splits(tokenizer, **settings, seed=0, tokens=5500)
    assert sum(len(listed[f"{split}_retain"]) for split in ("train", "valid", "test")) == 200, "a list is read once"


def test_no_more_is_read_than_is_taken(mix, monkeypatch):
    tokenizer, settings, _ = mix
    read = 0

    def endless(name, config, **_):
        nonlocal read
        while True:
            read += 1
            yield {"text": f"{'a' if name == 'keep' else 'b'}{read:09}"}

    monkeypatch.setitem(sys.modules, "datasets", type("Datasets", (), {"load_dataset": staticmethod(endless)}))
    text_splits(tokenizer, **{**settings, "retain": ["hf://keep"], "forget": ["hf://drop"]}, seed=0, tokens=4400)
    assert 800 <= read <= 800 + 2 * 256


def test_text_to_distill_on_leaves_out_what_is_held_out(mix):
    tokenizer, settings, paths = mix
    distill = {"sources": [paths["a"], paths["c"]], "tokens": None, "length": 22}
    splits = text_splits(tokenizer, **settings, seed=0, distill=distill, isolated=True)
    assert splits["train_distill"].length == 22 and splits["train_distill"].starts is not None
    documents = {tuple(sequence) for sequence in splits["train_distill"].input_ids.view(-1, 11).tolist()}
    held_out = {tuple(sequence) for split in ("valid", "test") for sequence in splits[f"{split}_retain"].input_ids.tolist()}
    assert held_out and not held_out & documents
    assert {tuple(sequence) for sequence in splits["train_retain"].input_ids.tolist()} < documents
    assert "train_distill" not in text_splits(tokenizer, **settings, seed=0, distill={**distill, "sources": []})


def test_a_tokenizer_without_a_beginning_uses_the_end(mix):
    tokenizer, settings, _ = mix
    tokenizer.bos_token = None
    assert set(text_splits(tokenizer, **settings, seed=0)["train_retain"].input_ids[:, 0].tolist()) == {tokenizer.eos_token_id}
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"^data\.tokenizer: got one without a token"):
        text_splits(tokenizer, **settings, seed=0)
