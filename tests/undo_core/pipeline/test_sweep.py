"""A sweep: the runs that it expands to, the stages that they share, and that no failure or kill loses other runs' work."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import yaml
from stage_kinds import KINDS, Ending, Opened, Opening

from undo_core.attacks.config import NEEDS
from undo_core.cli import main
from undo_core.io.files import read_json
from undo_core.pipeline import workers
from undo_core.pipeline.graph import graph_of
from undo_core.pipeline.stages import Unlearn
from undo_core.pipeline.store import Store
from undo_core.pipeline.sweep_config import SweepConfig, expand

BASE = """
name: tiny
output: unused
workers: {workers}
data: {{kind: arithmetic-compact, train_rows: 200, eval_prompts: 20}}
model:
  config: {{model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}}
pretrain: {{train: {{steps: 2, batch_size: 8}}}}
unlearn: {{train: {{steps: 1, batch_size: 4}}}}
noise: {{alphas: [0.5]}}
distill: {{recover: null, train: {{steps: 2, batch_size: 4}}}}
controls: {{random: false}}
relearn: {{rates: [1.0e-3], evaluate_at: [0, 1], headline_step: 1, extend: 1, batch_size: 4}}
"""


def write(folder: Path, workers: int = 1, **sweep) -> str:
    """Writes the files of a sweep to ``folder`` and returns the path of the sweep's."""
    (folder / "base.yaml").write_text(BASE.format(workers=workers))
    (folder / "strong.yaml").write_text("unlearn: {method: graddiff}\n")
    path = folder / "sweep.yaml"
    values = {"name": "small", "base": str(folder / "base.yaml"), "output": str(folder / "out"), **sweep}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


def sweep(folder: Path, **settings) -> SweepConfig:
    return SweepConfig(**yaml.safe_load(Path(write(folder, **settings)).read_text()))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_grid_is_every_combination(tmp_path):
    grid = {"noise.beta": [0.1, 0.5], "noise.alphas": [[0.2], [0.2, 0.4]], "seed": [0, 3]}
    configs = expand(sweep(tmp_path, grid=grid, overrides={"unlearn.method": "rmu", "data.tokenizer": None}))
    assert [(c.name, c.seed) for c in configs] == [
        (f"beta={beta},alphas={alphas}", seed) for beta in (0.1, 0.5) for alphas in ("0.2", "0.2_0.4") for seed in (0, 3)
    ]
    assert {c.unlearn.method for c in configs} == {"rmu"} and configs[-1].noise.alphas == [0.2, 0.4]
    assert configs[0].output == str(tmp_path / "out" / "runs" / "beta=0.1,alphas=0.2")


