from dataclasses import replace

import pytest
from rich.console import Console

from undo_core.config import ControlsConfig, DataConfig, DistillConfig, ModelConfig, NoiseConfig, PretrainConfig, RunConfig
from undo_core.doctor import run_doctor
from undo_core.pipeline import plan_run, run
from undo_core.plan import plan_rows, plan_table
from undo_core.relearn import AttackConfig
from undo_core.stages import FUNCTIONS
from undo_core.store import Store
from undo_core.teacher import TeacherConfig
from undo_core.training import TrainConfig
from undo_core.unlearn import UnlearnConfig

SHAPE = {"model_type": "gemma2", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def config(output, teacher=None) -> RunConfig:
    train = TrainConfig(steps=3, batch_size=8)
    return RunConfig(
        name="planned",
        output=str(output),
        data=DataConfig(train_rows=100, eval_prompts=20),
        model=ModelConfig(config={**SHAPE, "num_key_value_heads": 1, "head_dim": 8}),
        pretrain=PretrainConfig(train=train),
        unlearn=UnlearnConfig(train=train),
        noise=NoiseConfig(alphas=[0.5]),
        distill=DistillConfig(recover=None, train=train, teacher=teacher or TeacherConfig()),
        relearn=AttackConfig(rates=[1e-3, 2e-3], evaluate_at=[0, 2], headline_step=2, extend=0, batch_size=8),
        controls=ControlsConfig(filter=False),
    )


def show(settings) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(plan_table(settings))
    return capture.get()


@pytest.mark.parametrize("teacher", [TeacherConfig(), TeacherConfig("cached")], ids=lambda teacher: teacher.kind)
def test_the_plan_is_what_then_runs(tmp_path, teacher):
    settings = config(tmp_path, teacher)
    store = Store(tmp_path / "stages", FUNCTIONS)
    rows, disk = plan_rows(settings, store)
    assert not list(tmp_path.iterdir()), "planning writes nothing"
    assert [row.title for row in rows][:3] == ["prepare", "pretrain", "unlearn maxent"] and not any(row.done for row in rows)
    assert disk > 0 and all(row.title != "cache teacher" for row in rows) == (teacher.kind == "resident")
    assert all(row.seconds > 0 and row.flops > 0 for row in rows if row.steps)
    assert "relearn undo-0.5, 2 rates" in show(settings)

    run(settings, "test")
    by_folder = {row.folder: row for row in plan_rows(settings, store)[0]}
    assert all(row.done for row in by_folder.values()) and show(settings).count("there") == len(by_folder)
    for stage in plan_run(settings).stages():
        facts, row = store.manifest(stage), by_folder[stage.name]
        assert 0.5 < row.memory.total / facts["peak_bytes"] < 2
        if "steps" in facts:
            assert row.steps == facts["steps"] and row.positions == sum(facts["positions_by_source"].values())
            assert row.flops == pytest.approx(facts["flops"], rel=1e-12)
        if stage.kind == "cache":
            assert row.flops == facts["flops"] and row.positions == 200 * 11
            stored = sum(path.stat().st_size for path in store.folder(stage).glob("*.safetensors"))
            assert 0.9 < stored / facts["bytes"] <= 1


def test_a_large_model_is_planned_without_being_built(tmp_path):
    large = {**SHAPE, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8}
    settings = replace(config(tmp_path), model=ModelConfig(config={**large, "vocab_size": 256000}))
    rows, disk = plan_rows(settings, Store(tmp_path, FUNCTIONS))
    assert disk > 8e9 and rows[1].memory.total > 16 * 2.4e9 and rows[1].seconds > 0


def test_the_doctor_finds_this_machine_well(capsys):
    assert run_doctor() == 0
    out = capsys.readouterr().out
    assert "linear_kl_div" in out and "Everything that the pipeline needs works here." in out and "wrong" not in out
