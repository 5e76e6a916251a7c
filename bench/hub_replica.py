"""Generated data sets in the layout of the Hugging Face hub, for what the published configurations read.

A replica of ``NAME`` is a folder ``NAME`` with the hub's README (its ``configs``), file names and columns, and generated rows.
``datasets.load_dataset(NAME, ..., streaming=True)`` reads such a folder of the working directory as it reads the hub, so the code
under test stays as it is. The columns are those of the hub's data cards in 2025.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LATIN = "abcdefghijklmnopqrstuvwxyz"
SYLLABLES = [chr(code) for code in range(0xAC00, 0xAC00 + 480)]
MAGPIE = [
    *("Magpie-Llama-3.3-Pro-1M-v0.1", "Magpie-Llama-3.1-Pro-1M-v0.1", "Llama-3-Magpie-Pro-1M-v0.1"),
    *("Magpie-Gemma2-Pro-534K-v0.1", "Magpie-Phi3-Pro-1M-v0.1", "Magpie-Qwen2.5-Pro-1M-v0.1", "Magpie-Qwen2-Pro-1M-v0.1"),
]
QUESTIONS = {"wmdp-cyber": 1987, "test": 14042, "dev": 285}  # rows on the hub
SUBJECTS = 57  # of MMLU

Row = dict[str, Any]


def write_replica(folder: Path, documents: int, questions: dict[str, int] | None = None, subjects: int = SUBJECTS) -> None:
    """Writes every data set that the published configurations name.

    Args:
        folder: working directory of the run.
        documents: documents of each text data set; each has 20 to 400 words.
        questions: questions of ``wmdp-cyber``, and of the splits ``test`` and ``dev`` of MMLU; None for as many as on the hub.
        subjects: subjects of MMLU.
    """
    draw = random.Random(0)
    counts = QUESTIONS if questions is None else questions
    crawl = {
        "dump": "CC-MAIN-2024-10",
        "url": "https://example.org/page",
        "file_path": "s3://commoncrawl/warc.gz",
        "language_score": 0.98,
    }
    edu = {**crawl, "language": "en", "token_count": 100, "score": 2.9, "int_score": 3}
    kor = {**crawl, "date": "2024-01-01T00:00:00Z", "language": "kor", "language_script": "Hang", "minhash_cluster_size": 2}
    kor |= {"top_langs": '{"kor_Hang_score": 0.99}', "wordlist_ratio": 0.3}
    english, korean = _texts(draw, list(LATIN)), _texts(draw, SYLLABLES)
    text = lambda texts, more: [{"text": next(texts), "id": f"<urn:uuid:{i}>", **more} for i in range(documents)]  # noqa: E731
    _write(
        folder,
        "HuggingFaceFW/fineweb-edu",
        {"sample-10BT": {"train": "sample/10BT/*"}},
        {"sample/10BT/000_00000": text(english, edu)},
    )
    shards = {f"data/kor_Hang/train/000_0000{i}": text(korean, kor) for i in range(2)}
    _write(folder, "HuggingFaceFW/fineweb-2", {"kor_Hang": {"train": "data/kor_Hang/train/*"}}, shards)
    corpora = ("cyber-forget-corpus", "cyber-retain-corpus", "bio-retain-corpus")
    plain = {f"{name}/train-00000-of-00001": [{"text": next(english)} for _ in range(documents)] for name in corpora}
    _write(folder, "cais/wmdp-corpora", {name: {"train": f"{name}/train-*"} for name in corpora}, plain)
    lines = [{"text": line} for _ in range(documents) for line in ("", " = Title = \n", f" {next(english)} \n")]
    name = "wikitext-2-raw-v1"
    _write(folder, "Salesforce/wikitext", {name: {"train": f"{name}/train-*"}}, {f"{name}/train-00000-of-00001": lines})
    articles = [
        {"id": str(i), "url": "https://en.wikipedia.org/wiki/X", "title": "X", "text": next(english)} for i in range(documents)
    ]
    name = "20231101.en"
    _write(folder, "wikimedia/wikipedia", {name: {"train": f"{name}/train-*"}}, {f"{name}/train-00000-of-00041": articles})
    for name in MAGPIE:
        chats = [_chat(next(english), next(english), i) for i in range(documents)]
        _write(folder, f"Magpie-Align/{name}", {"default": {"train": "data/train-*"}}, {"data/train-00000-of-00001": chats})
    asked = [
        {key: row[key] for key in ("answer", "choices", "question")} for row in _questions(draw, counts["wmdp-cyber"], [""])
    ]
    _write(folder, "cais/wmdp", {"wmdp-cyber": {"test": "wmdp-cyber/test-*"}}, {"wmdp-cyber/test-00000-of-00001": asked})
    named = [f"subject_{i}" for i in range(subjects)]
    parts = {split: _questions(draw, counts[split], named) for split in ("test", "dev")}
    parts |= {"validation": _questions(draw, 10, named), "auxiliary_train": _questions(draw, 10, [""])}
    files = {f"all/{split}-00000-of-00001": rows for split, rows in parts.items()}
    _write(folder, "cais/mmlu", {"all": {split: f"all/{split}-*" for split in parts}}, files)


def _texts(draw: random.Random, characters: list[str]) -> Iterator[str]:
    while True:
        count = draw.randint(20, 400)
        yield " ".join("".join(draw.choices(characters, k=draw.randint(2, 9))) for _ in range(count))


def _chat(asked: str, said: str, number: int) -> Row:
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    return {
        "uuid": str(number),
        "instruction": asked,
        "response": said,
        "conversations": turns,
        "gen_input_configs": {"temperature": 1.0},
    }


def _questions(draw: random.Random, count: int, subjects: list[str]) -> list[Row]:
    words = lambda low, high: " ".join("".join(draw.choices(LATIN, k=5)) for _ in range(draw.randint(low, high)))  # noqa: E731
    return [
        {
            "question": words(6, 30),
            "subject": subjects[i % len(subjects)],
            "choices": [words(1, 8) for _ in range(4)],
            "answer": draw.randrange(4),
        }
        for i in range(count)
    ]


def _write(folder: Path, name: str, configs: dict[str, dict[str, str]], files: dict[str, list[Row]]) -> None:
    import pyarrow
    import pyarrow.parquet

    home = folder / name
    for path, rows in files.items():
        target = home / f"{path}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), target, row_group_size=1000)
    parts = [
        {"config_name": config, "data_files": [{"split": split, "path": path} for split, path in splits.items()]}
        for config, splits in configs.items()
    ]
    (home / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': parts})}---\n# {name}, generated\n")


def large_tokenizer(size: int = 256_000) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of ``size`` entries, Gemma's special tokens among them, whose merges are all pairs of its characters.

    Text made of them uses the whole vocabulary, at about two characters a token.
    """
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    capitals = [letter.upper() for letter in LATIN]
    others = [chr(code) for code in range(33, 127) if not chr(code).isalpha()]
    characters = [" ", *LATIN, *SYLLABLES, *capitals, *others, "\n"]
    pairs = [(a, b) for a in characters for b in characters if not {a, b} & {"\n", " "} or a == " " != b]
    pairs.sort(key=lambda pair: pair[0] != " ")  # a space and a letter first, as A to D after "Answer:" must be one token
    pairs = pairs[: size - len(special) - len(characters)]
    vocabulary = {token: i for i, token in enumerate([*special, *characters, *(a + b for a, b in pairs)])}
    for index in range(len(vocabulary), size):
        vocabulary[f"<unused{index}>"] = index
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    made.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", vocabulary["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
