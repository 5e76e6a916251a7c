"""The study of a pretrained model: its texts, its configuration at a tiny size, its tables, and the profile of a step."""

import csv
import importlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from undo_core.cli import main
from undo_core.data.sequences import Sequences
from undo_core.data.tokenizers import train_bpe
from undo_core.io.files import read_json

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "gemma-3-270m.yaml")
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SHAPE |= {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "max_position_embeddings": 64}


@pytest.fixture
def arguments(tmp_path):
    """Makes a checkpoint and two texts; returns the arguments of a run with few and short stages."""
    lines = [" ".join(f"{word}{(index * factor) % 7}" for factor in range(1, 12)) for word in "ab" for index in range(120)]
    for name, part in (("keep", lines[:120]), ("forget", lines[120:])):
        (tmp_path / f"{name}.txt").write_text("".join(f"{line} {index}\n" for index, line in enumerate(part)))
    texts = {name: str(tmp_path / f"{name}.txt") for name in ("keep", "forget")}
    tokenizer = train_bpe(list(texts.values()), 300)
    tokenizer.save_pretrained(tmp_path / "model")
    config = AutoConfig.for_model("gemma3_text", vocab_size=300, pad_token_id=0, bos_token_id=1, eos_token_id=1, **SHAPE)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    given = {"model.path": tmp_path / "model", "data.retain": f"[{texts['keep']}]", "data.forget": f"[{texts['forget']}]"}
    given |= {"output": tmp_path / "out", "workers": 1, "data.length": 16, "data.tokens": 3000, "data.valid_fraction": 0.1}
    given |= {"unlearn.train.steps": 2, "unlearn.train.eval_every": 0, "distill.train.steps": 2, "distill.train.warmup": 1}
    given |= {"noise.alphas": "[0.5]", "controls.gate.alphas": "[0.5]", "relearn.rates": "[1e-3, 1e-2]"}
    given |= {"relearn.evaluate_at": "[0, 1]", "relearn.headline_step": 1}
    long = {"rates": [1e-3], "evaluate_at": [0, 1, 3], "headline_step": 3, "extend": 0, "batch_size": 4, "save": False}
    return [CONFIG, *(f"--{name}={value}" for name, value in given.items()), f"--attacks={json.dumps({'long': long})}"]


def test_the_configuration_runs_and_its_tables_hold_what_the_stages_measured(arguments, tmp_path, monkeypatch, capsys):
    study = importlib.import_module("study_budgets")
    into = tmp_path / "results"
    monkeypatch.setattr("sys.argv", ["study_budgets.py", "--into", str(into), *arguments])
    study.main()  # before anything has run
    assert "| undo-0.5 (3 attacks to come) | – | – | – | – | – |" in capsys.readouterr().out

    assert main(["run", *arguments]) == 0
    stages = tmp_path / "out" / "stages"
    for split in stages.glob("prepare-*/data/*.safetensors"):
        assert (Sequences.load(split).input_ids[:, 0] == 1).all(), "every sequence begins with the beginning of a text"
    attacked = [path.parent for path in stages.glob("relearn-*/manifest.json")]
    assert len(attacked) == 4 * 3 and not any(list(folder.glob("*.safetensors")) for folder in attacked)

    study.main()
    table = (into / "table.md").read_text()
    models = {model["name"]: model for model in read_json(tmp_path / "out" / "results-seed0.json")["models"]}
    assert set(models) == {"original", "unlearn", "undo-0.5", "random", "gated-0.5"}
    row = next(line for line in table.splitlines() if line.startswith("| undo-0.5 |"))
    cells = [cell.split(" ")[0] for cell in row.strip("| ").split(" | ")[1:]]
    undone = models["undo-0.5"]
    curves = [*undone["attack"]["curves"], *undone["attacks"]["long"]["curves"]]
    first = min(curve["forget"][1]["value"] for curve in curves)  # after one step, over both attacks
    last = undone["attacks"]["long"]["curves"][0]
    own = [undone["metrics"][part]["value"] for part in ("retain", "forget")]
    wanted = [*own, first, last["forget"][2]["value"], last["retain"][2]["value"]]
    assert cells == [f"{value:.2f}" for value in wanted]
    with open(into / "points.csv") as file:
        points = list(csv.DictReader(file))
    assert len(points) == 2 * (5 + 4 * (2 * 2 + 3)) and (into / "budgets.png").read_bytes()[:4] == b"\x89PNG"


