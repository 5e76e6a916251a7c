"""The shipped configurations for a checkpoint are planned without a network and run end to end at a tiny size."""

import json
import random
import re
import socket
from pathlib import Path

import pytest
import torch
from generated_questions import questions, write
from safetensors.torch import load_file
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, LlamaConfig

from undo_core.cli import main
from undo_core.data.sequences import Sequences
from undo_core.data.tokenizers import train_bpe
from undo_core.io.files import read_json
from undo_core.planning.timing import Measure

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE, WMDP, LANGUAGE, TRIAL = (
    str(ROOT / "configs" / name) for name in ("hf-template.yaml", "wmdp-gemma-2-2b.yaml", "language.yaml", "hf-trial.yaml")
)
WORDS = {
    "retain": "house river garden window morning paper light stone field bread",
    "forget": "socket buffer kernel packet handle thread pointer mutex signal heap",
    "web": "about people history market school music travel weather number letter",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Makes every attempt to open a connection fail."""

    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes a Gemma 2 of two layers in bfloat16, like the published one, and three files of generated text."""
    folder = tmp_path_factory.mktemp("own")
    draw = random.Random(0)
    for name, words in WORDS.items():
        lines = [{"text": " ".join(draw.choices(words.split(), k=draw.randint(8, 30)))} for _ in range(300)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "letters.txt").write_text(" A B C D\n" * 3000)  # a token for each letter
    write(folder / "wmdp.jsonl", questions(20, seed=1, subjects=("",)))
    write(folder / "mmlu.jsonl", questions(30, seed=2)), write(folder / "dev.jsonl", questions(20, seed=3))
    tokenizer = train_bpe([str(folder / f"{name}.jsonl") for name in WORDS] + [str(folder / "letters.txt")], 320)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
    ids = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    Gemma2ForCausalLM(Gemma2Config(**shape, **ids)).bfloat16().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def small(folder, output, batch_size, micro_batch_size):
    """Returns overrides of paths, sizes and steps."""
    sizes = [f"--{stage}.train.{name}" for stage in ("unlearn", "distill") for name in ("steps=3", "lr=0.001")]
    sizes += [f"--unlearn.train.batch_size={batch_size}", f"--distill.train.batch_size={batch_size}"]
    sizes += [
        f"--distill.train.micro_batch_size={micro_batch_size}",
        "--distill.train.eval_every=2",
        "--distill.train.warmup=1",
    ]
    attack = ["--relearn.rates=[0.001]", "--relearn.evaluate_at=[0,2]", "--relearn.headline_step=2", "--relearn.extend=0"]
    return [f"--model.path={folder / 'model'}", f"--output={output}", *sizes, *attack, "--relearn.batch_size=4"]


def results(output):
    assert (output / "report" / "report.html").stat().st_size > 10_000
    found = read_json(
        output / "results-seed42.json" if (output / "results-seed42.json").exists() else output / "results-seed0.json"
    )
    assert [model["name"] for model in found["models"]] == ["original", "unlearn", "undo-0.25"]
    for model in found["models"][1:]:
        assert {t.dtype for t in load_file(output / "stages" / model["stage"] / "model.safetensors").values()} == {
            torch.bfloat16
        }
        assert len(model["attack"]["curves"][0]["forget"]) == 2
    return found


def splits(output):
    (data,) = (output / "stages").glob("prepare-*/data")
    return {path.stem: Sequences.load(path) for path in data.iterdir()}


def test_the_template_runs(folder, tmp_path, capsys):
    files = [f"--data.{name}=[{folder / name}.jsonl]" for name in ("retain", "forget")]
    arguments = [*files, "--data.length=32", *small(folder, tmp_path / "out", 4, 2), "--unlearn.train.micro_batch_size=2"]
    assert main(["plan", TEMPLATE, *arguments]) == 0 and not (tmp_path / "out").exists()
    assert "distill 0.25" in capsys.readouterr().out
    assert main(["run", TEMPLATE, *arguments]) == 0
    results(tmp_path / "out")
    sequences = splits(tmp_path / "out")
    assert set(sequences) == {f"{split}_{group}" for split in ("train", "valid", "test") for group in ("retain", "forget")}
    assert all(part.starts is not None and part.length == 32 for part in sequences.values())
    (prepared,) = (tmp_path / "out" / "stages").glob("prepare-*/model.safetensors")
    assert {t.dtype for t in load_file(prepared).values()} == {torch.bfloat16}, "the checkpoint keeps its dtype"


def test_the_trial_runs(folder, tmp_path):
    files = [f"--data.{name}=[{folder / name}.jsonl]" for name in ("retain", "forget")]
    arguments = [*files, "--data.tokens=2000", *small(folder, tmp_path, 4, 2), "--unlearn.train.warmup=1"]
    assert main(["run", TRIAL, *arguments]) == 0
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    found = read_json(tmp_path / "results-seed0.json")
    assert [model["name"] for model in found["models"]] == ["original", "unlearn", "undo-0.3"]
    assert all(len(model["attack"]["curves"][0]["forget"]) == 2 for model in found["models"][1:])


def test_the_trial_takes_less_than_half_an_hour_on_two_cores(tmp_path, capsys, monkeypatch):
    """A model of 135 million parameters, and the float32 rate of two cores of an Intel Xeon with AVX-512."""
    monkeypatch.setattr(Measure, "_matrix_rate", lambda self: 130e9)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    LlamaConfig(**shape, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True).save_pretrained(tmp_path)
    (tmp_path / "long.txt").write_text("a line of text\n" * 10_000)
    files = [f"--data.{name}=[{tmp_path / 'long.txt'}]" for name in ("retain", "forget")]
    assert main(["plan", TRIAL, f"--model.path={tmp_path}", *files]) == 0
    (minutes,) = re.findall(r"an estimated (\d+) min with 1 worker", capsys.readouterr().out)
    assert 5 < int(minutes) < 30


def test_the_published_wmdp_settings_run(folder, tmp_path, capsys):
    retain = f"--data.retain={{{folder / 'retain'}.jsonl: 0.5, {folder / 'web'}.jsonl: 0.5}}"
    data = [retain, f"--data.forget=[{folder / 'forget'}.jsonl]", "--data.tokens=4000", "--data.valid_fraction=0.1"]
    data += ["--data.length=16", "--data.distill.length=32", "--data.distill.tokens=8000"]
    data += [f"--data.distill.sources={{{folder / 'web'}.jsonl: 0.9, {folder / 'retain'}.jsonl: 0.1}}"]
    for name, file in (("forget.files", "wmdp"), ("retain.files", "mmlu"), ("retain.examples", "dev")):
        data.append(f"--data.questions.{name}=[{folder / file}.jsonl]")
    data.append("--data.questions.valid_fraction=0.3")
    arguments = [*data, *small(folder, tmp_path / "out", 4, 2), "--unlearn.rmu.first_layer=0", "--unlearn.rmu.target_layer=2"]
    assert main(["plan", WMDP, *arguments]) == 0 and not (tmp_path / "out").exists()
    assert main(["run", WMDP, *arguments]) == 0
    found = results(tmp_path / "out")
    sequences = splits(tmp_path / "out")
    assert all(part.starts is None for part in sequences.values())
    assert sequences["train_distill"].length == 32 and sequences["train_retain"].length == 16
    # Distillation uses only that text, so a step has the positions of its sequences.
    (student,) = (tmp_path / "out" / "stages").glob("distill-*/manifest.json")
    assert read_json(student)["positions_by_source"] == {"text": 3 * 4 * 32}
    assert found["models"][2]["training"]["steps"] == 3
    assert found["metric"]["kind"] == "accuracy"
    sizes = {name: len(sequences) for name, sequences in sequences.items() if sequences.choices is not None}
    assert sizes["valid_forget"] + sizes["test_forget"] == 20 and 12 <= sizes["valid_retain"] + sizes["test_retain"] <= 13
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    asked = {name: tokenizer.decode(sequences[f"test_{name}"].input_ids[0]) for name in ("forget", "retain")}
    assert asked["forget"].startswith("The following are multiple choice questions (with answers) about cybersecurity.\n\n")
    assert [text.count("Answer:") for text in asked.values()] == [1, 6], "no example, and five"


def test_the_published_settings_are_the_published_ones(tmp_path, capsys):
    """The shipped sizes with data on the hub are planned without a connection, weights or a tokenizer."""
    Gemma2Config().save_pretrained(tmp_path)  # the defaults are those of 2 billion parameters
    assert main(["plan", WMDP, f"--model.path={tmp_path}"]) == 0
    table = capsys.readouterr().out

    def row(title: str) -> str:
        return " ".join(line for line in table.splitlines() if line.startswith(title))

    # 3000 * 110 * 1024, 90 * 2 * 40 * 256 and 3 * 500 * 20 * 256 positions
    assert " 338M " in row("distill 0.25") and " 1.84M " in row("unlearn rmu")
    assert " 7.68M " in row("relearn undo-0.25, 3 rates")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([WMDP], ["model.path: got checkpoints/gemma-2-2b", "does not exist", "hf download ORG/NAME"]),
        ([LANGUAGE], ["data.tokenizer: got checkpoints/gemma-2-2b", "not a folder"]),
        ([TEMPLATE], ["data.retain", "got no files"]),
        ([TEMPLATE, "--data.retain=[a.txt]", "--data.forget=[b.txt]"], ["a.txt", "not a file"]),
        ([WMDP, "--data.tokens=null"], ["data.tokens: got null with shares in data.retain"]),
        ([WMDP, "--data.retain={a.txt: -1.0}"], ["data.retain: got the share -1.0 for a.txt"]),
        ([WMDP, "--data.distill.length=1"], ["data.distill.length: got 1"]),
        ([WMDP, "--data.tokens=0"], ["data.tokens: got 0"]),
        ([WMDP, "--data.documents=apart"], ["data.documents", "apart"]),
        ([str(ROOT / "configs" / "arithmetic-cpu.yaml"), "--data.documents=isolated"], ["data.documents: got isolated"]),
        ([str(ROOT / "configs" / "arithmetic-cpu.yaml"), "--data.beginning=sequences"], ["data.beginning: got sequences"]),
        ([str(ROOT / "configs" / "arithmetic-cpu.yaml"), "--data.distill.sources=[a.txt]"], ["data.distill.sources: got some"]),
    ],
)
def test_what_is_missing_is_one_line(arguments, wanted, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("plan", "run"):
        assert main([command, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("undo: error: ") and error.count("\n") == 1 and not list(tmp_path.iterdir())
        for word in wanted:
            assert word in error
