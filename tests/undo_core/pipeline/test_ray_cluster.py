"""A sweep on a Ray cluster of several nodes on this machine. Long: `make test-distributed`."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stage_kinds import Counted, Together
from tiny_run import write_run

from undo_core.io.files import read_json
from undo_core.pipeline.ray_engine import RayEngine
from undo_core.pipeline.store import Store

pytestmark = pytest.mark.distributed_long

STEPS = 300  # of pretraining, so that a test can stop it
GRID = {"noise.beta": [0.1, 0.5]}


def begin(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "undo_core", "sweep", "sweep.yaml", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen, code: int = 0) -> str:
    try:
        said, _ = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == code, said
    return said


def weights(folder: Path) -> dict[str, dict[str, str]]:
    """Hashes of the weights of every stage."""
    return {path.parent.name: read_json(path)["outputs"] for path in sorted(folder.glob("swept/stages/*/manifest.json"))}


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> dict[str, dict[str, str]]:
    """The weights that the local engine makes."""
    folder = write_run(tmp_path_factory.mktemp("local"), steps=STEPS, grid=GRID)
    end(begin(folder))
    return weights(folder)


@pytest.fixture
def cluster(monkeypatch) -> Iterator:
    """A cluster whose first node has no place for a stage."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def engine(cluster, request) -> Iterator[RayEngine]:
    """Nodes with so many places, and a connection to them for stages of so many processes; by default two of one for one."""
    places, ranks = getattr(request, "param", ([1, 1], 1))
    nodes = [cluster.add_node(num_cpus=count) for count in places]
    cluster.nodes_by_raylet = {node.all_processes["raylet"][0].process.pid: node for node in nodes}
    with RayEngine(cluster.address, cpus=1, ranks=ranks) as engine:
        yield engine


def appears(folder: Path, pattern: str) -> Path:
    """Waits for a file."""
    until = time.monotonic() + 900
    while not (found := list(folder.glob(pattern))):
        assert time.monotonic() < until
        time.sleep(0.01)
    return found[0]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def lines(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "lines").read_text().splitlines()]


def test_the_stage_of_a_killed_node_continues_on_another(tmp_path, cluster, engine, capfd):
    """A node that dies is found dead by Ray; on another node the stage continues after its last step."""
    store, finished, failed = Store(tmp_path / "stages"), [], []
    first = Counted(steps=20, pause=0.3)
    last = Counted(steps=1, before=first)
    threading.Thread(target=kill_builder, args=(store, first, cluster)).start()
    engine.build(store, [last], finished.append, lambda *failure: failed.append(failure))
    assert failed == [] and [stage.key for stage in finished] == [first.key, last.key]
    steps = lines(store.folder(first))
    assert [int(step) for step, *_ in steps] == list(range(20)) and len({process for _, _, process, _ in steps}) == 2
    assert "has ended; this process continues its work" in capfd.readouterr().out


def kill_builder(store: Store, stage: Counted, cluster) -> None:
    begun = appears(store.root, f".{stage.name}.partial/lines")
    while len(begun.read_text().splitlines()) < 3:
        time.sleep(0.01)
    family = [int(begun.read_text().split()[2])]
    while family[-1] not in cluster.nodes_by_raylet:
        family.append(parent_of(family[-1]))
    cluster.remove_node(cluster.nodes_by_raylet[family.pop()], allow_graceful=False)
    for process in family:
        with contextlib.suppress(ProcessLookupError):  # it ends with its node
            os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("engine", [([2], 2), ([1, 1], 2)], indirect=True, ids=["one node", "two nodes"])
