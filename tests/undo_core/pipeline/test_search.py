"""A run whose models are under an attack that searches: its stage, results, report and plan, and a run that was interrupted."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
import yaml
from stage_kinds import NOWHERE
from tiny_run import RUN

from undo_core.attacks.config import NEEDS, AttackConfig
from undo_core.attacks.grid import bounded_worst, worst_of
from undo_core.attacks.search import SearchConfig
from undo_core.attacks.slowdown import trajectories
from undo_core.cli import main
from undo_core.io.files import read_json, write_json
from undo_core.models import architecture, skeleton
from undo_core.pipeline.attack_run import per_byte
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.needs import Scene
from undo_core.pipeline.stage import Folder, Work
from undo_core.pipeline.stages import Relearn, Search

needed = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("optuna", "peft"))), reason="optuna or peft is not installed"
)
SEARCH = {"kind": "search", "budget": 6, "steps": [1, 4], "batch_sizes": [2, 4], "ranks": [0, 2], "startup": 2}


def write(folder, name="run", **changes):
    path = folder / f"{name}.yaml"
    own = {"output": str(folder / name), "attacks": {"searched": {**SEARCH, **changes}}, "retain_margin": 0.05}
    path.write_text(yaml.safe_dump({**RUN, **own}))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns the folder of a finished run, its configuration and its results."""
    folder = tmp_path_factory.mktemp("search")
    config = write(folder)
    assert main(["run", str(config)]) == 0
    return folder / "run", config, read_json(folder / "run" / "results-seed0.json")


@needed
def test_every_model_is_searched_within_the_budget(finished):
    _, _, results = finished
    for model in results["models"][1:]:
        attack = model["attacks"]["searched"]
        assert (attack["kind"], attack["steps"], attack["headline_step"]) == ("search", [4], 4)
        trials = attack["trials"]
        assert len(trials) > SEARCH["startup"] and {trial["setting"] for trial in trials} == {
            f"trial-{n}" for n in range(len(trials))
        }
        grid = sum(curve["flops"][-1] for curve in model["attack"]["curves"][:1])
        assert attack["spent_flops"] == pytest.approx(sum(trial["flops"][-1] for trial in trials))
        assert 0.5 * 6 * grid < attack["spent_flops"] <= 6 * grid * 1.01, "LoRA's factors add to the FLOPs of the model"
        best = trials[attack["best"]]
        assert [curve["forget"] for curve in attack["curves"]] == [[best["forget"][best["best"]]]]
        assert len(list(trajectories(model))) == len(model["attack"]["curves"]) + len(trials)
        assert model["worst"] == worst_of(model, results["metric"])
        found = bounded_worst(model, results["metric"])
        assert found["attack"] in (None, "relearn", "searched")


@pytest.fixture
def alone(finished, tmp_path):
    """Returns a function that runs the search of the unlearned model again, and the trials that the run has of it."""
    output, _, results = finished
    model = results["models"][1]
    (prepared,) = (output / "stages").glob("prepare-*")
    config = SearchConfig(**SEARCH).along(AttackConfig(**RUN["relearn"]))
    (stage,) = (output / "stages").glob(f"{model['attacks']['searched']['curves'][0]['stage']}/manifest.json")
    settings = read_json(stage)["settings"]
    inputs = {"prepared": prepared, "model": output / "stages" / model["stage"]}
    config = dataclasses.replace(config, seed=settings["seed"])
    search = Search(config=config, **{name: Folder(path) for name, path in inputs.items()})
    assert search.settings == settings
    work = Work(inputs, tmp_path / "scratch", tmp_path / "output", "searched")
    work.scratch.mkdir()
    return lambda: search.run(work)["trials"], model["attacks"]["searched"]["trials"]


