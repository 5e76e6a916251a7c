"""Controls beyond the published ones, and the costs of each student in a run's results."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import small_run

from undo_core.data.sequences import Sequences
from undo_core.distillation.config import DistillConfig
from undo_core.distillation.gate import GateConfig
from undo_core.distillation.teacher import TeacherConfig
from undo_core.io.files import read_json
from undo_core.models import load_model
from undo_core.noise.config import NoiseConfig
from undo_core.noise.damage import DamageConfig
from undo_core.pipeline.config import ControlsConfig
from undo_core.pipeline.costs import with_costs
from undo_core.pipeline.graph import graph_of
from undo_core.pipeline.run import run
from undo_core.pipeline.stage import Work
from undo_core.pipeline.store import Store
from undo_core.planning.table import plan_rows
from undo_core.training import TrainConfig
from undo_core.unlearning import UnlearnConfig


def config(output="unused", **changes):
    values = {
        "unlearn": UnlearnConfig(train=TrainConfig(steps=5, batch_size=4), forget_rows=7),
        "noise": NoiseConfig(alphas=[0.5]),
        "distill": DistillConfig(recover=-1.0, train=TrainConfig(steps=2, batch_size=4), hidden_weight=0.5),
        "damage": DamageConfig(operators=["prune"], alphas=[0.4]),
        "controls": ControlsConfig(random=False, oracle_random_steps=3, gate=GateConfig(share=0.05, alphas=[0.5])),
    }
    return small_run("controls", output, **{**values, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controls")
    settings = config(folder)
    run(settings, "test")
    return settings, folder


def test_a_run_holds_the_controls(finished):
    settings, folder = finished
    results = read_json(folder / "results-seed0.json")
    models = {model["name"]: model for model in results["models"]}
    assert list(models) == ["original", "unlearn", "undo-0.5", "undo-0.4-prune", "gated-0.5", "filter", "oracle-random"]
    damage = models["undo-0.4-prune"]["damage"]
    assert damage["operator"] == "prune" and damage["distance"] == pytest.approx(damage["wanted"], rel=0.01)
    assert models["undo-0.4-prune"]["training"]["labelled_forget_tokens"] and "damage" not in models["undo-0.5"]
    assert models["oracle-random"]["training"]["steps"] == 3 and models["gated-0.5"]["attack"]["curves"]
    assert not any("left" in model for model in models.values()), "a model of text alone"
    stages = {model.name: model.stage for model in graph_of(settings).models}
    whole = replace(settings, noise=replace(settings.noise, parts="all"))
    others = {model.name: model.stage.inputs.get("student") for model in graph_of(whole).models}
    for name in ("undo-0.5", "undo-0.4-prune", "gated-0.5"):
        assert others[name].settings == {**stages[name].inputs["student"].settings, "parts": "all"}
    store = Store(folder / "stages")

    gated = stages["gated-0.5"].inputs
    assert gated["teacher"].key == stages["original"].key, "nothing is unlearned"
    assert gated["student"].inputs["model"].key == stages["original"].key
    gate, prepared = gated["gate"], gated["prepared"]
    facts = store.manifest(gate)
    assert facts["labelled_rows"] == {"forget": 15, "retain": 15} and facts["rows"] == 600
    assert facts["heldout"]["precision"] > 0.9 and facts["heldout"]["recall"] > 0.9, "an operator tells the sequences apart"
    kept = load_file(store.folder(gate) / "gate.safetensors")["kept"]
    assert int(kept.sum()) == facts["kept_rows"] and kept[:300].sum() > 5 * kept[300:].sum(), "sequences to retain come first"
    training = models["gated-0.5"]["training"]
    assert training["labelled_forget_tokens"] == facts["labelled_forget_tokens"] > 15
    assert gated and all(s.settings["hidden"]["hidden_weight"] == 0.5 for s in stages.values() if s.kind == "distill")

    sequences = Sequences.load(store.folder(prepared) / "data" / "train_forget.safetensors")
    few = Sequences(sequences.input_ids[:7], sequences.pad_id)
    labelled = models["undo-0.5"]["training"]["labelled_distinct_tokens"]
    assert labelled["forget"] == few.tokens(), "5 batches of 4 have each of the 7 sequences"
    retained = Sequences.load(store.folder(prepared) / "data" / "train_retain.safetensors")
    seed = store.manifest(stages["unlearn"])["settings"]["train"]["seed"] + 1
    assert labelled["retain"] == Sequences(retained.input_ids[retained.order(0, 20, seed)], retained.pad_id).tokens()
    costs = models["undo-0.5"]["costs"]
    tokens = models["original"]["training"]["tokens"]
    assert costs["pretraining_tokens"] == tokens and costs["labelled_share"] == sum(labelled.values()) / tokens
    assert costs["of_filter"] == {"steps": None, "tokens": None, "flops": None}, "neither reached its target"
    assert models["oracle-random"]["costs"]["of_filter"]["steps"] == 1.5


def test_a_retain_text_that_is_not_read_is_not_counted(finished):
    settings, folder = finished
    settings = replace(settings, unlearn=replace(settings.unlearn, retain_weight=0.0))
    (stage,) = [model.stage for model in graph_of(settings).models if model.kind == "unlearn"]
    store = Store(folder / "stages")
    store.ensure(stage)
    facts = store.manifest(stage)
    assert facts["labelled_retain_tokens"] == facts["labelled_distinct_tokens"]["retain"] == 0
    assert facts["tokens"] == facts["labelled_forget_tokens"] > 0
    (row,) = [row for row in plan_rows(settings, store)[0] if row.folder == stage.name]
    assert row.positions == sum(facts["positions_by_source"].values()) > 0
    assert row.flops == pytest.approx(facts["flops"], rel=1e-12)


def test_the_gated_students_target_is_every_students(finished, tmp_path, monkeypatch):
    """The target is the unlearned model's retain performance, not that of the original, which is the teacher."""
    settings, folder = finished
    stages = {model.name: model.stage for model in graph_of(settings).models}
    store = Store(folder / "stages")
    weight = lambda model: float(model.get_input_embeddings().weight.detach().double().sum())  # noqa: E731
    monkeypatch.setattr("undo_core.pipeline.stages.distill.retain_performance", lambda model, data: weight(model))
    reached = {name: weight(load_model(store.folder(stages[name]))) for name in ("original", "unlearn")}
    assert reached["original"] != reached["unlearn"]
    again = stages["gated-0.5"]
    inputs = {name: store.folder(stage) for name, stage in again.inputs.items()}
    (tmp_path / "scratch").mkdir(), (tmp_path / "output").mkdir()
    facts = again.run(Work(inputs, tmp_path / "scratch", tmp_path / "output", "again"))
    assert facts["retain_target"] == reached["unlearn"] + 1, "recover is -1"


