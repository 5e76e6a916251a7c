"""Every single-stage command reads and writes Hugging Face checkpoint folders."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from undo_core.cli import main
from undo_core.data.tokenizers import train_bpe
from undo_core.io.files import hash_file, read_json


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a user's model and two text files."""
    for name, words in (("retain", "one two three"), ("forget", "uno dos tres")):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{words} {i} {words} {i + 1}" for i in range(60)))
    tokenizer = train_bpe([str(tmp_path / "retain.txt"), str(tmp_path / "forget.txt")], 280)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=280, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
        )
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def undo(*arguments) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def test_the_method_by_hand_in_bfloat16(checkpoint):
    text, stages = [f"--data.{name}=[{checkpoint / name}.txt]" for name in ("retain", "forget")], {}
    for name in ("data", "teacher", "damaged", "student", "attacked", "model"):
        stages[name] = checkpoint / name
    settings = ["--data.kind=text", "--data.length=16", "--data.valid_fraction=0.2", f"--model.path={stages['model']}"]
    undo("prepare", stages["data"], *text, *settings)
    small = ["--train.steps=3", "--train.batch_size=4", "--train.lr=0.001", "--train.step_in_backward=true"]
    master, stochastic = (f"--train.precision=bfloat16-{kind}" for kind in ("master", "stochastic"))
    undo("unlearn", stages["model"], stages["teacher"], stages["data"], "--method=maxent", *small, master)
    undo("noise", stages["teacher"], stages["damaged"])
    undo(
        "distill", stages["teacher"], stages["damaged"], stages["student"], stages["data"], "--recover=null", *small, stochastic
    )
    attack = ["--rates=[0.001]", "--evaluate_at=[0,2]", "--headline_step=2", "--extend=0", "--batch_size=4"]
    undo("relearn", stages["student"], stages["attacked"], stages["data"], *attack, "--precision=bfloat16")
    for folder in (stages["teacher"], stages["damaged"], stages["student"], stages["attacked"] / "rate-0.001"):
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_the_method_by_hand(checkpoint, capsys):
    folder = lambda name: checkpoint / name  # noqa: E731
    files = [f"--data.{name}=[{folder(name)}.txt]" for name in ("retain", "forget")]
    undo(
        "prepare",
        folder("data"),
        "--data.kind=text",
        *files,
        "--data.length=16",
        "--data.valid_fraction=0.2",
        f"--model.path={folder('model')}",
    )
    small = ["--train.steps=3", "--train.batch_size=4", "--train.lr=0.001"]
    undo("unlearn", folder("model"), folder("teacher"), folder("data"), "--method=maxent", *small)
    undo("noise", folder("teacher"), folder("damaged"), "--alpha=0.6", "--beta=0.2", "--seed=5")
    undo("distill", folder("teacher"), folder("damaged"), folder("student"), folder("data"), "--recover=null", *small)
    learn = ("distill", folder("teacher"), folder("damaged"))
    undo("cache", folder("teacher"), folder("cache"), folder("data"), "--batch_size=4")
    undo("cache", folder("teacher"), folder("top"), folder("data"), "--topk=20", "--streamed=true")
    for name, flag in (
        ("of-cache", f"--cache={folder('cache')}"),
        ("streamed", "--streamed=true"),
        ("of-top", f"--cache={folder('top')}"),
    ):
        undo(*learn, folder(name), folder("data"), "--recover=null", *small, flag)
        same = hash_file(folder(name) / "model.safetensors") == hash_file(folder("student") / "model.safetensors")
        assert same == (name != "of-top"), name
    attack = ["--rates=[0.001,0.01]", "--evaluate_at=[0,2]", "--headline_step=2", "--extend=0", "--batch_size=4"]
    undo("relearn", folder("student"), folder("attacked"), folder("data"), *attack)
    capsys.readouterr()
    undo("evaluate", folder("student"), folder("data"))
    metrics = json.loads(capsys.readouterr().out)
    assert (
        set(metrics) == {"retain", "forget"}
        and metrics["retain"]["low"] < metrics["retain"]["value"] < metrics["retain"]["high"]
    )
    for name in ("data", "teacher", "damaged", "student", "attacked/rate-0.001", "attacked/rate-0.01"):
        model = AutoModelForCausalLM.from_pretrained(folder(name))
        assert all(torch.isfinite(p).all() for p in model.parameters())
    curves = read_json(folder("attacked") / "curves.json")
    assert list(curves) == ["0.001", "0.01"] and [point["step"] for point in curves["0.01"]] == [0, 2]
    facts = read_json(folder("damaged") / "manifest.json")
    assert facts["settings"]["alpha"] == 0.6 and facts["inputs"]["model"]["outputs"]["model.safetensors"] == hash_file(
        folder("teacher") / "model.safetensors"
    )

    before = hash_file(folder("teacher") / "model.safetensors")
    undo("unlearn", folder("model"), folder("teacher"), folder("data"), "--method=maxent", *small)
    printed = capsys.readouterr().out
    assert "already there" in printed
    assert printed.splitlines()[-1] == f"to see what it has forgotten: undo evaluate {folder('teacher')} {folder('data')}"
    assert (
        main([str(a) for a in ("unlearn", folder("model"), folder("teacher"), folder("data"), "--method=graddiff", *small)])
        == 2
    )
    assert "made from other inputs" in capsys.readouterr().err and hash_file(folder("teacher") / "model.safetensors") == before