def test_the_texts_are_the_translated_paragraphs(tmp_path, monkeypatch):
    long = {
        "en-US": "Opens the dialog in which you choose a colour.",
        "ko": "색상을 선택할 수 있는 대화 상자를 여는 명령입니다.",
    }
    for language, text in long.items():
        folder = tmp_path / "help" / language / "text" / "a"
        folder.mkdir(parents=True)
        other = "This one was never translated at all."
        page = f'<h1 id="hd_1" dir="auto">x</h1><p id="par_1" class="p">{text} &amp; <b>so</b></p><p id="par_2">{other}</p>'
        (folder / "page.html").write_text(page, encoding="utf-8")
        (folder / "again.html").write_text(page, encoding="utf-8")
    for name in ("e", "k"):
        (tmp_path / name).write_text(f"{name} one\n\n{name} two\n")
    pair = ["--pair", str(tmp_path / "e"), str(tmp_path / "k")]
    monkeypatch.setattr("sys.argv", ["study_texts.py", str(tmp_path / "help"), str(tmp_path / "out"), *pair])
    importlib.import_module("study_texts").main()
    english, korean = ((tmp_path / "out" / f"{name}.txt").read_text("utf-8").splitlines() for name in ("english", "korean"))
    assert sorted(english) == [f"{long['en-US']} & so", "e one", "e two"]
    for one, other in zip(english, korean, strict=True):
        assert other == (f"{long['ko']} & so" if one.startswith("Opens") else one.replace("e ", "k ", 1))


def test_the_profile_times_the_same_step_in_both_loops(tmp_path, monkeypatch, capsys):
    """The parts of undo-core's step give the loss and the gradient of the plain loop's."""
    profile = importlib.import_module("profile_step")
    config = AutoConfig.for_model("gemma3_text", vocab_size=300, **SHAPE)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 300, (2, 9), generator=generator)
    head = profile.head_of(model)
    known = (torch.randn(2, 8, 32, generator=generator, dtype=torch.float64), head)
    for kind in profile.LOSSES:
        gradients = []
        for loss in (profile.fused_loss, profile.plain_loss):
            value = lambda h, loss=loss, kind=kind: loss(kind, h, profile.head_of(model), ids[:, 1:], known)  # noqa: E731
            profile.step(model, ids[:, :-1], value, {})
            gradients.append([parameter.grad for parameter in model.parameters()])
            model.zero_grad()
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    results = tmp_path / "profile.json"
    small = ["--layers", "1", "--vocabulary", "300", "--steps", "1", "--batch", "1", "--length", "8", "--json", str(results)]
    monkeypatch.setattr("sys.argv", ["profile_step.py", *small])
    profile.main()
    found = json.loads(results.read_text())
    assert all(set(times) == set(profile.PARTS) for kind in found["steps"].values() for times in kind.values())
    assert "| whole step |" in capsys.readouterr().out


def test_a_compiled_trunk_is_repaid_by_the_steps_that_it_makes_faster():
    profile = importlib.import_module("profile_step")
    assert profile.compiled_table({"as it is": 2.0, "compiled": 1.5, "warm-up": 50.0}).endswith("| 2.00 | 1.50 | 50.00 | 100 |")
    assert profile.compiled_table({"as it is": 2.0, "compiled": 2.5, "warm-up": 50.0}).endswith("| never |")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", vocab_size=300, **SHAPE))
    found = profile.compiled_trunk(model, torch.ones(1, 4, dtype=torch.long), 1, backend="eager")
    assert found["as it is"] > 0 and found["compiled"] > 0, found