def test_data_filtering_begins_before_its_target_is_there(finished, tmp_path):
    settings, folder = finished
    (stage,) = [model.stage for model in graph_of(settings).models if model.kind == "filter"]
    stage, store, facts, weights = (
        replace(stage, recover=1.0),
        Store(folder / "stages"),
        [],
        [],
    )  # it ends at the first evaluation
    inputs = {name: store.folder(source) for name, source in stage.inputs.items()}

    class Late(Work):
        def complete(self, name):
            asked.append(name)
            return len(asked) > 2

    for kind in (Work, Late):
        asked, scratch, output = [], tmp_path / kind.__name__ / "scratch", tmp_path / kind.__name__ / "output"
        scratch.mkdir(parents=True), output.mkdir()
        found = stage.run(kind(inputs, scratch, output, "again"))
        facts.append({name: value for name, value in found.items() if name != "seconds"})
        weights.append(load_file(output / "model.safetensors"))
    assert asked == ["target"] * 3 and facts[1] == facts[0] and facts[0]["steps"] == 0 and facts[0]["stopped"]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


def test_the_plan_knows_them(finished):
    settings, folder = finished
    lines = {row.folder: row for row in plan_rows(settings, Store(folder / "stages"))[0]}
    assert all(line.done for line in lines.values())
    gate = next(line for line in lines.values() if line.title == "gate")
    student = next(line for line in lines.values() if line.title == "distill 0.5")
    damaged = next(line for line in lines.values() if line.title == "prune 0.4")
    # The peak is that of this process, which also holds memory of other tests; test_memory.py checks how exact predictions are.
    assert all(0 < line.memory.total < 2 * line.measured_bytes for line in (damaged, student, gate))
    assert gate.steps == 0