def test_named_runs_overlays_and_the_grid_multiply(tmp_path):
    runs = [{"name": "plain"}, {"name": "strong", "overlay": str(tmp_path / "strong.yaml"), "unlearn.train.lr": 0.5}]
    grid = {"unlearn.train.batch_size": [2], "distill.train.batch_size": [4, 8]}
    configs = expand(sweep(tmp_path, runs=runs, grid=grid))
    tail = "unlearn.train.batch_size=2,distill.train.batch_size="
    assert [c.name for c in configs] == [f"{name},{tail}{size}" for name in ("plain", "strong") for size in (4, 8)]
    assert [(c.unlearn.method, c.unlearn.train.lr) for c in configs[::2]] == [("maxent", 9e-5), ("graddiff", 0.5)]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, ["grid, runs: got neither"]),
        ({"grid": {"noise.beta": []}}, ["grid.noise.beta: got no values"]),
        ({"grid": {"noise.beta": [{1, 2}]}}, ["grid: Object of type set"]),  # as !!set
        ({"grid": {"noise.alpha": [0.1]}}, ["run alpha=0.1", "did you mean noise.alphas?"]),
        ({"grid": {"noise.alphas": [[0.5], [1.5]]}}, ["run alphas=1.5", "1.5", "[0, 1]"]),
        ({"runs": [{"name": "../up"}]}, ["runs: got the name '../up'"]),
        ({"runs": [{"noise.beta": 0.1}]}, ["runs: got the name ''"]),
        ({"runs": [{"name": "a"}, {"name": "a"}]}, ["runs: got the name 'a'"]),
        ({"runs": [{"name": "a", "overlay": "none.yaml"}]}, ["none.yaml", "not a file"]),
        ({"grid": {"seed": [1, 1]}}, ["got 2 runs named small with seed 1"]),
        ({"grid": {"seed": [1]}, "workers": 0}, ["workers: got 0"]),
        ({"grid": {"seed": [1]}, "bases": 1}, ["bases"]),
    ],
)
def test_a_mistake_is_one_line_before_any_work(tmp_path, settings, wanted, capsys):
    assert main(["sweep", write(tmp_path, **settings)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("undo: error: ") and error.count("\n") == 1 and not (tmp_path / "out").exists()
    for word in wanted:
        assert word in error


def test_the_dry_run_names_the_runs_that_cannot_begin(tmp_path, capsys):
    lost = {"data.kind": "text", "data.retain": ["no.txt"], "data.forget": ["no.txt"]}
    path = write(tmp_path, runs=[{"name": "plain"}, {"name": "lost", **lost}, {"name": "gone", **lost}])
    assert main(["sweep", path, "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "1 runs need" in said and "2 run(s) cannot begin (lost, gone): plan: FileNotFoundError: data.retain: got no.txt" in said
    )


def test_the_dry_run_counts_what_is_shared(tmp_path, capsys):
    path = write(tmp_path, grid={"noise.beta": [0.1, 0.5]})
    configs = expand(sweep(tmp_path, grid={"noise.beta": [0.1, 0.5]}))
    own = [{stage.key for stage in graph_of(config).stages()} for config in configs]
    # of a run: prepare, pretrain, unlearn, noise, distill, filter, and attacks on unlearn, undo and filter
    assert len(own[0]) == 6 and len(own[0] & own[1]) == 4
    for command in (["sweep", path, "--dry-run"], ["plan", path]):
        assert main(command) == 0 and not (tmp_path / "out").exists()
        text = " ".join(capsys.readouterr().out.split())
        assert (
            "2 runs need 18 stages: 12 distinct ones, 6 of them shared by several runs; 12 are missing, to run with 1 "
            "worker(s)." in text
        )
        assert "beta=0.1 0 9 6 9 0 of 1" in text and "relearn 6 4 0 4" in text and "pretrain 4 2 0 2" in text


def test_runs_share_stages_and_each_leaves_its_results(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, grid={"noise.beta": [0.1, 0.5], "seed": [0, 1]})
    assert main(["sweep", path]) == 0
    out, printed = tmp_path / "out", capsys.readouterr().out
    results = {file: read_json(file) for file in out.glob("runs/*/results-seed*.json")}
    assert {(r["name"], r["seed"]) for r in results.values()} == {(f"beta={b}", seed) for b in (0.1, 0.5) for seed in (0, 1)}
    stages = {path.name for path in (out / "stages").iterdir()}
    for values in results.values():
        used = {entry["stage"] for entry in values["models"]}
        used |= {curve["stage"] for entry in values["models"] for curve in (entry["attack"] or {"curves": []})["curves"]}
        assert used <= stages
    by_seed = [[r for r in results.values() if r["seed"] == seed] for seed in (0, 1)]
    for pair in by_seed:
        unlearned, undo = (
            [next(m for m in r["models"] if m["kind"] == kind)["stage"] for r in pair] for kind in ("unlearn", "undo")
        )
        assert unlearned[0] == unlearned[1] and undo[0] != undo[1]
    assert len([name for name in stages if name.startswith("pretrain")]) == 4, "an original and a filter for each seed"
    assert (out / "runs" / "beta=0.5" / "report" / "report.html").exists() and (out / "report" / "comparison.html").exists()
    assert "comparison.html" in printed and "β=0.5" in printed

    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    for kind in KINDS:
        monkeypatch.setattr(kind, "run", None)
    assert main(["sweep", path]) == 0
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()} == before, "a second call does nothing"

    # every plotted value is what its run's results hold
    with open(out / "report" / "points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["figure"] for row in rows} == {"overview", "methods", "envelopes"}
    for row in rows:
        values = results[Path(row["run"]) / f"results-seed{row['seed']}.json"]
        held = json.dumps(values)
        assert row["stage"] in held and row["stage"] in stages
        if row["figure"] != "robustness":
            assert row["y"] in held


def test_a_failed_run_stops_no_other(tmp_path, monkeypatch, capsys):
    runs = [{"name": "bad", "unlearn.train.lr": 7.0}, {"name": "good"}]
    nothing = {"data.kind": "text", "data.retain": ["none.txt"], "data.forget": ["none.txt"]}
    lacking = [{"name": "file", **nothing}, {"name": "package", "attacks": {"adapters": {"kind": "lora"}}}]
    path, original = write(tmp_path, runs=[*lacking, *runs]), Unlearn.run
    monkeypatch.setitem(NEEDS, "lora", "a_package_that_is_nowhere")

    def failing(self, work):
        if self.config.train.lr == 7.0:
            raise RuntimeError("half\nway")
        return original(self, work)

    monkeypatch.setattr(Unlearn, "run", failing)
    assert main(["sweep", path]) == 1
    out = tmp_path / "out"
    file, package, bad = capsys.readouterr().err.splitlines()
    assert file.startswith(
        "undo: failed: file, seed 0: plan: FileNotFoundError: data.retain: got none.txt, which is not a file"
    )
    assert package.startswith("undo: failed: package, seed 0: plan: ModuleNotFoundError: kind: got lora, which needs a_package")
    assert bad == "undo: failed: bad, seed 0: bad: unlearn maxent: RuntimeError: half way"
    assert (out / "runs" / "good" / "results-seed0.json").exists() and not (out / "runs" / "bad").exists()
    (alone,) = read_json(out / "report" / "comparison.json")["settings"]
    assert alone["label"] == "MaxEnt" and alone["runs"] == [str(out / "runs" / "good")]
    monkeypatch.setattr(Unlearn, "run", original)
    assert main(["sweep", write(tmp_path, runs=runs)]) == 0 and (out / "runs" / "bad" / "results-seed0.json").exists()
    assert [s["label"] for s in read_json(out / "report" / "comparison.json")["settings"]] == ["bad", "good"]


def stages(*how: str) -> list[Ending]:
    first = [Ending(how=h, number=index, title=f"{h} {index}") for index, h in enumerate(how)]
    return [*first, Ending(how="work", before=first[0], title="reader of the first")]


def test_a_worker_that_ends_takes_its_own_stage_alone_and_each_has_its_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    store, failed, finished = Store(tmp_path), {}, []
    wanted = stages("kill", "raise", "work", "work", "work")
    workers.run_stages(
        store, wanted, 2, lambda stage: finished.append(stage.title), lambda s, e: failed.update({s.title: type(e)})
    )
    assert failed == {"kill 0": BrokenProcessPool, "raise 1": ValueError}
    assert sorted(finished) == ["work 2", "work 3", "work 4"]
    assert not store.done(wanted[-1]), "it reads what failed"
    assert {store.manifest(stage)["gpu"] for stage in wanted[2:5]} <= {"GPU-a", "GPU-b"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-a, GPU-b"


def test_an_idle_worker_begins_a_stage_that_lacks_only_a_late_input(tmp_path):
    """Each first stage waits for the one that begins ahead of it."""
    store, failed, finished = Store(tmp_path / "stages"), {}, []
    first = Opened(how="work", gate=str(tmp_path / "a"), title="first")
    ahead = Opening(how="work", after=first, title="ahead")
    failing = Opened(how="raise", gate=str(tmp_path / "b"), before=first, title="failing")
    given_up = Opening(how="work", after=failing, title="given up")
    reader = Ending(how="work", before=given_up, title="reader of what was given up")
    last = Ending(how="work", before=ahead, title="last")
    workers.run_stages(
        store,
        [ahead, last, given_up, reader],
        2,
        lambda stage: finished.append(stage.title),
        lambda stage, error: failed.update({stage.title: str(error)}),
    )
    assert failed == {"failing": "half way"} and sorted(finished) == ["ahead", "first", "last"]
    assert store.manifest(ahead)["found"] == store.manifest(ahead)["inputs"]["after"]["folder"] == first.name
    assert not store.done(given_up) and not store.done(reader)


def test_a_stage_does_not_wait_for_an_input_that_nobody_can_build(tmp_path):
    store = Store(tmp_path / "stages")
    first = Ending(how="work", title="first")
    late = Opened(how="work", gate=str(tmp_path / "gate"), before=first, title="late")
    workers.run_stages(store, [Opening(how="work", after=late)], 2, lambda stage: shutil.rmtree(store.folder(stage)))
    assert workers.missing_with_inputs(store, [late]).keys() == {first.key, late.key}, "the next round builds them"


def test_gpus_at_hand(monkeypatch):
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    assert workers.gpus() == ["GPU-a", "GPU-b"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert workers.gpus() == ["0", "1"]
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 0)
    assert workers.gpus() == []


def test_without_isolation_the_first_failure_is_raised(tmp_path):
    with pytest.raises(ValueError, match="half way"):
        workers.run_stages(Store(tmp_path), stages("raise"), 1, lambda stage: None)


def test_killed_it_continues(tmp_path):
    path = write(tmp_path, grid={"noise.beta": [0.1, 0.5]})
    command = [sys.executable, "-m", "undo_core", "sweep", path]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out" / "stages").glob("unlearn-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {p: (p / "manifest.json").stat().st_mtime_ns for p in (tmp_path / "out" / "stages").glob("[a-z]*")}
    assert kept and not list(tmp_path.glob("out/runs/*/results-*"))
    assert main(["sweep", path]) == 0
    assert len(list(tmp_path.glob("out/runs/*/results-seed0.json"))) == 2 and (tmp_path / "out/report/comparison.html").exists()
    assert {p: (p / "manifest.json").stat().st_mtime_ns for p in kept} == kept