def test_several_processes_build_a_stage_together(tmp_path, engine, capfd):
    """A placement group with torchrun's launcher on each node; after a kill the stage begins again where it was."""
    store, finished, failed = Store(tmp_path / "stages"), [], []
    first, last = Counted(steps=1), Together(steps=12, pause=0.5, before=Counted(steps=1))
    threading.Thread(target=kill_rank, args=(store, last)).start()
    engine.build(store, [last, Together(how="raise", before=first)], finished.append, lambda *failure: failed.append(failure))
    assert [stage.kind for stage in finished] == ["counted", "together"]
    ((stage, error),) = failed
    assert stage.how == "raise" and "half way" in str(error)
    steps = lines(store.folder(last))
    assert [int(step) for step, *_ in steps] == list(range(12)) and {count for *_, count in steps} == {"2"}
    assert len({process for _, _, process, _ in steps}) == 2
    assert "has ended; this process continues its work" in capfd.readouterr().out
    until = time.monotonic() + 60
    while engine.ray.available_resources().get("CPU") != 2:  # the placement groups are removed
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize("engine", [([1, 1, 1], 2)], indirect=True, ids=["three nodes"])
def test_the_processes_of_a_killed_node_begin_again_on_others(tmp_path, cluster, engine):
    store, finished, failed = Store(tmp_path / "stages"), [], []
    stage = Together(steps=30, pause=0.5)
    threading.Thread(target=kill_builder, args=(store, stage, cluster)).start()
    engine.build(store, [stage], finished.append, lambda *failure: failed.append(failure))
    assert (failed, finished) == ([], [stage])
    steps = lines(store.folder(stage))
    assert [int(step) for step, *_ in steps] == list(range(30)) and {count for *_, count in steps} == {"2"}
    assert len({process for _, _, process, _ in steps}) == 2


@pytest.mark.parametrize("engine", [([2], 2)], indirect=True, ids=["one node"])
def test_a_lost_coordinator_leaves_its_places_to_the_next(tmp_path, engine):
    """The cluster has places for one group only, and Ray does not remove that of a task that was killed."""
    store, finished, failed = Store(tmp_path / "stages"), [], []
    stage = Together(steps=12, pause=0.5)
    killer = threading.Thread(target=kill_coordinator, args=(store, stage))
    killer.start()
    engine.build(store, [stage], finished.append, lambda *failure: failed.append(failure))
    killer.join()
    assert (failed, finished) == ([], [stage])
    assert [int(step) for step, *_ in lines(store.folder(stage))] == list(range(12))


def kill_coordinator(store: Store, stage: Counted) -> None:
    """Kills the process that Ray names after the stage."""
    begun = appears(store.root, f".{stage.name}.partial/lines")
    while len(begun.read_text().splitlines()) < 3:
        time.sleep(0.01)
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if command.read_bytes().startswith(f"ray::{stage.name}".encode()):
                os.kill(int(command.parent.name), signal.SIGKILL)
                return
    raise AssertionError("no coordinator")


def kill_rank(store: Store, stage: Counted) -> None:
    begun = appears(store.root, f".{stage.name}.partial/lines")
    os.kill(int(begun.read_text().split()[2]), signal.SIGKILL)


def test_a_sweep_ends_with_the_bits_of_one_machine(tmp_path, cluster, local):
    folder = write_run(tmp_path, steps=STEPS, grid=GRID)
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    end(begin(folder, "--engine=ray", f"--address={cluster.address}"))
    assert weights(folder) == local and not list(folder.glob("swept/stages/.*"))
    assert len(list(folder.glob("swept/runs/*/results-seed0.json"))) == 2 and (folder / "swept/report/comparison.html").exists()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("swept/**/*.json")}
    end(begin(folder, "--engine=ray", f"--address={cluster.address}"))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a second call does nothing"


def test_a_stopped_sweep_continues(tmp_path, cluster, local):
    cluster.add_node(num_cpus=2)
    folder = write_run(tmp_path, steps=STEPS, grid=GRID)
    sweep = begin(folder, "--engine=ray", f"--address={cluster.address}")
    appears(folder, "swept/stages/.pretrain-*.partial/log.jsonl")
    sweep.send_signal(signal.SIGKILL)
    end(sweep, -signal.SIGKILL)
    end(begin(folder, "--engine=ray", f"--address={cluster.address}"))
    assert weights(folder) == local


def test_a_failed_run_stops_no_other_and_too_small_a_cluster_is_refused(tmp_path, cluster):
    cluster.add_node(num_cpus=2)
    folder = write_run(tmp_path, runs=[{"name": "good"}, {"name": "bad", "pretrain.train.lr": 1e12}])
    address = f"--address={cluster.address}"
    said = end(begin(folder, "--engine=ray", address, "--cpus=3"), 2)
    assert "cpus, ranks: got 3 and 1, which do not fit the cluster" in said and not (folder / "swept").exists()
    said = end(begin(folder, "--engine=ray", address), 1)
    (line,) = [line for line in said.splitlines() if line.startswith("undo: failed: ")]
    assert line.startswith("undo: failed: bad, seed 0: bad: pretrain: DivergedError: ")
    assert [path.parent.name for path in folder.glob("swept/runs/*/results-seed0.json")] == ["good"]
