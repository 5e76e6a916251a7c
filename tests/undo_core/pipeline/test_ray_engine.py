"""A sweep's stages as tasks of a cluster: what waits for what, and what a mistake says. Nothing here needs Ray."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from tiny_run import RUN

from undo_core.cli import main
from undo_core.pipeline import launcher, ray_engine
from undo_core.pipeline.graph import graph_of
from undo_core.pipeline.ray_engine import Place, tasks_of
from undo_core.pipeline.store import Store
from undo_core.pipeline.sweep_config import SweepConfig, expand

BASE = {**{name: RUN[name] for name in ("name", "output", "data", "model", "noise")}, "controls": {"random": False}}


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
    ("ranks", "rooms", "parts"),
    [
        (1, [8], [1]),
        (4, [8], [4]),
        (8, [8], [8]),
        (16, [8, 8], [8, 8]),
        (12, [8, 0, 8], [6, 6]),
        (6, [4, 4], [3, 3]),
        (7, [4] * 7, [1] * 7),
        (2, [1, 1], [1, 1]),
        (4, [3, 1], []),
        (4, [3, 1, 1, 1], [1] * 4),
        (7, [4, 4], []),
        (1, [0], []),
        (2, [], []),
    ],
)
def test_processes_are_divided_equally_among_few_machines(ranks, rooms, parts):
    assert launcher.sizes(ranks, rooms) == parts


class Cluster:
    """As much of Ray as reserving places needs: machines with so many places, and groups that have a name."""

    def __init__(self, *places: int) -> None:
        self.places, self.groups, self.held, self.after = list(places), {}, 0, lambda: None

    def nodes(self) -> list[dict]:
        return [{"Alive": places > 0, "Resources": {"CPU": places}} for places in self.places]

    def placement_group(self, needed: list[dict], strategy: str, name: str) -> "Cluster.Group":
        assert name not in self.groups and strategy == ("STRICT_SPREAD" if len(needed) > 1 else "PACK")
        self.groups[name] = self.Group(self, name, [int(bundle["CPU"]) for bundle in needed])
        return self.groups[name]

    def get_placement_group(self, name: str) -> "Cluster.Group":
        if name not in self.groups:
            raise ValueError("Failed to look up placement group")
        return self.groups[name]

    def remove_placement_group(self, group: "Cluster.Group") -> None:
        del self.groups[group.name]

    class Group:
        def __init__(self, cluster: "Cluster", name: str, parts: list[int]) -> None:
            self.cluster, self.name, self.parts = cluster, name, parts

        def wait(self, timeout_seconds: float) -> bool:
            others = sum(sum(group.parts) for group in self.cluster.groups.values() if group is not self)
            if sum(self.parts) + others <= sum(self.cluster.places):
                return True
            self.cluster.after()
            return False


@pytest.fixture
def reserve(monkeypatch, tmp_path):
    """Reserves four places of a cluster in which nothing takes time."""
    monkeypatch.setattr(ray_engine.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(ray_engine, "REPLACED", 0.0)

    def call(cluster: Cluster):
        for name in ("ray", "ray.util"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "ray.util.placement_group", cluster)
        return ray_engine._reserve(cluster, Place(str(tmp_path), str(tmp_path), cpus=1, gpus=0), "stage", 4)

    return call


def test_the_places_of_a_lost_coordinator_are_freed(reserve):
    cluster = Cluster(4)
    reserve(cluster)
    group, parts = reserve(cluster)
    assert parts == [4] and cluster.groups == {"stage": group}


def test_processes_are_divided_anew_when_the_cluster_changes(reserve):
    cluster = Cluster(4)
    cluster.placement_group([{"CPU": 4}], "PACK", "another stage")
    looks = []

    def change() -> None:
        looks.append(len(cluster.groups))
        if len(looks) == 2:
            cluster.places[:] = [0, 2, 2]
            del cluster.groups["another stage"]

    cluster.after = change
    group, parts = reserve(cluster)
    assert parts == group.parts == [2, 2] and looks == [2, 2], "it waited for a busy cluster"


def test_a_cluster_that_became_too_small_is_named(reserve):
    cluster = Cluster(4)
    cluster.placement_group([{"CPU": 4}], "PACK", "another stage")
    cluster.after = lambda: cluster.places.__setitem__(0, 3)
    with pytest.raises(ValueError, match=r"cpus, ranks: got 1 and 4, which do not fit the cluster of 1 machine.* with 3 place"):
        reserve(cluster)
    assert list(cluster.groups) == ["another stage"]


def test_no_secret_goes_into_the_environment_that_ray_shows():
    variables = {"HF_HOME": "/hf", "HF_TOKEN": "hf_x", "HF_HUB_TOKEN": "hf_y", "NCCL_DEBUG": "WARN", "AWS_SECRET": "z"}
    assert ray_engine.passed_on(variables) == {"HF_HOME": "/hf", "NCCL_DEBUG": "WARN"}


class LostError(Exception):
    """Stands for any error of Ray."""


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("NodeDiedError", "its process or machine was lost 4 times (NodeDiedError: on host)"),
        ("WorkerCrashedError", "its process or machine was lost 4 times (WorkerCrashedError: on host)"),
        ("RuntimeEnvSetupError", "Ray could not run it (RuntimeEnvSetupError: on host)"),
    ],
)
def test_what_ray_reports_is_said(kind, said):
    kinds = {name: type(name, (LostError,), {}) for name in ("NodeDiedError", "WorkerCrashedError", "RuntimeEnvSetupError")}
    engine = ray_engine.RayEngine.__new__(ray_engine.RayEngine)

    def get(result: None) -> None:
        raise kinds[kind]("on\n  host")

    exceptions = SimpleNamespace(RayTaskError=type("RayTaskError", (LostError,), {}), RayError=LostError, **kinds)
    engine.ray = SimpleNamespace(get=get, exceptions=exceptions)
    assert str(engine._error(None)) == said


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
