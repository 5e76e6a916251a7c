"""A sweep's stages as tasks of a cluster: what waits for what, and what a mistake says. Nothing here needs Ray."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from undo_core.cli import main
from undo_core.pipeline import launcher
from undo_core.pipeline.graph import graph_of
from undo_core.pipeline.ray_engine import Place, tasks_of
from undo_core.pipeline.store import Store
from undo_core.pipeline.sweep_config import SweepConfig, expand

BASE = {
    "name": "tiny",
    "output": "unused",
    "data": {"kind": "arithmetic-compact", "train_rows": 200, "eval_prompts": 20},
    "model": {"config": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}},
    "noise": {"alphas": [0.5]},
    "controls": {"random": False},
}


@pytest.fixture
def sweep(tmp_path) -> str:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    values = {
        "name": "s",
        "base": str(tmp_path / "base.yaml"),
        "output": str(tmp_path / "out"),
        "grid": {"noise.beta": [0.1, 0.5]},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "sweep.yaml")


def test_each_stage_is_one_task_after_those_that_it_reads(tmp_path, sweep):
    settings = yaml.safe_load(Path(sweep).read_text())
    stages = [stage for config in expand(SweepConfig(**settings)) for stage in graph_of(config).stages()]
    store = Store(tmp_path / "out" / "stages")
    tasks = tasks_of(store, stages, ranks=4)
    assert len(tasks) == len({stage.key for stage in stages}) == 8 < len(stages)
    seen = {}
    for task in tasks:
        assert set(task.after) == {source.key for source in task.stage.inputs.values()} <= set(seen), "inputs come first"
        seen[task.stage.key] = task
    assert {(task.stage.kind, task.ranks) for task in tasks} == {
        *(("prepare", 1), ("pretrain", 4), ("unlearn", 4), ("noise", 1), ("distill", 4))
    }

    done = next(task.stage for task in tasks if task.stage.kind == "unlearn")
    store.folder(done).mkdir(parents=True)
    (store.folder(done) / "manifest.json").write_text("{}")
    left = tasks_of(store, stages)
    assert done.key not in {key for task in left for key in (task.stage.key, *task.after)}
    noise = next(task for task in left if task.stage.kind == "noise")
    assert noise.after == () and {task.ranks for task in left} == {1}


@pytest.mark.parametrize(
    ("ranks", "largest", "parts"),
    [(1, 8, [1]), (4, 8, [4]), (8, 8, [8]), (16, 8, [8, 8]), (12, 8, [6, 6]), (6, 4, [3, 3]), (7, 4, [1] * 7), (2, 1, [1, 1])],
)
def test_processes_are_divided_equally_among_few_machines(ranks, largest, parts):
    assert launcher.sizes(ranks, largest) == parts


def test_without_ray_one_line_says_what_to_install(tmp_path, sweep, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    assert main(["sweep", sweep, "--engine=ray"]) == 2
    error = capsys.readouterr().err
    assert (
        error == "undo: error: engine: got ray, which is not installed; pip install 'undo-core[ray]', or use the engine local\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--ranks=2"], "address, cpus, ranks: got one of them with the engine local"),
        (["--address=head:6379"], "wanted --engine=ray"),
        (["--engine=ray", "--cpus=0"], "cpus: got 0, wanted an integer >= 1"),
        (["--engine=ray", "--workers=2"], "workers: got 2 with the engine ray"),
        (["--engine=slurm"], "engine"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(tmp_path, sweep, flags, wanted, capsys):
    assert main(["sweep", sweep, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("undo: error: ") and error.count("\n") == 1 and wanted in error
    assert not (tmp_path / "out").exists()


def test_a_run_that_cannot_be_shared_by_its_processes_cannot_begin(sweep, capsys):
    flags = ["--dry-run", "--engine=ray", "--ranks=4"]
    for more in ([], ["--overrides={distill.train.micro_batch_size: 2}"]):
        assert main(["sweep", sweep, *flags, *more]) == 0
        said = " ".join(capsys.readouterr().out.split())
        refused = "got micro-batches of 2 sequences on 4 ranks" in said and "2 run(s) cannot" in said
        assert refused == bool(more) and "4 ranks" not in said.replace("on 4 ranks", "")


def test_a_machine_that_does_not_share_the_folder_says_so(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"output: got .*/stages/\.sweep, which is not on .*; wanted folders that all machines share"
    ):
        Place(str(tmp_path), str(tmp_path / "stages" / ".sweep"), cpus=1, gpus=0).enter()
