"""A run with further students, and with an attack on a part of the forget set: stages, results, plan and report."""

import dataclasses

import numpy as np
import pytest
import yaml
from tiny_run import RUN
from undo_kernels.ops.noise_rules import NoiseRule

from undo_core import cli
from undo_core.cli.parser import run_config
from undo_core.data.sequences import Sequences
from undo_core.io.files import read_json
from undo_core.models import architecture, load_model
from undo_core.noise.damage import DamageConfig
from undo_core.pipeline.config import ControlsConfig, DataConfig, ModelConfig, NoiseConfig, RunConfig
from undo_core.pipeline.graph import graph_of
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.run import missing_stages, save_results
from undo_core.pipeline.stage import Folder, Work
from undo_core.pipeline.stages import Relearn, relearn
from undo_core.pipeline.store import Store
from undo_core.pipeline.student_config import GaussianConfig, StudentConfig
from undo_core.pipeline.workers import run_stages
from undo_core.report.derivation import derive
from undo_core.report.students import students

AGAIN = {"match": "head", "alpha": 1, "beta": 1, "law": "normal", "std": 0.02}
STUDENTS = {
    "shared": {"untie": True, "alpha": 0.6, "gaussian": {"strength": 0.3, "match": "head", "shared": True}, "rules": [{"match": "head", "alpha": 0}]},
    "equal": {"untie": True, "alpha": 0.6, "equal_distance": True, "rules": [{"match": "head", "alpha": 0}], "after": [AGAIN]},
    "erased": {"alpha": 0.6, "erase": {"tokens": 2}},
    "unlearn-again": {"model": "unlearn", "untie": True, "after": [AGAIN]},
}  # fmt: skip
PART = {**RUN["relearn"], "extend": 0, "text": {"forget_part": 0.5}, "save": False}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns the folder of a finished run, the models' results by name, and the run's configuration."""
    folder = tmp_path_factory.mktemp("students")
    model = {"config": {**RUN["model"]["config"], "tie_word_embeddings": True}}
    own = {"model": model, "students": STUDENTS, "attacks": {"part": PART}, "relearn": {**RUN["relearn"], "extend": 0}}
    (folder / "run.yaml").write_text(yaml.safe_dump({**RUN, "output": str(folder), **own}, sort_keys=False))
    config = run_config([f"--config={folder / 'run.yaml'}"])
    store, graph = Store(folder / "stages"), graph_of(config)
    run_stages(store, missing_stages(store, config, graph), 1, lambda stage: None)
    results = save_results(store, config, graph, "undo run")
    return folder, {model["name"]: model for model in results["models"]}, config


def facts(folder, stage):
    return read_json(folder / "stages" / stage / "manifest.json")


def weights(folder, stage):
    model = load_model(folder / "stages" / stage)
    return {name: p.detach().double().numpy() for name, p in model.named_parameters()}


def source(folder, stage, name):
    """Folder of an input of a stage."""
    return facts(folder, stage)["inputs"][name]["folder"]


def test_every_student_is_attacked(finished):
    _, models, _ = finished
    assert list(models) == ["original", "unlearn", "undo-0.5", *STUDENTS], "in the order of the configuration"
    assert all(models[name]["attack"]["curves"] and models[name]["kind"] == "damaged" for name in STUDENTS)
    assert sorted(models["erased"]["erased"]) == ["*", "/"]
    assert models["unlearn-again"]["training"] is None and models["unlearn-again"]["alpha"] is None
    labelled = models["undo-0.5"]["training"]["labelled_forget_tokens"]
    assert labelled and all(
        models[name]["training"]["labelled_forget_tokens"] == labelled for name in ("shared", "equal", "erased")
    ), "the teacher with shared noise was unlearned too"


def test_the_figure_has_a_row_for_each_model(finished):
    folder, models, _ = finished
    report = derive([read_json(folder / "results-seed0.json")], "students")
    figure = students(report)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["unlearn only", "UNDO α=0.5", *STUDENTS]
    drawn = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o" and line.get_markerfacecolor() != "white"]
    worst = [models[name]["attack"]["curves"][0]["forget"][-1]["value"] for name in ("unlearn", "undo-0.5", *STUDENTS)]
    assert drawn == worst
    assert [model.name for model in report.main] == ["original", "unlearn", "undo-0.5"]
    assert students(dataclasses.replace(report, results=[{**report.results[0], "config": {}}])) is None


def test_student_and_teacher_share_the_gaussian_noise(finished):
    folder, models, _ = finished
    stage = models["shared"]["stage"]
    teacher, student = source(folder, stage, "teacher"), source(folder, stage, "student")
    assert source(folder, student, "model") == teacher
    one, other, untied = weights(folder, teacher), weights(folder, student), weights(folder, source(folder, teacher, "model"))
    assert np.array_equal(one["lm_head.weight"], other["lm_head.weight"])
    assert not np.array_equal(one["lm_head.weight"], untied["lm_head.weight"])
    assert {name for name in one if not np.array_equal(one[name], untied[name])} == {"lm_head.weight"}
    assert not np.array_equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_equal_distance_and_a_head_that_is_drawn_again(finished):
    folder, models, _ = finished
    trained = source(folder, models["equal"]["stage"], "model")
    noised = source(folder, trained, "student")
    recorded = facts(folder, noised)
    assert models["equal"]["noise"] == {name: recorded[name] for name in ("alpha", "distance")} and recorded["alpha"] > 0.6
    before, after = weights(folder, trained), weights(folder, models["equal"]["stage"])
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {"lm_head.weight"}
    drawn = after["lm_head.weight"]
    assert abs(drawn.std() - 0.02) < 4 * 0.02 / np.sqrt(2 * drawn.size)
    untied = source(folder, models["unlearn-again"]["stage"], "model")
    assert (
        source(folder, untied, "model")
        == models["unlearn"]["stage"]
        == source(folder, source(folder, noised, "model"), "model")
    )


def test_a_part_of_the_forget_set_is_trained_on_and_the_other_is_scored(finished, monkeypatch):
    folder, models, settings = finished
    curve = models["undo-0.5"]["attacks"]["part"]["curves"][0]
    manifest = facts(folder, curve["stage"])
    data = folder / "stages" / manifest["inputs"]["prepared"]["folder"] / "data"
    text = lambda s: [tuple(t for t in row if t) for row in s.input_ids.tolist()]  # noqa: E731
    whole, prompts = (text(Sequences.load(data / f"{name}_forget.safetensors")) for name in ("train", "test"))
    seen = {}

    def spy(model, **given):
        seen.update(given)
        raise InterruptedError

    monkeypatch.setattr(relearn, "attack", spy)
    config = dataclasses.replace(settings.attacks["part"], seed=1)
    inputs = {"prepared": data.parent, "model": folder / "stages" / manifest["inputs"]["model"]["folder"]}
    stage = Relearn(config=config, **{name: Folder(path) for name, path in inputs.items()})
    with pytest.raises(InterruptedError):
        stage.run(Work(inputs, folder, folder, "part"))
    trained = text(seen["forget"])
    scored = [prompt for prompt in prompts if prompt in whole and prompt not in trained]
    assert trained and scored and len(trained) < len(whole) and set(trained) <= set(whole)
    assert curve["forget"][0]["n"] == len(scored) == manifest["text"]["scored"]["forget"]["sequences"]
    assert manifest["text"]["trained"]["forget"] == {"sequences": len(trained), "digest": seen["forget"].digest()}
    assert models["undo-0.5"]["attack"]["curves"][0]["forget"][0]["n"] == len(prompts), "the headline attack is as before"


def test_the_memory_of_an_untied_student(finished):
    stages = {model.name: model.stage for model in graph_of(finished[2]).models}
    big = {**RUN["model"]["config"], "model_type": "llama", "vocab_size": 5000, "tie_word_embeddings": True}
    predict = Predictor(architecture(big), 16, answers=True, evaluated=4)
    tied, untied = (predict(stages[name]).weights for name in ("erased", "shared"))
    assert not stages["erased"].untied and stages["shared"].untied
    assert untied - tied == 4 * 5000 * 16


HEAD = {"match": "lm_head.weight", "alpha": 0}
REFUSED = [  # whether the run's models are tied, a student, and what every command says
    (True, {"alpha": 0.5, "rules": [HEAD]}, "noise own: rules[0].match: got 'lm_head.weight', wanted one that matches"),
    (True, {"alpha": 0.5, "rules": [{"match": "layers:0-7", "alpha": 0}]}, "noise own: rules[0].match: got 'layers:0-7' with layer 1"),
    (True, {"alpha": 0.5, "gaussian": {"strength": 0.1, "match": "lm_head*"}}, "gaussian own: match: got lm_head*, wanted one"),
    (True, {"model": "unlearn", "after": [HEAD]}, "redraw own: rules[0].match: got 'lm_head.weight'"),
    (True, {"alpha": 0.5, "erase": {"tokens": 1000}}, "erase own: erase.tokens: got 1000, wanted fewer than the 17 tokens"),
    (False, {"alpha": 0.5, "untie": True}, "untie own: untie: got a LlamaForCausalLM whose head shares no weight"),
    (False, {"model": "other", "after": [HEAD]}, "students"),
    (False, {"model": "random", "after": [HEAD]}, "students.own.model: got random, wanted controls.random true"),
]  # fmt: skip


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(("tied", "student", "message"), REFUSED)
def test_what_a_stage_would_refuse_is_refused_before_the_first(tmp_path, capsys, command, tied, student, message):
    model = {"config": {**RUN["model"]["config"], "tie_word_embeddings": tied}}
    own = {"output": str(tmp_path / "out"), "model": model, "students": {"own": student}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN, **own}))
    assert cli.main([command, str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == ""
    assert not list((tmp_path / "out").glob("stages/*"))


def test_rules_of_the_noise_and_other_damage_are_checked_too(tmp_path):
    controls, model = ControlsConfig(filter=False, random=False), ModelConfig(config=RUN["model"]["config"])
    data = DataConfig(kind="arithmetic-compact")
    config = RunConfig(name="x", output=str(tmp_path), data=data, model=model, controls=controls)
    graph_of(config)
    with pytest.raises(ValueError, match=r"^noise 0.6: rules\[0\].match: got 'nothing'"):
        graph_of(dataclasses.replace(config, noise=NoiseConfig(alphas=[0.6], rules=[NoiseRule("nothing")])))
    with pytest.raises(ValueError, match=r"^prune 0.5: layers: got 'layers:3' with layer 3"):
        graph_of(dataclasses.replace(config, damage=DamageConfig(operators=["prune"], alphas=[0.5], layers="3")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "students.alpha: got None"),
        ({"alpha": 0.5, "equal_distance": True}, "students.equal_distance: got true without a rule"),
        ({"model": "filter"}, "students.after: got no rules with model filter"),
        ({"model": "unlearn", "alpha": 0.5}, "students.alpha: got one with model unlearn"),
        ({"model": "unlearn", "gaussian": GaussianConfig(0.1)}, "students.gaussian: got one with model unlearn"),
        ({"model": "other"}, "students.model: got"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        StudentConfig(**settings)
