"""``undo attack``: checkpoints of any architecture and tokenizer in one table, and the folders that other suites read."""

import itertools
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from generated_questions import bytewise_tokenizer, questions, write
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from undo_core.cli import main
from undo_core.data.tokenizers import train_bpe
from undo_core.io.files import read_json
from undo_core.report.defences import merged

SHORT = ["--relearn.rates=[0.01]", "--relearn.evaluate_at=[0,2]", "--relearn.headline_step=2", "--relearn.extend=0"]


def checkpoint(folder, tokenizer, architecture):
    torch.manual_seed(0)
    if architecture == "llama":
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "pad_token_id": 0,
        }
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    else:
        own = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 512, "bos_token_id": 1, "eos_token_id": 1}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, **own))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two text files, a Llama with 300 tokens and a GPT-2 with 400."""
    place = tmp_path_factory.mktemp("lab")
    for name, words in (("retain", "the river Ærø runs"), ("forget", "김 민준 seoul night")):
        (place / f"{name}.txt").write_text("\n".join(f"{words} {i} {words} {i * i}" for i in range(80)), encoding="utf-8")
    files = [str(place / "retain.txt"), str(place / "forget.txt")]
    checkpoint(place / "theirs", train_bpe(files, 300), "llama")
    checkpoint(place / "other", train_bpe(files, 400), "gpt2")
    return place


def attack(place, *checkpoints, output="out", extra=()):
    text = [f"--data.{name}=[{place / name}.txt]" for name in ("retain", "forget")]
    named = [f"{name}={place / name}" for name in checkpoints]
    settings = ["--data.length=24", "--data.valid_fraction=0.2", f"--output={place / output}"]
    return main(["attack", *named, *text, *settings, *SHORT, *extra])


@pytest.fixture(scope="module")
def attacked(place):
    assert attack(place, "theirs", "other", extra=[f"--original=base={place / 'theirs'}"]) == 0
    return place / "out"


def results(folder):
    return read_json(folder / "results-seed0.json")


def test_two_architectures_and_tokenizers_share_one_table(attacked):
    found = results(attacked)
    assert [(model["name"], model["kind"]) for model in found["models"]] == [
        ("base", "original"), ("other", "defence"), ("theirs", "defence"),
    ]  # fmt: skip
    assert found["metric"]["unit"] == "nats/byte"
    base, other, theirs = found["models"]
    assert base["attack"] is None and base["metrics"] == theirs["metrics"]
    for model in (other, theirs):
        assert set(model["attacks"]) == {"quantised", "mixed", "benign", "adapters"}
        worst = min(score["forget"]["value"] for score in model["worst"]["by_attack"].values())
        assert model["worst"]["forget"]["value"] == worst < model["metrics"]["forget"]["value"]
    table = (attacked / "report" / "table.md").read_text()
    assert all(word in table for word in ("| other", "| theirs", "nats/byte", "adapters")) and "nats/token" not in table
    assert (attacked / "report" / "relearning.png").stat().st_size > 10_000 and (attacked / "report" / "report.html").exists()


@pytest.mark.parametrize("name", ["theirs", "other"])
@pytest.mark.parametrize("part", ["retain", "forget"])
def test_a_loss_is_the_sum_of_transformers_losses_over_the_bytes_of_the_text(place, attacked, name, part):
    """The documents are recovered from the tokens."""
    entry = next(model for model in results(attacked)["models"] if model["name"] == name)
    tokens = load_file(attacked / "stages" / entry["stage"] / "data" / f"test_{part}.safetensors")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place / name).double(), AutoTokenizer.from_pretrained(place / name)
    nats, labels, ids = 0.0, 0, []
    for sequence, length in zip(tokens["input_ids"].long(), tokens["lengths"].tolist(), strict=True):
        own = sequence[:length]
        nats += model(input_ids=own[None], labels=own[None]).loss.item() * (length - 1)
        labels += length - 1
        ids += own.tolist()
    ends = [index for index, token in enumerate(ids) if token == ids[0]]  # of the separators
    documents = [tokenizer.decode(ids[begin + 1 : end]) for begin, end in itertools.pairwise(ends)]
    assert ends[-1] == len(ids) - 1 and set(documents) < set((place / f"{part}.txt").read_text(encoding="utf-8").split("\n"))
    size = sum(len(document.encode()) for document in documents)
    assert entry["metrics"][part]["value"] == pytest.approx(nats / labels * len(ids) / size, rel=1e-5)


@pytest.mark.parametrize("part", ["retain", "forget"])
def test_a_token_at_the_beginning_of_every_sequence_is_no_text(place, part):
    """The text is what is left of the tokens; all of it is predicted, so the sum of the losses is exact."""
    assert attack(place, "theirs", output="begun", extra=["--attacks={}", "--data.beginning=sequences"]) == 0
    (entry,) = results(place / "begun")["models"]
    tokens = load_file(place / "begun" / "stages" / entry["stage"] / "data" / f"test_{part}.safetensors")
    model = AutoModelForCausalLM.from_pretrained(place / "theirs").double()
    nats, ids, separator = 0.0, [], tokens["input_ids"][0, 0].item()
    for sequence, length in zip(tokens["input_ids"].long(), tokens["lengths"].tolist(), strict=True):
        own = sequence[:length]
        assert own[0] == separator
        nats += model(input_ids=own[None], labels=own[None]).loss.item() * (length - 1)
        ids += [token for token in own.tolist() if token != separator]
    size = len(AutoTokenizer.from_pretrained(place / "theirs").decode(ids).encode())
    assert len(tokens["input_ids"]) > 2 and entry["metrics"][part]["value"] == pytest.approx(nats / size, rel=1e-5)


def test_a_folder_for_each_checkpoint_has_the_layout_of_tamperbench(attacked):
    folder = attacked / "defences" / "other" / "trial_0"
    summary = read_json(folder / "trial_results.json")
    entry = next(model for model in results(attacked)["models"] if model["name"] == "other")
    assert summary["defense.forget"] == pytest.approx(math.exp(-entry["metrics"]["forget"]["value"]))
    names = {"full_parameter_finetune", "quantised", "mixed", "benign_full_parameter_finetune", "lora_finetune"}
    pools = {name: [] for name in names}
    for path in folder.glob("post_attack/*/*/tamperbench_evaluation/forget/evaluation.json"):
        (row,) = json.loads(path.read_text())
        assert set(row) == {"metric_name", "metric_value"} and row["metric_name"] == "forget_probability"
        pools[path.relative_to(folder).parts[1].rpartition("_")[0]].append(row["metric_value"])
    for name, values in pools.items():
        assert summary[f"post_attack.{name}.forget"] == max(values) and len(values) == (2 if name == "quantised" else 1)
    assert summary["post_attack.forget"] == max(max(values) for values in pools.values())
    assert read_json(folder / "UNDO_SUMMARY.json") == summary
    heat = read_json(attacked / "report" / "heatmap_max_sr.json")
    assert (
        heat["models"] == ["other", "theirs"]
        and heat["attacks"][0] == "no_weight_modification"
        and set(heat["attacks"][1:]) == names
    )
    assert heat["safety_raw"][0][0] == summary["defense.forget"]
    assert heat["safety_raw"][0][heat["attacks"].index("mixed")] == summary["post_attack.mixed.forget"]
    deltas = [[value - row[0] for value in row] for row in heat["utility_raw"]]
    assert heat["utility_delta"] == deltas and all(len(row) == len(heat["attacks"]) for row in heat["safety_raw"])


def test_the_weights_of_attacked_models_are_removed_and_the_same_command_does_nothing(place, attacked, capsys):
    trials = [path.parent for path in attacked.glob("stages/relearn-*/manifest.json")]
    assert len(trials) == 8 and not [path for trial in trials for path in trial.glob("*.safetensors")]
    assert all(read_json(trial / "manifest.json")["removed"] == ["model.safetensors"] for trial in trials)
    before = {path: path.stat().st_mtime_ns for path in attacked.glob("stages/*/manifest.json")}
    table = (attacked / "report" / "table.md").read_text()
    capsys.readouterr()
    assert attack(place, "theirs") == 0
    assert "rate" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in attacked.glob("stages/*/manifest.json")} == before
    assert (attacked / "report" / "table.md").read_text() == table  # the others are still in it


def test_later_calls_add_to_the_table_and_reports_of_two_folders_join(place, attacked, capsys):
    assert attack(place, "other", output="apart", extra=["--attacks={}", "--keep=true"]) == 0
    assert len(list((place / "apart").glob("stages/relearn-*/model.safetensors"))) == 1
    assert main(["report", str(attacked), str(place / "apart"), f"--output={place / 'both'}"]) == 2
    assert "differ in attacks" in capsys.readouterr().err
    assert attack(place, "theirs", output="apart", extra=["--attacks={}"]) == 0
    assert [model["name"] for model in results(place / "apart")["models"]] == ["other", "theirs"]
    assert attack(place, "theirs", output="third", extra=["--attacks={}", "--seed=1"]) == 0
    assert main(["report", str(place / "apart"), str(place / "third"), f"--output={place / 'both'}"]) == 0
    assert [seed["seed"] for seed in read_json(place / "both" / "report.json")["sources"]] == [0, 1]


def test_a_reference_gives_the_compute_slowdown(place, attacked, capsys):
    """The reference is an untrained copy; the original has been trained on the forget text. Without one, a line says why."""
    assert (
        "No compute slowdown: no attacked model is known to be without the capability"
        in (attacked / "report" / "table.md").read_text()
    )
    model, tokenizer = (loader.from_pretrained(place / "theirs") for loader in (AutoModelForCausalLM, AutoTokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ids = tokenizer((place / "forget.txt").read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][:, :400]
    for _ in range(20):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(place / "able")
    tokenizer.save_pretrained(place / "able")
    given = [f"--original={place / 'able'}", f"--reference=scratch={place / 'theirs'}", "--attacks={}"]
    assert attack(place, "other", output="slow", extra=given) == 0
    found = results(place / "slow")
    assert found["slowdown"]["reference"] == "scratch" and set(found["slowdown"]["models"]) == {"other", "scratch"}
    assert [model.get("reference") for model in found["models"]] == [None, None, True]
    table = (place / "slow" / "report" / "table.md").read_text()
    assert "## Compute slowdown" in table and "divided by those of scratch" in table and "No compute slowdown" not in table
    again = [f"--original={place / 'able'}", f"--reference=other={place / 'other'}", "--attacks={}"]
    assert attack(place, "theirs", output="slow", extra=again) == 2
    assert "has scratch as the reference; wanted the same" in capsys.readouterr().err


def test_the_lines_of_progress_are_in_the_unit_of_the_table(place, capsys):
    assert attack(place, "theirs", output="lines", extra=["--attacks={}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  relearn theirs ")]
    curves = results(place / "lines")["models"][0]["attack"]["curves"]
    last = {f"{curve['rate']:g}": {name: curve[name][-1]["value"] for name in ("retain", "forget")} for curve in curves}
    assert len(lines) == len(last) == 1
    for line in lines:
        found = re.fullmatch(r"  relearn theirs (\S+) +\d+ steps  [\d.]+ s  retain ([\d.]+)  forget ([\d.]+) nats/byte", line)
        assert found, line
        assert float(found[2]) == pytest.approx(last[found[1]]["retain"], abs=6e-4)
        assert float(found[3]) == pytest.approx(last[found[1]]["forget"], abs=6e-4)


def test_questions_are_scored_by_accuracy_under_the_name_of_the_suite(place, capsys):
    checkpoint(place / "asked", bytewise_tokenizer(), "gpt2")
    files = {part: write(place / f"{part}.jsonl", questions(30, seed=seed)) for seed, part in enumerate(("forget", "retain"))}
    asked = [f'--data.questions.{part}={{"files": ["{path}"]}}' for part, path in files.items()]
    assert attack(place, "asked", output="accuracy", extra=[*asked, "--attacks={}", "--measures.forget=wmdp"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  relearn asked ")]
    assert lines and all(re.search(r"  retain [\d.]+  forget [\d.]+ %$", line) for line in lines)
    found, folder = results(place / "accuracy"), place / "accuracy" / "defences" / "asked" / "trial_0"
    assert found["metric"]["kind"] == "accuracy" and found["models"][0]["checkpoint"]["tokens_per_byte"] is None
    (row,) = read_json(folder / "defense_eval" / "tamperbench_evaluation" / "wmdp" / "evaluation.json")
    assert row == {"metric_name": "wmdp_accuracy", "metric_value": found["models"][0]["metrics"]["forget"]["value"]}


def test_a_dry_run_prints_the_plan_and_writes_nothing(place, capsys):
    assert attack(place, "theirs", output="dry", extra=["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "adapters theirs, 1 rate " in printed and "Peak memory" in printed and not (place / "dry").exists()


@pytest.mark.parametrize(
    ("checkpoints", "extra", "wanted"),
    [
        ((), (), "arguments are required: attack.checkpoints"),
        (("nowhere",), (), "checkpoints: got"),
        (("theirs", "theirs"), (), "both named theirs; wanted NAME="),
        (("theirs",), ("--original=base",), "original: got base, a folder that does not exist"),
        (("theirs",), ("--reference=base",), "reference: got base, a folder that does not exist"),
        (("theirs",), ("--data.tokens=99",), "data.tokens: got 99, wanted null"),
        (("theirs",), ("--data.tokenizer=x",), "data.tokenizer: got x, wanted null"),
        (("theirs",), ("--data.kind=arithmetic",), "data.kind"),
        (("theirs",), ("--relearn.kind=quantise",), "relearn.kind: got quantise"),
        (("theirs",), ("--measures.forget=a/b",), "measures: got"),
        (("theirs",), ("--measures.forget=retain",), "wanted different names for forget and retain"),
        (("..",), (), "checkpoints: got the name '..'"),
        (("theirs",), ("--relearn.batch_size=8",), "relearn.batch_size: got 8, but base in"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(place, attacked, checkpoints, extra, wanted, capsys):
    before = sorted(path for path in Path(attacked).rglob("*"))
    assert attack(place, *checkpoints, extra=extra) == 2
    error = capsys.readouterr().err
    assert wanted in error and error.count("\n") == 1, error
    assert sorted(path for path in Path(attacked).rglob("*")) == before


def test_a_checkpoint_with_a_nan_is_no_model_that_forgot(place, tmp_path, capsys):
    broken = shutil.copytree(place / "theirs", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    for name in ("retain.txt", "forget.txt"):
        shutil.copy(place / name, tmp_path)
    assert attack(tmp_path, "broken") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("undo: error: ") and "whose model.norm.weight holds NaN" in error, error


def test_no_row_is_replaced_by_other_numbers(place, attacked, tmp_path, capsys):
    """Neither those of another checkpoint or text under the same name, nor those of a run in the same folder."""
    before = {path: path.read_bytes() for path in attacked.rglob("*.json")}

    def refused(*arguments, wanted):
        assert main(["attack", *arguments, "--data.length=24", "--data.valid_fraction=0.2", *SHORT]) == 2
        error = capsys.readouterr().err
        assert wanted in error and error.count("\n") == 1, error

    text, output = [f"--data.{name}=[{place / name}.txt]" for name in ("retain", "forget")], f"--output={attacked}"
    refused(f"theirs={place / 'other'}", *text, output, wanted="checkpoints: got theirs=")
    refused(f"theirs={place / 'other'}", *text, output, "--seed=1", wanted="as it then was; wanted NAME=")
    refused(f"base={place / 'theirs'}", *text, output, wanted="has base as original")
    known = (place / "forget.txt").read_bytes()
    try:
        (place / "forget.txt").write_bytes(known.replace(b"seoul", b"busan"))
        refused(f"third={place / 'theirs'}", *text, output, wanted="data.text: got ")
    finally:
        (place / "forget.txt").write_bytes(known)
    (tmp_path / "results-seed0.json").write_text(json.dumps({"models": [{"kind": "unlearn"}]}))
    refused(str(place / "theirs"), *text, f"--output={tmp_path}", wanted="output: got ")
    assert {path: path.read_bytes() for path in attacked.rglob("*.json")} == before
    first = results(attacked)
    other = {**first, "seed": 1, "models": [{**first["models"][2], "checkpoint": first["models"][1]["checkpoint"]}]}
    with pytest.raises(ValueError, match="two checkpoints named theirs"):
        merged([first, other])


def test_the_first_commands_of_the_guide_run(place, tmp_path, monkeypatch):
    for link, target in {
        "keep.txt": "retain.txt",
        "forget.txt": "forget.txt",
        "their-model": "theirs",
        "base-model": "other",
    }.items():
        (tmp_path / link).symlink_to(place / target)
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).resolve().parents[3] / "docs" / "guides" / "attack.md").read_text()
    for line in guide.split("```bash\n")[1].split("```")[0].splitlines():
        small = ["--data.length=24", "--data.valid_fraction=0.2", "--attacks={}", *SHORT]
        assert main([*shlex.split(line)[1:], *small]) == 0
    assert [entry["name"] for entry in results(tmp_path / "runs" / "attack")["models"]] == ["base-model", "their-model"]


def test_interventions_are_attacks_too(place, capsys):
    """Merging all the way gives the original's loss in nats per byte, and does not count as a worst case."""
    kinds = "{merged: {kind: merge, weights: [1.0]}, pruned: {kind: prune, shares: [0.5], scopes: [global]}}"
    given = [f"--attacks={kinds}", "--retain_margin=0.1"]
    assert attack(place, "theirs", output="with", extra=given) == 2
    assert "attacks.merged.kind: got merge, which needs the original model; wanted --original" in capsys.readouterr().err
    assert attack(place, "theirs", output="with", extra=[*given, f"--original=base={place / 'theirs'}"]) == 0
    base, theirs = results(place / "with")["models"]
    for part in ("forget", "retain"):
        (score,) = theirs["attacks"]["merged"]["curves"][0][part]
        assert score["value"] == pytest.approx(base["metrics"][part]["value"], rel=1e-12)
    assert theirs["worst"]["attack"] in ("relearn", "pruned") and set(theirs["worst"]["by_attack"]) == {
        "relearn",
        "merged",
        "pruned",
    }
    bound = 1.1 * theirs["metrics"]["retain"]["value"]
    assert theirs["worst"]["bounded"]["retain"]["value"] <= bound
    trials = read_json(place / "with" / "defences" / "theirs" / "trial_0" / "trial_results.json")
    assert "post_attack.pruned.forget" in trials and not any("merged" in name for name in trials)
