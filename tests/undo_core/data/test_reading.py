"""Files of every format follow one rule, and an error names the file and the row in one line."""

import json
import re
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml

from undo_core.cli import main
from undo_core.data.questions import read_questions
from undo_core.data.reading import read_documents
from undo_core.models import load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
DEMO = Path(__file__).resolve().parents[3] / "configs" / "arithmetic-cpu.yaml"
QUESTION = {"question": "q?", "choices": ["a", "b"], "answer": 0, "subject": "s"}


def parquet(path, values, kind=None):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(values, kind)}), path)


def lines(path, values):
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))


def refusal(path, **how):
    with pytest.raises(ValueError) as error:
        list(read_documents([str(path)], **how))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value).removeprefix(str(path))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_text_with_and_without_a_byte_order_mark(tmp_path, mark, end):
    wanted = ["eins é", "two", " three \u2028 x"]
    (tmp_path / "a.txt").write_bytes(
        mark + end.join(line.encode() for line in [wanted[0], "", wanted[1], "  ", wanted[2]]) + end
    )
    (tmp_path / "a.jsonl").write_bytes(mark + end.join(json.dumps({"text": line}).encode() for line in [*wanted, ""]))
    for ending in ("txt", "jsonl"):
        assert list(read_documents([str(tmp_path / f"a.{ending}")])) == wanted
    (tmp_path / "q.jsonl").write_bytes(mark + json.dumps(QUESTION).encode() + end)
    assert read_questions([tmp_path / "q.jsonl"])[0].question == "q?"
    long = "x" * 3_000_000
    (tmp_path / "long.txt").write_text(f"{long}\n{long}")
    assert list(read_documents([str(tmp_path / "long.txt")])) == [long, long]


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("ok\ncaf\xe9\n".encode("latin-1"), ", line 2: got the byte 0xe9 at 4, which is not UTF-8"),
        ("ok\n".encode("utf-16"), ", line 1: got the byte-order mark of UTF-16 or UTF-32, wanted UTF-8"),
        ("ok\n".encode("utf-32"), ", line 1: got the byte-order mark of UTF-16 or UTF-32, wanted UTF-8"),
        (b"\xfe\xff\0o\0k", ", line 1: got the byte-order mark of UTF-16"),
        ("ok\nab\U0001f642".encode()[:-1], ", line 2: got the byte 0xf0 at 3, which is not UTF-8"),
        (b"\x1f\x8b\x08\x00", ", line 1: got the byte 0x8b at 2"),
        (b"\xed\xa0\x80", ", line 1: got the byte 0xed at 1"),
        ("ok\n".encode("utf-16-le"), ", line 1: got a NUL at character 2, wanted text; UTF-16 without a byte-order mark"),
        ("ok\n".encode("utf-16-be"), ", line 1: got a NUL at character 1, wanted text; UTF-16 without a byte-order mark"),
        (POINTER.encode(), ": got a pointer file of Git LFS"),
    ],
)
def test_what_is_not_utf_8_is_named(tmp_path, ending, content, wanted):
    path = tmp_path / f"a.{ending}"
    if ending == "jsonl":
        content = content.replace(b"ok", b'{"text": "ok"}').replace(b"o\0k", '{"text": "ok"}'.encode("utf-16-le")[:-1])
    path.write_bytes(content)
    assert refusal(path).startswith(wanted)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, "got null in the field 'text', wanted text"),
        ("ab\0c", "got a NUL at character 3"),
        (3, "int"),
        (1.5, "got float|got double"),
        (["a"], "list"),
        ({"a": "b"}, "got dict|got struct"),
        (True, "bool"),
    ],
)
def test_what_is_not_text_is_refused_alike_in_every_format(tmp_path, monkeypatch, value, wanted):
    whole = isinstance(value, (str, type(None)))
    values = ["ok", "", value] if whole else [value]
    place = 3 if whole else 1
    lines(tmp_path / "a.jsonl", values)
    parquet(tmp_path / "a.parquet", values)
    assert re.search(f"^, line {place}: .*({wanted})", refusal(tmp_path / "a.jsonl"))
    assert re.search(f"^, row {place}: .*({wanted})", refusal(tmp_path / "a.parquet"))
    hub = type("Datasets", (), {"load_dataset": staticmethod(lambda *_, **__: iter([{"text": v} for v in values]))})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert re.search(f"^, row {place}: .*({wanted})", refusal("hf://org/name"))
    if isinstance(value, str):
        (tmp_path / "a.txt").write_text("ok\n\n" + value)
        assert re.search(f"^, line 3: .*({wanted})", refusal(tmp_path / "a.txt"))
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTION) + "\n" + json.dumps({**QUESTION, "question": value}))
    with pytest.raises(ValueError, match=r"q\.jsonl, line 2: got "):
        read_questions([tmp_path / "q.jsonl"])
    (tmp_path / "q.jsonl").write_text(json.dumps({**QUESTION, "subject": value}))
    if value is None:
        assert read_questions([tmp_path / "q.jsonl"])[0].subject == ""
    else:
        with pytest.raises(ValueError, match=r"q\.jsonl, line 1: got .* in the field 'subject', wanted text"):
            read_questions([tmp_path / "q.jsonl"])


