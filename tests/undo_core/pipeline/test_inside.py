"""A run with every intervention and every measure: its stages, results, report and plan."""

import json

import pytest
import torch
import yaml
from stage_kinds import NOWHERE
from tiny_run import RUN

from undo_core.attacks.grid import bounded_worst
from undo_core.attacks.interventions import INTERVENTIONS
from undo_core.attacks.interventions.latent import Latent
from undo_core.attacks.interventions.merge import Merge
from undo_core.attacks.interventions.prune import Prune
from undo_core.attacks.interventions.soft_prompt import SoftPrompt
from undo_core.cli import main
from undo_core.evaluation.inside import MEASUREMENTS
from undo_core.evaluation.inside.cka import Cka
from undo_core.evaluation.inside.connectivity import Connectivity
from undo_core.evaluation.inside.distance import Distance
from undo_core.evaluation.inside.logit_lens import LogitLens
from undo_core.io.files import read_json
from undo_core.models import architecture, forward_flops, skeleton
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.needs import Scene
from undo_core.pipeline.stages import Intervene, Measure

FEW = {"steps": 1, "batch_size": 4}
SETTINGS = {
    "merge": {"weights": [0.5, 1.0]},
    "prune": {"shares": [0.5], "scopes": ["matrix", "global"]},
    "round": {"bits": [2]},
    "steer": {"depths": [1.0], "strengths": [0.0, 1.0], "ways": ["add"], "sequences": 8},
    "restore": {"depths": [1.0], "strengths": [1.0], "sequences": 8},
    "patch": {"depths": [1.0]},
    "latent": {"depths": [1.0], "radii": [1.0], **FEW},
    "soft_prompt": {"tokens": [2], "rates": [0.3], **FEW},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns the folder, the configuration and the results of a finished run."""
    folder = tmp_path_factory.mktemp("inside")
    assert set(SETTINGS) == set(INTERVENTIONS), "a new kind is tried here too"
    model = {"config": {**RUN["model"]["config"], "num_hidden_layers": 2, "max_position_embeddings": 64}}
    attacks = {f"by-{kind}": {"kind": kind, **own} for kind, own in SETTINGS.items()}
    measures = {kind: {"kind": kind, "sequences": 16} for kind in MEASUREMENTS}
    config = {**RUN, "output": str(folder / "out"), "model": model, "attacks": attacks, "measures": measures}
    (folder / "run.yaml").write_text(yaml.safe_dump({**config, "retain_margin": 0.02}))
    assert main(["run", str(folder / "run.yaml")]) == 0
    return folder / "out", folder / "run.yaml", read_json(folder / "out" / "results-seed0.json")


def test_every_model_is_under_every_intervention(finished):
    _, _, results = finished
    original, *models = results["models"]
    assert "attacks" not in original and [model["name"] for model in models] == ["unlearn", "undo-0.5"]
    for model in models:
        attacks = model["attacks"]
        assert [attack["kind"] for attack in attacks.values()] == sorted(SETTINGS), "as the file has them"
        settings = {name: [curve["setting"] for curve in attack["curves"]] for name, attack in attacks.items()}
        assert settings["by-merge"] == ["weight-0.5", "weight-1"] and settings["by-prune"][1] == "share-0.5-scope-global"
        assert settings["by-steer"] == ["depth-1-way-add-strength-0", "depth-1-way-add-strength-1"]
        merged, steered = attacks["by-merge"]["curves"][1], attacks["by-steer"]["curves"][0]
        for part in ("forget", "retain"):
            wanted, own = original["metrics"][part], model["metrics"][part]
            assert merged[part] == [{key: wanted[key] for key in ("value", "low", "high", "n")}], "weight 1 is the original"
            assert steered[part] == [{key: own[key] for key in ("value", "low", "high", "n")}], "strength 0 is the model"
        assert attacks["by-prune"]["curves"][1]["point"] == {"share": 0.5, "scope": "global"}
        theirs = {name for name, attack in attacks.items() if attack.get("needs_original")}
        assert theirs == {"by-merge", "by-restore", "by-patch"} and model["worst"]["attack"] not in theirs
        assert model["worst"]["bounded"] == bounded_worst(model, results["metric"])


def test_every_model_is_measured_and_those_that_compare_leave_out_the_original(finished):
    output, _, results = finished
    for model in results["models"]:
        compared = model["kind"] != "original"
        assert set(model["measures"]) == {kind for kind, own in MEASUREMENTS.items() if compared or not own.compares}
        for kind, own in model["measures"].items():
            assert own["kind"] == kind and len(own["points"]) >= 2 and own["value"] == MEASUREMENTS[kind].value
            assert own["points"] == read_json(output / "stages" / own["stage"] / "manifest.json")["points"]
    first, last = results["models"][1]["measures"]["connectivity"]["points"][0::4]
    for point, model in ((first, results["models"][1]), (last, results["models"][0])):
        assert point["value"] == pytest.approx(model["metrics"]["forget"]["value"], abs=0.25), "16 of its 20 problems"


def test_the_report_shows_them(finished):
    output, _, _ = finished
    report = output / "report"
    assert {"interventions.png", "inside.png"} <= {path.name for path in report.iterdir()}
    table = (report / "table.md").read_text()
    assert (
        "## Measures" in table
        and "forget, still useful (worst case, %; retain at most 2 points worse)" in table
        and "by-soft_prompt" in table
    )
    assert "| by-merge [a] | 0 |" in table and "[a] needs the original model, and does not enter the worst case" in table
    page = (report / "report.html").read_text()
    assert "What is left inside" in page and "Interventions" in page
    derived = json.loads((report / "report.json").read_text())
    assert [model["bounded_forget"]["mean"] is not None for model in derived["models"] if "bounded_forget" in model] == [
        True
    ] * 2


def test_the_plan_names_them_and_a_second_run_does_nothing(finished, capsys):
    output, config, _ = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert main(["run", str(config)]) == 0
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before
    capsys.readouterr()
    assert main(["plan", str(config)]) == 0
    text = capsys.readouterr().out
    assert "by-merge unlearn, 2 trials" in text and "linear_probe undo-0.5" in text and "measure-" in text
    assert main(["plan", str(config), "--memory=1MB"]) == 2
    error = capsys.readouterr().err
    assert "by-latent needs at least" in error and "measures.cka needs at least" in error
    for path in (*output.glob("stages/intervene-*"), *output.glob("stages/measure-*")):
        assert [file.name for file in path.iterdir()] == ["manifest.json"]
        assert read_json(path / "manifest.json")["predicted_bytes"] > 0


def test_unknown_kinds_and_missing_models_are_refused(finished, capsys):
    _, config, _ = finished
    for flag, message in (
        ("--attacks={a: {kind: mrge}}", "kind: got mrge, wanted one of finetune, lora, fewshot, quantise, "),
        ("--attacks={a: {kind: merge, weights: [2.0]}}", "weights: got [2.0], wanted different numbers from 0 to 1"),
        ("--measures={a: {kind: cka, against: filter}}", "measures.a.against: got filter, wanted a model that the run has"),
        ("--measures={a: {kind: cka, layers: 3}}", "Option 'layers' is not accepted"),
    ):
        assert main(["plan", str(config), flag]) == 2
        assert message in capsys.readouterr().err


def test_the_predicted_memory_counts_both_models_what_is_trained_and_what_is_kept():
    shape = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = architecture({"model_type": "llama", **shape})
    predict = Predictor(config, 32, device="cpu")
    weights = 4 * sum(parameter.numel() for parameter in skeleton(config).parameters())

    def peak(stage):
        return {phase.phase: phase for phase in predict.phases(stage, torch.float32)}

    def under(attack, original=None):
        return peak(Intervene(attack=attack, prepared=NOWHERE, model=NOWHERE, original=original))

    pruned, merged = under(Prune(shares=[0.5], scopes=["matrix"])), under(Merge(weights=[0.5]), NOWHERE)
    assert merged["evaluation"].weights - pruned["evaluation"].weights == pytest.approx(weights, rel=0.02)
    assert set(pruned) == {"loading", "evaluation"}
    small, large = (under(SoftPrompt(tokens=[1], rates=[0.1], batch_size=size)) for size in (8, 16))
    growth = large["forward"].activations / small["forward"].activations
    assert 1.8 < growth < 2.2 and large["forward"].gradients == 0, "a backward pass without gradients of the weights"
    line, cka = (
        peak(Measure(measurement=own, prepared=NOWHERE, model=NOWHERE, reference=NOWHERE)) for own in (Connectivity(), Cka())
    )
    assert line["evaluation"].weights == cka["evaluation"].weights == merged["evaluation"].weights
    kept = {name: max(phase.workspace for phase in phases.values()) for name, phases in (("line", line), ("cka", cka))}
    assert kept["line"] == pytest.approx(weights, rel=0.02)
    assert kept["cka"] >= 4 * 3 * 8 * 64**2, "three covariances of each layer"


def test_the_plan_counts_the_passes_over_the_text():
    config = architecture(
        {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    )
    scene = Scene(skeleton(config), 32, 0)
    forward = forward_flops(scene.model, 32)
    trained = Intervene(attack=Latent(steps=5, batch_size=3), prepared=NOWHERE, model=NOWHERE).cost(scene)
    assert (trained.disk, trained.steps, trained.positions) == (0, 5, 5 * 3 * 32)
    assert trained.flops == 2 * forward * 5 * 3 * 32
    measured = Measure(measurement=LogitLens(sequences=10), prepared=NOWHERE, model=NOWHERE).cost(scene)
    assert measured.flops == 4 * 10 * 32 * forward and measured.positions == 4 * 10 * 32
    distance = Measure(measurement=Distance(), prepared=NOWHERE, model=NOWHERE, reference=NOWHERE).cost(scene)
    assert (distance.steps, distance.flops, distance.disk) == (0, 0.0, 0)
