"""Properties that all kinds of stages share."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from stage_kinds import KINDS, NOWHERE, Ending
from tiny_run import RUN

from undo_core.data.config import DataConfig
from undo_core.distillation.teacher import TeacherConfig
from undo_core.io.files import hash_file
from undo_core.models.config import ModelConfig
from undo_core.pipeline.run import stage_summary
from undo_core.pipeline.stage import Folder
from undo_core.pipeline.stages import Distill, Initialise, Noise
from undo_core.pipeline.stages.prepare import prepare_stage
from undo_core.pipeline.store import OneFolder
from undo_core.training import TrainConfig


def noised(**changes) -> Noise:
    return Noise(**{"alpha": 0.5, "beta": 0.1, "law": "normal", "seed": 0, "model": NOWHERE, **changes})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_a_kind_is_a_frozen_dataclass_in_a_file_of_its_name(kind):
    assert kind.__module__ == f"undo_core.pipeline.stages.{kind.kind}" and kind.__name__.lower() == kind.kind
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen and not kind.__abstractmethods__
    names = {field.name for field in dataclasses.fields(kind)}
    assert kind.model_from is None or kind.model_from in names


def test_kinds_have_names_of_their_own():
    assert len({kind.kind for kind in KINDS}) == len(KINDS)


def test_a_setting_at_its_default_is_left_out_unless_it_is_recorded():
    assert noised().settings == {"alpha": 0.5, "beta": 0.1, "law": "normal", "seed": 0}
    assert noised(std=2.0).settings["std"] == 2.0 and noised(std=2.0).key != noised().key
    written = noised(recorded=("std", "rules"))
    assert written.settings == {**noised().settings, "std": None, "rules": []} and written.key != noised().key
    assert noised(title="other").key == noised().key


def test_inputs_are_no_settings():
    student = Initialise(seed=1, model=NOWHERE)
    inputs = {"prepared": NOWHERE, "teacher": NOWHERE, "student": student}
    stage = Distill(train=TrainConfig(steps=1), recover=None, **inputs)
    assert stage.inputs == inputs and set(stage.settings) == {"train", "recover"}
    cached = dataclasses.replace(stage, config=TeacherConfig("topk", k=3, batch_size=2), cache=NOWHERE)
    assert cached.settings["teacher"] == {"kind": "topk", "k": 3, "batch_size": 2} and list(cached.inputs)[-1] == "cache"


def test_what_cannot_be_changed_is_refused():
    assert noised().cheaper() == [] and noised().changed({}) == noised() and not noised().accepts({"alpha": 1})
    with pytest.raises(ValueError, match=r"^noise: got changes of alpha, wanted none"):
        noised().changed({"alpha": 1})


def test_a_folder_is_known_by_what_decides(tmp_path):
    """A folder's key depends neither on its name nor on files that no stage reads."""
    for name in ("one", "two"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "train.safetensors").write_bytes(b"rows")
        (tmp_path / name / "tokenizer.json").write_text("{}")
        (tmp_path / name / "README.md").write_text(name)
    one, two = (Folder(tmp_path / name) for name in ("one", "two"))
    assert one.content == {
        "data/train.safetensors": hash_file(tmp_path / "one" / "data" / "train.safetensors"),
        "tokenizer.json": hash_file(tmp_path / "one" / "tokenizer.json"),
    }
    assert one.key == two.key and Folder(tmp_path / "one", ("README.md",)).key != Folder(tmp_path / "two", ("README.md",)).key


def test_one_folder_is_made_once_and_never_over_something_else(tmp_path):
    store = OneFolder(tmp_path / "out")
    assert store.ensure(Ending(how="work")) == tmp_path / "out" and store.manifest(Ending(how="work"))["sources"] == {}
    before = hash_file(tmp_path / "out" / "manifest.json")
    store.ensure(Ending(how="work", title="again"))
    with pytest.raises(FileExistsError, match=r"^output: got .*out, which exists and was made from other inputs"):
        store.ensure(Ending(how="work", number=1))
    assert hash_file(tmp_path / "out" / "manifest.json") == before and [path.name for path in Path(tmp_path).iterdir()] == [
        "out"
    ]


def test_the_line_of_a_finished_training_says_that_its_values_are_of_the_validation_split():
    facts = {"seconds": 2.0, "steps": 4, "history": [{"step": 4, "retain": 1.5, "forget": 2.5}]}
    stage = SimpleNamespace(title="unlearn")
    assert stage_summary(stage, facts).split("  ")[-2:] == ["valid retain 1.500", "valid forget 2.500"]
    assert stage_summary(stage, {**facts, "curve": []}).split("  ")[-2:] == ["retain 1.500", "forget 2.500"], "an attack's"


def test_a_file_that_changes_between_plan_and_reading_is_refused(tmp_path):
    """The key of the stage names the old content."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"one two {number}\n" for number in range(200)))
    data = DataConfig(kind="text", retain=[str(text)], forget=[str(text)], length=8, vocab_size=260)
    stage = prepare_stage(data, ModelConfig({**RUN["model"]["config"], "hidden_size": 4}), 0)
    text.write_text(text.read_text().replace("two", "six"))
    with pytest.raises(ValueError, match=r"text\.txt: changed while it was read"):
        OneFolder(tmp_path / "out").ensure(stage)
    assert not (tmp_path / "out").exists()