@needed
def test_an_interrupted_search_ends_with_the_same_trials(alone, tmp_path, monkeypatch):
    run, whole = alone
    made, original = [], Relearn.run

    def interrupted(self, work):
        made.append(self.title)
        if len(made) in (2, 4):
            raise KeyboardInterrupt
        return original(self, work)

    monkeypatch.setattr(Relearn, "run", interrupted)
    for finished in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run()
        assert len(list((tmp_path / "scratch").glob("trial-*.json"))) == finished
    assert run() == [{name: value for name, value in trial.items() if name != "setting"} for trial in whole]
    assert len(made) == len(whole) + 2, "only the interrupted trials were begun twice"


@needed
def test_a_file_of_another_proposal_is_refused(alone, tmp_path, monkeypatch):
    run, _ = alone
    monkeypatch.setattr(Relearn, "run", lambda self, work: pytest.fail("no trial is computed"))
    write_json(tmp_path / "scratch" / "trial-0.json", {"settings": {"rate": 7.0}, "facts": {}})
    with pytest.raises(ValueError, match=r"trial-0.json: got settings that this search does not propose"):
        run()


@needed
def test_the_report_shows_the_best_trial_and_the_search(finished):
    output, _, results = finished
    page = (output / "report" / "report.html").read_text()
    assert "What the search found" in page and (output / "report" / "search.png").read_bytes()[:4] == b"\x89PNG"
    attack = results["models"][1]["attacks"]["searched"]
    best = f"{attack['best'] + 1} of {len(attack['trials'])}"
    said = best if attack["trials"][attack["best"]]["best"] else "none beats the model before the attack"
    assert said in (output / "report" / "table.md").read_text()


@needed
def test_the_plan_counts_the_budget(finished, capsys):
    _, config, _ = finished
    capsys.readouterr()
    assert main(["plan", str(config)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert any(row.startswith("searched unlearn, 6 times the grid") and "search-" in row for row in rows)


def test_a_stage_costs_its_budget_and_the_memory_of_its_heaviest_trial():
    headline = AttackConfig(rates=[1e-3, 1e-2], evaluate_at=[0, 10], headline_step=10, batch_size=8)
    config = SearchConfig(budget=3, steps=[2, 10], batch_sizes=[4, 16], optimizers=["sgd", "adamw"], seed=0).along(headline)
    stage = Search(config=config, prepared=NOWHERE, model=NOWHERE)
    alone = Relearn(
        config=config.attack({**config.corners()[0], "rank": 0, "optimizer": "adamw"}), prepared=NOWHERE, model=NOWHERE
    )
    assert (stage.training.optimizer, stage.training.batch_size, stage.heaviest.config.kind) == ("adamw", 16, "finetune")
    shape = architecture({**RUN["model"]["config"], "vocab_size": 64})
    scene = Scene(skeleton(shape), 16, 100)
    grid = Relearn(config=dataclasses.replace(headline, rates=[1e-3]), prepared=NOWHERE, model=NOWHERE)
    assert stage.cost(scene).flops == pytest.approx(3 * 2 * grid.cost(scene).flops) and stage.cost(scene).disk == 0
    predict = Predictor(shape, 16, device="cpu")
    assert predict(stage, torch.float32) == predict(alone, torch.float32)


def test_losses_of_trials_are_given_per_byte():
    scores = {"value": 4.0, "low": 3.0, "high": 5.0, "n": 9}
    curve = {"forget": [scores], "retain": [scores]}
    attack = {"curves": [curve], "trials": [{**curve, "setting": "trial-0"}]}
    entry = {"metrics": {}, "attack": {"curves": []}, "attacks": {"searched": attack}}
    found = per_byte(entry, {"forget": 0.5, "retain": 0.25})["attacks"]["searched"]["trials"][0]
    assert (found["forget"][0]["value"], found["retain"][0]["high"], found["setting"]) == (2.0, 1.25, "trial-0")


def test_what_is_missing_or_impossible_is_one_line_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(NEEDS, "search", "a_package_that_is_nowhere")
    assert main(["run", str(write(tmp_path))]) == 2 and not (tmp_path / "run").exists()
    assert "pip install 'undo-core[optuna]'" in capsys.readouterr().err
    assert main(["run", str(write(tmp_path, budget=0.1))]) == 2
    assert "attacks.searched.budget: got 0.1, wanted at least" in capsys.readouterr().err