def test_a_wrong_teacher_is_refused(checkpoint, capsys):
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    other.save_pretrained(checkpoint / "other")
    files = [f"--data.{name}=[{checkpoint / name}.txt]" for name in ("retain", "forget")]
    undo(
        "prepare",
        checkpoint / "data",
        "--data.kind=text",
        *files,
        "--data.length=16",
        "--data.valid_fraction=0.2",
        f"--model.path={checkpoint / 'model'}",
    )
    capsys.readouterr()
    arguments = [
        "distill",
        checkpoint / "other",
        checkpoint / "model",
        checkpoint / "out",
        checkpoint / "data",
        "--recover=null",
    ]
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "student: got a vocabulary of 280, wanted the teacher's 300" in error and error.count("\n") == 1
    assert not (checkpoint / "out").exists()
    small = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    small.save_pretrained(checkpoint / "small")
    for arguments in (
        ["evaluate", checkpoint / "small", checkpoint / "data"],
        ["unlearn", checkpoint / "small", checkpoint / "out", checkpoint / "data"],
    ):
        assert main([str(argument) for argument in arguments]) == 2
        assert "wanted ids below the model's vocabulary of 40" in capsys.readouterr().err


def test_a_wrong_cache_is_refused(checkpoint, capsys):
    text = [f"--data.{name}=[{checkpoint / name}.txt]" for name in ("retain", "forget")]
    text += ["--data.kind=text", "--data.length=16", "--data.valid_fraction=0.2", f"--model.path={checkpoint / 'model'}"]
    undo("prepare", checkpoint / "data", *text)
    undo("prepare", checkpoint / "others", *text, "--seed=1")
    undo("noise", checkpoint / "model", checkpoint / "damaged")
    undo("cache", checkpoint / "model", checkpoint / "cache", checkpoint / "data", "--dtype=bfloat16")
    assert "for a student near its teacher" in capsys.readouterr().out
    names = lambda *names: [str(checkpoint / name) for name in names]  # noqa: E731
    for arguments, cache, message in (
        (names("damaged", "model", "out", "data"), "cache", "wanted the cache of this teacher"),
        (names("model", "damaged", "out", "others"), "cache", "made with other validation sequences"),
        (names("model", "damaged", "out", "data"), "data", "wanted a folder made by `undo cache`"),
    ):
        assert main(["distill", *arguments, f"--cache={checkpoint / cache}", "--train.steps=1"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (checkpoint / "out").exists()


def test_a_torn_checkpoint_is_one_line(checkpoint, capsys):
    weights = checkpoint / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert main(["noise", str(checkpoint / "model"), str(checkpoint / "out"), "--alpha=0.5"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("undo: error: ")
        and "model: got " in error
        and "a file may be cut off" in error
        and error.count("\n") == 1
        and not (checkpoint / "out").exists()
    )


def test_a_run_from_a_checkpoint(checkpoint):
    config = checkpoint / "run.yaml"
    train = "{steps: 2, batch_size: 4, lr: 1.0e-3}"
    config.write_text(f"""
name: own
output: {checkpoint / "out"}
data: {{kind: text, retain: [{checkpoint / "retain.txt"}], forget: [{checkpoint / "forget.txt"}], length: 16, valid_fraction: 0.2}}
model: {{path: {checkpoint / "model"}}}
unlearn: {{method: rmu, rmu: {{target_layer: 2}}, train: {train}}}
noise: {{alphas: [0.5]}}
distill: {{train: {train}}}
controls: {{filter: false}}
relearn: {{rates: [1.0e-3], evaluate_at: [0, 2], headline_step: 2, extend: 0, batch_size: 4}}
""")
    undo("run", config)
    results = read_json(checkpoint / "out" / "results-seed0.json")
    assert [m["name"] for m in results["models"]] == ["original", "unlearn", "undo-0.5", "random"] and results["metric"][
        "kind"
    ] == "loss"
    assert (checkpoint / "out" / "report" / "report.html").is_file()
    original = AutoModelForCausalLM.from_pretrained(checkpoint / "model")
    unlearned = AutoModelForCausalLM.from_pretrained(checkpoint / "out" / "stages" / results["models"][1]["stage"])
    changed = {
        n for (n, a), b in zip(original.named_parameters(), unlearned.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}, "RMU trains its matrices alone"


def test_reports_join_seeds(checkpoint, tmp_path):
    assert main(["report", "[nothing.json]", str(tmp_path / "r")]) == 2
    assert not Path(tmp_path / "r").exists()