def test_what_is_left_at_its_default_is_in_no_key():
    """Stages made before these settings existed are therefore found again."""
    base = config(unlearn=UnlearnConfig(), distill=DistillConfig(), controls=ControlsConfig(oracle_steps=3))
    stages = {stage.title: stage for stage in graph_of(base).stages()}
    assert "forget_rows" not in stages["unlearn maxent"].settings
    assert set(stages["distill 0.5"].settings) == {"train", "recover"}
    assert set(stages["distill 0.5"].inputs) == {"prepared", "teacher", "student"}
    assert set(stages["noise 0.5"].settings) == {"alpha", "beta", "law", "seed"}
    few = {stage.title: stage for stage in graph_of(config(controls=ControlsConfig(oracle_steps=3))).stages()}
    assert few["unlearn maxent"].settings["forget_rows"] == 7 and few["unlearn maxent"].key != stages["unlearn maxent"].key


def test_a_cached_teacher_is_for_its_own_students():
    cached = config(distill=DistillConfig(teacher=TeacherConfig("cached")))
    stages = {model.name: model.stage for model in graph_of(cached).models}
    assert "cache" in stages["undo-0.5"].inputs
    for name in ("gated-0.5", "oracle-random"):
        assert "cache" not in stages[name].inputs and stages[name].settings["teacher"] == {"kind": "streamed"}


def test_a_student_of_random_weights_is_gated_too():
    both = replace(config(), controls=ControlsConfig(gate=GateConfig(share=0.01)))
    stages = {model.name: model.stage for model in graph_of(both).models}
    assert stages["gated"].inputs["student"].key == stages["random"].inputs["student"].key


def test_a_cached_teacher_has_no_hidden_states_to_match():
    with pytest.raises(ValueError, match=r"^distill\.hidden_weight: got 1.0 with distill\.teacher\.kind cached"):
        DistillConfig(teacher=TeacherConfig("cached"), hidden_weight=1.0)


@pytest.mark.parametrize("name", ["oracle_steps", "oracle_random_steps"])
def test_an_oracle_needs_data_filtering(name):
    with pytest.raises(ValueError, match=rf"^controls\.{name}: wanted 0 without controls\.filter"):
        config(controls=ControlsConfig(filter=False, **{name: 3}))


def test_too_many_labelled_sequences_are_refused(tmp_path):
    few = config(tmp_path, unlearn=UnlearnConfig(forget_rows=301), controls=ControlsConfig(filter=False, random=False))
    with pytest.raises(ValueError, match=r"^forget_rows: got 301, wanted at most 300, the number of forget sequences"):
        run(few, "test")


def entry(kind, steps, stop=None, ruled=True, **more):
    counts = {"steps": steps, "tokens": 10 * steps, "flops": 1000 * steps}
    stops = {"stop_step": stop, "stop_tokens": stop and 10 * stop, "stop_flops": stop and 1000 * stop}
    return {"name": kind, "kind": kind, "training": {**counts, **stops, "limit_reached": ruled and stop is None, **more}}


def test_costs_by_hand():
    labelled = {"labelled_forget_tokens": 40, "labelled_retain_tokens": 60}
    models = [entry("original", 100, ruled=False), entry("undo", 30, 30, **labelled), entry("filter", 60, 50)]
    found = with_costs(models)[1]["costs"]
    assert found["labelled_tokens"] == {"forget": 40, "retain": 60} and found["labelled_share"] == 0.1
    assert found["of_filter"] == {"steps": 0.6, "tokens": 0.6, "flops": 0.6}
    models[1]["training"]["unlearning_steps"] = 5  # tokens and FLOPs already include them
    assert with_costs(models)[1]["costs"]["of_filter"] == {"steps": 0.7, "tokens": 0.6, "flops": 0.6}
    assert "costs" not in with_costs(models)[0] and "costs" not in with_costs(models)[2]
    distinct = {"forget": 4, "retain": 6}
    models[1] = entry("undo", 30, None, labelled_distinct_tokens=distinct, **labelled)
    found = with_costs(models)[1]["costs"]
    assert found["labelled_share"] == 0.01 and found["of_filter"]["steps"] is None, "censored"
    alone = [{**models[0], "training": None}, models[1]]
    assert with_costs(alone)[1]["costs"] == {
        "pretraining_tokens": None,
        "labelled_tokens": distinct,
        "labelled_share": None,
        "of_filter": None,
    }
    assert with_costs(alone, 1000)[1]["costs"]["labelled_share"] == 0.01
