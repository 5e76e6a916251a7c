"""A run with several attacks, and the command that attacks a checkpoint."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from stage_kinds import KINDS, NOWHERE
from transformers import AutoModelForCausalLM

from undo_core.attacks import AttackConfig, worst_of
from undo_core.cli import main
from undo_core.io.files import read_json
from undo_core.pipeline.prepared import evaluate_folder
from undo_core.pipeline.stage import Folder, Work
from undo_core.pipeline.stages import Relearn
from undo_core.pipeline.stages import relearn as stage_file
from undo_core.planning.fit import cheapest_fit
from undo_core.training import TrainResult

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("peft", "torchao"))), reason="peft or torchao is not installed"
)
SCORES = {f"{name}{end}": 0.5 for name in ("forget", "retain") for end in ("", "_low", "_high")}
RUN = """
name: attacked
output: {output}
data: {{kind: arithmetic-compact, train_rows: 300, eval_prompts: 40}}
model:
  config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64}}
pretrain: {{train: {{steps: 4, batch_size: 16, lr: 1.0e-3}}}}
unlearn: {{train: {{steps: 2, batch_size: 8, lr: 1.0e-3}}}}
noise: {{alphas: [0.5]}}
distill: {{recover: null, train: {{steps: 2, batch_size: 16, lr: 1.0e-3}}}}
controls: {{filter: false, random: false}}
relearn: {{rates: [1.0e-3], evaluate_at: [0, 2], headline_step: 2, extend: 0, batch_size: 8}}
attacks:
  same: {{rates: [1.0e-3], evaluate_at: [0, 2], headline_step: 2, extend: 0, batch_size: 8}}
  mixed: {{rates: [1.0e-3], evaluate_at: [0, 3], headline_step: 3, extend: 1, batch_size: 8, mix: {{forget: 0.5, retain: 0.5}}, seeds: 2}}
  adapters: {{kind: lora, rates: [1.0e-2], evaluate_at: [0, 2], headline_step: 2, extend: 0, batch_size: 8, lora: {{rank: 2}}}}
  prompted: {{kind: fewshot, shots: [2, 1]}}
  rounded: {{kind: quantise, group_size: 16}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns the folder and the configuration of a finished run."""
    folder = tmp_path_factory.mktemp("attacked")
    config = folder / "run.yaml"
    config.write_text(RUN.format(output=folder / "out"))
    assert main(["run", str(config)]) == 0
    return folder / "out", config


def test_every_model_is_under_every_attack(finished):
    output, _ = finished
    results = read_json(output / "results-seed0.json")
    original, *models = results["models"]
    assert original["attack"] is None and "attacks" not in original and "worst" not in original
    assert [model["name"] for model in models] == ["unlearn", "undo-0.5"]
    for model in models:
        attacks = model["attacks"]
        assert [(name, attack["kind"], attack["steps"], attack["headline_step"]) for name, attack in attacks.items()] == [
            ("same", "finetune", [0, 2], 2),
            ("mixed", "finetune", [0, 3], 3),
            ("adapters", "lora", [0, 2], 2),
            ("prompted", "fewshot", [0], 0),
            ("rounded", "quantise", [0], 0),
        ]
        assert set(model["attack"]) <= set(attacks["same"]) and set(model["attack"]["curves"][0]) == {
            "rate",
            "stage",
            "forget",
            "retain",
            "flops",
        }
        settings = {name: [curve["setting"] for curve in attack["curves"]] for name, attack in attacks.items()}
        assert settings["prompted"] == ["shots-1", "shots-2"] and settings["rounded"] == ["int8", "int4"]
        assert settings["adapters"] == ["rate-0.01"] and len(settings["mixed"]) == 4, "two orders, and one more rate for both"
        assert attacks["mixed"]["extended"] and len(attacks["mixed"]["rates"]) == 2
        assert [curve["seed"] for curve in attacks["mixed"]["curves"]] == [0, 1, 0, 1]
        for attack in attacks.values():
            for curve in attack["curves"]:
                assert len(curve["forget"]) == len(curve["retain"]) == len(attack["steps"])
                assert all(point["n"] == 40 and point["low"] <= point["value"] <= point["high"] for point in curve["forget"])
        assert model["worst"] == worst_of(model, results["metric"])
        assert model["worst"]["forget"]["value"] == max(
            curve["forget"][attack["steps"].index(attack["headline_step"])]["value"]
            for attack in [*attacks.values(), {**model["attack"], "headline_step": 2}]
            for curve in attack["curves"]
        )


def test_an_attack_like_the_headline_one_is_not_made_twice(finished):
    for model in read_json(finished[0] / "results-seed0.json")["models"][1:]:
        assert model["attacks"]["same"]["curves"][0]["stage"] == model["attack"]["curves"][0]["stage"]


def test_attacked_models_are_ordinary_checkpoints_and_probes_leave_a_manifest(finished):
    output, _ = finished
    results = read_json(output / "results-seed0.json")
    curve = results["models"][1]["attacks"]["adapters"]["curves"][0]
    folder = output / "stages" / curve["stage"]
    names = {name for name, _ in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
    base = output / "stages" / results["models"][1]["stage"]
    assert names == {name for name, _ in AutoModelForCausalLM.from_pretrained(base).named_parameters()}
    (prepared,) = (output / "stages").glob("prepare-*")
    merged = evaluate_folder(folder, prepared)
    assert merged["forget"]["value"] == pytest.approx(curve["forget"][-1]["value"], abs=1 / 40)
    for probe in (output / "stages").glob("probe-*"):
        assert [path.name for path in probe.iterdir()] == ["manifest.json"]
        assert read_json(probe / "manifest.json")["predicted_bytes"] > 0
    mixed = [read_json(path) for path in (output / "stages").glob("relearn-*/manifest.json")]
    shares = [facts["positions_by_source"] for facts in mixed if "mix" in facts["settings"]]
    assert shares and all(positions["forget"] == positions["retain"] > 0 for positions in shares)


def test_a_second_run_does_nothing_and_further_attacks_share_what_is_there(finished, monkeypatch):
    output, config = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    made = []
    for kind in KINDS:
        monkeypatch.setattr(kind, "run", lambda self, work, run=kind.run: made.append(self.kind) or run(self, work))
    assert main(["run", str(config)]) == 0 and not made
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before
    assert main(["run", str(config), "--attacks.prompted.shots=[1, 2, 3]"]) == 0 and made == ["probe"] * 2


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--attacks={bad name: {}}"], "attacks: got the name 'bad name'"),
        (["--attacks={relearn: {}}"], "attacks: got the name 'relearn'"),
        (["--relearn.kind=fewshot"], "relearn.kind: got fewshot, wanted finetune or lora"),
        (
            ["--attacks.prompted.shots=[2, 40]"],
            "attacks.prompted.shots: got 40, whose sequences take at least 246 positions of the model's 64",
        ),
    ],
)
def test_a_mistake_is_one_line_before_any_work(finished, tmp_path, capsys, flags, wanted):
    _, config = finished
    capsys.readouterr()
    assert main(["run", str(config), f"--output={tmp_path / 'out'}", *flags]) == 2 and not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert error.startswith("undo: error: ") and wanted in error and error.count("\n") == 1


def test_the_command_attacks_a_checkpoint_in_every_way(finished, tmp_path, capsys):
    output, _ = finished
    results = read_json(output / "results-seed0.json")
    model = output / "stages" / results["models"][1]["stage"]
    (prepared,) = (output / "stages").glob("prepare-*")
    short = ["--evaluate_at=[0,2]", "--headline_step=2", "--extend=0", "--batch_size=8"]
    made = {
        "adapters": ["--kind=lora", "--lora.rank=2", "--rates=[0.01]", *short],
        "momentum": ["--optimizer=sgd", "--beta1=0.8", "--rates=[0.1]", "--seeds=2", "--mix={retain: 1.0}", *short],
        "prompted": ["--kind=fewshot", "--shots=[1,3]"],
        "rounded": ["--kind=quantise", "--bits=[4]", "--group_size=8"],
    }
    wanted = {"adapters": ["0.01"], "momentum": ["0.1", "0.1-seed-1"], "prompted": ["shots-1", "shots-3"], "rounded": ["int4"]}
    for name, flags in made.items():
        assert main(["relearn", str(model), str(tmp_path / name), str(prepared), *flags]) == 0
        curves = read_json(tmp_path / name / "curves.json")
        assert list(curves) == wanted[name] and all(curve[-1]["forget"]["n"] == 40 for curve in curves.values())
    assert json.loads((tmp_path / "rounded" / "int4" / "manifest.json").read_text())["quantised"] > 0


@pytest.mark.parametrize(("attack", "left"), [("same", slice(0, 1)), ("same", slice(1, None)), ("prompted", slice(0, 0))])
def test_a_curve_without_its_steps_names_its_file(finished, tmp_path, capsys, attack, left):
    output, config = finished
    copied = Path(shutil.copytree(output, tmp_path / "out"))
    attacked = read_json(output / "results-seed0.json")["models"][1]
    damaged = copied / "stages" / attacked["attacks"][attack]["curves"][0]["stage"] / "manifest.json"
    facts = read_json(damaged)
    damaged.write_text(json.dumps({**facts, "curve": facts["curve"][left]}))
    capsys.readouterr()
    assert main(["run", str(config), f"--output={copied}"]) == 2
    said = capsys.readouterr().err
    assert f"undo: error: {damaged}: got a curve with the steps [" in said and "Traceback" not in said


def test_the_plan_has_a_line_for_each_attack(finished, capsys):
    _, config = finished
    capsys.readouterr()
    assert main(["plan", str(config)]) == 0
    table = capsys.readouterr().out
    lines = {"same undo-0.5, 1 rate", "mixed unlearn, 2 trials", "adapters unlearn, 1 rate", "prompted unlearn, 2 trials"}
    for line in lines | {"relearn unlearn, 1 rate", "rounded undo-0.5, 2 trials"}:
        (row,) = [row for row in table.splitlines() if row.startswith(f"{line} ") and "done" in row]
        assert ("probe" in row) == ("prompted" in line or "rounded" in line)


@pytest.mark.parametrize(("optimizer", "swapped"), [("adamw", True), ("sgd", False)])
def test_what_makes_an_attack_fit(optimizer, swapped):
    """Settings that the stage leaves out have their defaults; another optimizer is another attack and is not suggested."""
    stage = Relearn(config=AttackConfig(seed=0, optimizer=optimizer), prepared=NOWHERE, model=NOWHERE)
    saved = {"micro_batch_size": 4, "activation_checkpointing": 1}
    need = lambda changes: 10 - sum(saved.get(name, 0) for name in changes)  # noqa: E731
    assert cheapest_fit(stage, 9, need)[0].changes == {"activation_checkpointing": True}
    fit, _ = cheapest_fit(stage, 6, need)
    assert fit.changes == {"micro_batch_size": 32}
    tried = []
    cheapest_fit(stage, 0, lambda changes: tried.append(changes) or 1)
    assert any("optimizer" in changes for changes in tried) == swapped


def test_rates_of_one_attack_share_their_first_evaluation(tmp_path, monkeypatch):
    """Another model, precision or kind does not."""
    known = []

    def attack(model, known_at_start, **options):
        known.append(known_at_start)
        return TrainResult(positions={"forget": 1}, history=[{"step": 0, **SCORES}])

    monkeypatch.setattr(stage_file, "attack", attack)
    for name in ("load_to_train", "train_sequences"):
        monkeypatch.setattr(stage_file, name, lambda *_: SimpleNamespace(length=8))
    monkeypatch.setattr(stage_file, "tested_sequences", lambda _: {"forget": range(5), "retain": range(5)})
    monkeypatch.setattr(stage_file, "training_facts", lambda *_: {})
    monkeypatch.setattr(stage_file, "forward_flops", lambda *_: 1.0)
    work = Work({"prepared": tmp_path, "model": tmp_path}, tmp_path, tmp_path, "relearn")
    for name in ("one", "other"):
        (tmp_path / f"{name}.txt").write_text(name)
    for model in (Folder(tmp_path, ("one.txt",)), Folder(tmp_path, ("other.txt",))):
        for settings in ({"rates": [1e-3]}, {"rates": [2e-3]}, {"precision": "bfloat16-stochastic"}, {"kind": "lora"}):
            config = AttackConfig(seed=0, save=False, **settings)
            Relearn(config=config, prepared=Folder(tmp_path, ("one.txt",)), model=model).run(work)
    assert known == [None, SCORES, None, None] * 2