def test_half_a_character_is_refused_wherever_it_stands(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "whole \\ud83d\\ude42"}\n{"text": "half \\ud83d"}')
    assert refusal(tmp_path / "a.jsonl").startswith(
        ", line 2: got the lone surrogate U+D83D at character 6 in the field 'text'"
    )
    for changes in ({"question": "\ud800"}, {"choices": ["a", "\udfff"]}, {"subject": "x\ud800"}):
        (tmp_path / "q.jsonl").write_text(json.dumps({**QUESTION, **changes}))
        with pytest.raises(ValueError, match=r"q\.jsonl, line 1: got the lone surrogate U\+D"):
            read_questions([tmp_path / "q.jsonl"])


def test_a_parquet_file_with_two_columns_of_one_name(tmp_path):
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet") == ": got the columns text, text, wanted one named 'text'"


def test_damaged_and_other_files_are_named(tmp_path):
    whole = tmp_path / "whole.parquet"
    parquet(whole, [f"row {number} " * 50 for number in range(2000)])
    assert len(list(read_documents([str(whole)]))) == 2000
    data = whole.read_bytes()
    for name, content, wanted in (
        ("torn.parquet", data[: len(data) // 2], ": not Parquet, or cut off or damaged"),
        ("none.parquet", b"text,id\n", ": not Parquet, or cut off or damaged"),
        ("empty.parquet", b"", ": not Parquet, or cut off or damaged"),
        ("pointer.parquet", POINTER.encode(), ": got a pointer file of Git LFS"),
        (
            "garbled.parquet",
            data[:200] + bytes(len(data) // 2) + data[200 + len(data) // 2 :],
            ": not Parquet, or cut off or damaged",
        ),
        ("empty.jsonl", b"", ": got no document"),
        ("deep.jsonl", b"[" * 200_000, ", line 1: not JSON"),
        ("digits.jsonl", b'{"text": ' + b"1" * 9000 + b"}", ", line 1: not JSON"),
        ("torn.jsonl", b'{"text": "a"}\n{"text": "b', ", line 2: not JSON"),
        ("field.jsonl", b'{"body": "a"}', ", line 1: got no text in the field 'text' (the fields body)"),
        ("other.txt.gz", b"\x1f\x8b", ": got the ending '.gz'"),
    ):
        (tmp_path / name).write_bytes(content)
        assert refusal(tmp_path / name).startswith(wanted), name
    parquet(tmp_path / "bytes.parquet", [b"\xff"], pyarrow.binary())
    assert refusal(tmp_path / "bytes.parquet").startswith(", row 1: got binary in the column 'text'")
    raw = pyarrow.array([b"ok", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "latin.parquet")
    assert refusal(tmp_path / "latin.parquet").startswith(", row 2: got bytes that are not UTF-8")
    assert refusal(whole, field="body").startswith(": got the columns text, wanted one named 'body'")
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        parquet(tmp_path / "kind.parquet", ["a", "b", "a"], kind)
        assert list(read_documents([str(tmp_path / "kind.parquet")])) == ["a", "b", "a"]
    for name in ("torn.parquet", "pointer.parquet"):
        with pytest.raises(ValueError, match=name):
            read_questions([tmp_path / name])
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder\.txt, which is not a file"):
        list(read_documents([str(tmp_path / "folder.txt")]))


def test_configurations_and_checkpoints_follow_the_rule(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    for command, content, wanted in (
        ("run", "output: caf\xe9\n".encode("latin-1"), "c.yaml, line 1: got the byte 0xe9"),
        ("plan", yaml.safe_dump({"output": "x"}).encode("utf-16"), "c.yaml, line 1: got the byte-order mark of UTF-16"),
        ("sweep", POINTER.encode(), "c.yaml: got a pointer file of Git LFS"),
        ("plan", b"", "c.yaml: got nothing, wanted a mapping of settings"),
        ("plan", b"5", "c.yaml: got int, wanted a mapping of settings"),
        ("run", b"- data", "c.yaml: got list, wanted a mapping of settings"),
        ("plan", b"data: &again [*again]", "c.yaml: invalid YAML"),
        ("run", b"output: !!python/name:os.system x", "c.yaml: invalid YAML"),
        ("sweep", b'output: "half \\ud83d"', "c.yaml: got the lone surrogate U+D83D"),
        ("plan", b"seed: " + b"9" * 5000, "c.yaml: invalid YAML"),
        ("plan", b"noise: {beta: 0.1, beta: 0.2}", "c.yaml: invalid YAML: got 'beta' more than once"),
        ("sweep", b"name: a\nname: b\n", "c.yaml: invalid YAML: got 'name' more than once"),
    ):
        path.write_bytes(content)
        assert main([command, str(path)]) == 2
        error = capsys.readouterr().err
        assert wanted in error and error.count("\n") == 1
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(json.dumps({"name": "x", "output": str(tmp_path / "o"), "base": str(path), "grid": {"seed": [0]}}))
    for arguments in (["run", f"--config={path}"], ["plan", str(DEMO), "--config", str(path)], ["sweep", str(sweep)]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "c.yaml: invalid YAML" in error and error.count("\n") == 1
    path.write_bytes(b"\xef\xbb\xbfdata: {kind: other}\n")
    assert main(["plan", str(path)]) == 2 and "data.kind" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").write_text(POINTER)
    with pytest.raises(ValueError, match=r"tokenizer\.json: got a pointer file of Git LFS"):
        load_tokenizer(tmp_path)


def test_what_the_model_cannot_read_is_refused_when_prepared(tmp_path, capsys):
    from tokenizer_kinds import tokenizer_of
    from transformers import AutoConfig, AutoModelForCausalLM

    (tmp_path / "a.txt").write_text("".join(f"document {number}\n" for number in range(80)))
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=70)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer_of("gpt2").save_pretrained(tmp_path / "model")
    files = [f"--data.{name}=[{tmp_path / 'a.txt'}]" for name in ("retain", "forget")]
    base = ["--data.kind=text", *files, "--data.valid_fraction=0.3", f"--model.path={tmp_path / 'model'}"]
    llama = {"model_type": "llama", "max_position_embeddings": 40, "hidden_size": 16, "num_hidden_layers": 1} | {
        "num_attention_heads": 2, "intermediate_size": 32,
    }  # fmt: skip
    (tmp_path / "long.yaml").write_text(
        json.dumps({"name": "x", "output": "x", "data": {"kind": "arithmetic", "length": 42}, "model": {"config": llama}})
    )
    assert main(["plan", str(tmp_path / "long.yaml")]) == 2
    assert "error: data.length: got 42, wanted at most 41: the model has 40 positions" in capsys.readouterr().err
    for flags, wanted in (
        (["--data.length=34"], "data.length: got 34, wanted at most 33: the model has 32 positions"),
        (
            ["--data.length=33"],
            "data (train_retain): got token id 2.., wanted ids below the model's vocabulary of 70",
        ),
        (
            ["--model.path=null", f"--model.config={json.dumps(llama)}", "--data.length=42"],
            "data.length: got 42, wanted at most 41",
        ),
        (
            ["--data.length=20", "--data.distill.length=50", f"--data.distill.sources=[{tmp_path / 'a.txt'}]"],
            "data.distill.length: got 50, wanted at most 33",
        ),
    ):
        assert main(["prepare", str(tmp_path / "data"), *base, *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and re.search(re.escape(wanted).replace(r"2\.\.", r"\d+"), error), error
