"""The whole method at a tiny size: keys, resuming, controls, attack."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from file_hashes import weight_hashes
from fork_server import session
from stage_kinds import KINDS, Ending
from transformers import AutoModelForCausalLM, AutoTokenizer

from undo_core.attacks.relearning import AttackConfig
from undo_core.cli import main
from undo_core.data.config import DataConfig
from undo_core.distillation.config import DistillConfig
from undo_core.io.files import hash_file, read_json
from undo_core.models.config import ModelConfig
from undo_core.noise.config import NoiseConfig
from undo_core.pipeline.config import ControlsConfig, PretrainConfig, RunConfig
from undo_core.pipeline.graph import attacked_models, graph_of
from undo_core.pipeline.run import run
from undo_core.pipeline.stages.prepare import prepare_stage
from undo_core.pipeline.store import Store
from undo_core.training import TrainConfig
from undo_core.unlearning import UnlearnConfig

# recover: -1 asks for more than the teacher has, so that every student trains to its limit.
TINY = """
name: tiny
output: {output}
data: {{kind: arithmetic-compact, train_rows: 400, eval_prompts: 40}}
model:
  config:
    model_type: gemma2
    hidden_size: 16
    intermediate_size: 32
    num_hidden_layers: 2
    num_attention_heads: 2
    num_key_value_heads: 1
    head_dim: 8
    max_position_embeddings: 64
    sliding_window: 64
pretrain: {{stop_retain: 0.9, stop_forget: 0.95, train: {{steps: 6, batch_size: 16, lr: 1.0e-3, eval_every: 3}}}}
unlearn: {{train: {{steps: 4, batch_size: 8, lr: 1.0e-3}}}}
noise: {{alphas: [0.3, 0.7]}}
distill: {{recover: -1.0, train: {{steps: 6, batch_size: 16, lr: 1.0e-3, eval_every: 2}}}}
controls: {{oracle_steps: 3}}
relearn: {{rates: [1.0e-3, 2.0e-3], evaluate_at: [0, 2, 4], headline_step: 4, extend: 1, batch_size: 8}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns the folder and the configuration file of a finished tiny run."""
    folder = tmp_path_factory.mktemp("run")
    config = folder / "tiny.yaml"
    config.write_text(TINY.format(output=folder / "out"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as in the processes that the tests below compare with
        assert main(["run", str(config)]) == 0
    return folder / "out", config


def test_every_stage_folder_loads(finished):
    output, _ = finished
    stages = [path for path in (output / "stages").iterdir() if not path.name.startswith(".")]
    kinds = {path.name.split("-")[0] for path in stages}
    assert kinds == {"prepare", "pretrain", "initialise", "unlearn", "noise", "distill", "relearn"}
    for path in stages:
        model = AutoModelForCausalLM.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert model.config.vocab_size == len(tokenizer) == 17
        manifest = read_json(path / "manifest.json")
        assert (
            manifest["kind"] in path.name
            and manifest["settings"]
            and manifest["versions"]["torch"]
            and manifest["peak_bytes"] > 0
        )
        assert manifest["outputs"]["model.safetensors"] == hash_file(path / "model.safetensors")
    assert not list((output / "stages").glob(".*")), "nothing half-made is left"


def test_results_hold_every_model(finished):
    results = read_json(finished[0] / "results-seed0.json")
    names = [model["name"] for model in results["models"]]
    assert names == ["original", "unlearn", "undo-0.3", "undo-0.7", "random", "filter", "oracle"]
    for model in results["models"]:
        assert model["metrics"]["forget"]["n"] == 40 and 0 <= model["metrics"]["retain"]["value"] <= 1
        assert (model["attack"] is None) == (model["name"] == "original")
        if model["attack"]:
            assert len(model["attack"]["curves"]) == 3, "two rates and one extension"
            assert all(len(curve["forget"]) == 3 for curve in model["attack"]["curves"])
    student = results["models"][2]["training"]
    assert student["limit_reached"] == (student["stop_step"] is None)
    unlearned = results["models"][1]["training"]
    own = student["tokens"] - unlearned["tokens"]
    assert student["unlearning_steps"] == pytest.approx(unlearned["tokens"] / own * student["steps"]) and own > 0
    assert unlearned["unlearning_steps"] == 0
    assert unlearned["chain"] == {key: unlearned[key] for key in ("steps", "seconds", "peak_bytes")}
    assert student["chain"]["steps"] == student["steps"] + unlearned["steps"]
    assert student["chain"]["seconds"] == pytest.approx(student["seconds"] + unlearned["seconds"])
    assert student["chain"]["peak_bytes"] == max(student["peak_bytes"], unlearned["peak_bytes"])
    assert unlearned["labelled_forget_tokens"] > 0 and student["tokens"] > unlearned["tokens"]
    assert (finished[0] / "report" / "report.html").exists()


def test_a_second_run_does_nothing(finished, monkeypatch, capsys):
    output, config = finished
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}

    def refuse(*_):
        raise AssertionError("a stage was run again")

    for kind in KINDS:
        monkeypatch.setattr(kind, "run", refuse)
    assert main(["run", str(config)]) == 0
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before
    assert capsys.readouterr().out.strip().endswith("report.html")


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_it_ends_with_the_same_weights(finished, tmp_path, workers):
    reference, config = finished
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "undo_core", "run", str(config), f"--output={output}", f"--workers={workers}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    generator = random.Random(time.time_ns())  # at any time: the result must not depend on it
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)
    started = output / "stages"
    while not started.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(generator.uniform(0.0, 1.5))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while session(process.pid):
        assert time.monotonic() < deadline, "a process that it started outlives it"
        time.sleep(0.1)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert weight_hashes(output / "stages") == weight_hashes(reference / "stages")
    got, wanted = (read_json(folder / "results-seed0.json") for folder in (output, reference))
    assert [m["metrics"] for m in got["models"]] == [m["metrics"] for m in wanted["models"]]


def test_a_cached_teacher_gives_the_same_results(finished, tmp_path, monkeypatch, capsys):
    reference, config = finished
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "out"
    shutil.copytree(reference / "stages", output / "stages")  # stages before the teacher are shared
    command = ["run", str(config), f"--output={output}", "--distill.teacher.kind=cached"]

    import undo_core.distillation.cache_writer as module

    forward, calls = module.hidden_states, 0

    def dying(*arguments):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(module, "hidden_states", dying)
    assert main(command) == 130 and main(command) == 0

    stages = {path.name: read_json(path / "manifest.json") for path in (output / "stages").iterdir()}
    (cache,) = [facts for facts in stages.values() if facts["kind"] == "cache"]
    assert cache["outputs"] and cache["positions"] > 0 and "cached-00001-of-00001.safetensors" in cache["outputs"]
    results, wanted = (read_json(folder / "results-seed0.json")["models"] for folder in (output, reference))
    for got, model in zip(results, wanted, strict=True):
        assert got["name"] == model["name"] and got["metrics"] == model["metrics"]
        curves = [[c["forget"] for c in (m["attack"] or {"curves": []})["curves"]] for m in (got, model)]
        assert curves[0] == curves[1]
        if model["training"]:
            same = ("steps", "tokens", "history", "stop_step", "labelled_forget_tokens")
            assert {name: got["training"][name] for name in same} == {name: model["training"][name] for name in same}
    # The teacher's trunk has run over each sequence once, and not at each step; its head's product is part of every step.
    undo, before = results[2], wanted[2]
    facts = stages[undo["stage"]]
    positions, forward_pass = (
        facts["positions_by_source"]["text"],
        cache["flops"] / (800 * facts["positions_by_source"]["text"] / 96),
    )
    head = 2 * 17 * 16
    assert undo["training"]["flops"] == pytest.approx(
        before["training"]["flops"] - positions * (forward_pass - head) + cache["flops"], rel=1e-12
    )
    assert results[-1]["training"]["flops"] == wanted[-1]["training"]["flops"], "the oracle's own teacher is streamed"


def small(**changes) -> RunConfig:
    values = {
        "name": "small",
        "output": "unused",
        "data": DataConfig(),
        "model": ModelConfig(config={"model_type": "gemma2"}),
        "pretrain": PretrainConfig(),
        "unlearn": UnlearnConfig(),
        "noise": NoiseConfig(alphas=[0.2, 0.6]),
        "distill": DistillConfig(),
        "relearn": AttackConfig(),
        "controls": ControlsConfig(),
    }
    return RunConfig(**{**values, **changes})


def keys(config: RunConfig) -> dict[str, str]:
    return {model.name: model.stage.key for model in graph_of(config).models}


def test_a_sweep_shares_what_it_can():
    base = keys(small())
    other = keys(small(noise=NoiseConfig(alphas=[0.6, 0.9])))
    assert {name for name in base if name in other and base[name] == other[name]} == {
        "original",
        "unlearn",
        "undo-0.6",
        "random",
        "filter",
    }
    other = keys(small(unlearn=UnlearnConfig(method="graddiff")))
    assert (
        base["original"] == other["original"] and base["unlearn"] != other["unlearn"] and base["undo-0.6"] != other["undo-0.6"]
    )
    assert not set(base.values()) & set(keys(small(seed=1)).values())
    config = small(noise=NoiseConfig(seed=3))
    assert keys(config)["random"] == base["random"] and "undo-0.6" in keys(config)


def test_every_setting_is_part_of_the_key():
    config = small()

    def attacked(config: RunConfig) -> str:
        """Returns the key of the headline attack on the unlearned model at its first rate."""
        return attacked_models(config, graph_of(config))["relearn"]["unlearn"].stages()[0].key

    for name, value in (("batch_size", 8), ("clip", 0.5), ("evaluate_at", [0, 100]), ("seed", 7), ("precision", "bfloat16")):
        changed = small(relearn=dataclasses.replace(config.relearn, **{name: value}))
        assert attacked(changed) != attacked(config)
    train = TrainConfig()
    base = graph_of(small(distill=DistillConfig(train=train))).models[2].stage.key
    for field in dataclasses.fields(TrainConfig):
        named = {"schedule": "linear", "precision": "bfloat16", "optimizer": "adamw-8bit", "attention": "eager"}
        named |= dict.fromkeys(("step_in_backward", "activation_checkpointing"), True)
        if field.name in named:
            value = named[field.name]
        else:
            value = {"min_lr": 0.1, "micro_batch_size": 3, "seed": 11}.get(
                field.name, (getattr(train, field.name) or 0) * 0.5 + 0.25
            )
        if field.type in ("int", "int | None") and field.name not in ("micro_batch_size", "seed"):
            value = getattr(train, field.name) + 1
        changed = dataclasses.replace(train, **{field.name: value})
        assert graph_of(small(distill=DistillConfig(train=changed))).models[2].stage.key != base, field.name


@pytest.mark.parametrize("as_checkpoint", [False, True])
def test_the_tokenizer_s_files_are_part_of_the_key(tmp_path, as_checkpoint):
    def key():
        if as_checkpoint:
            return prepare_stage(DataConfig(kind="arithmetic"), ModelConfig(path=str(tmp_path)), 0).key
        return prepare_stage(DataConfig(kind="arithmetic", tokenizer=str(tmp_path)), ModelConfig({"model_type": "gpt2"}), 0).key

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("one")
    known = [key()]
    (tmp_path / "README.md").write_text("no file of a tokenizer")
    assert key() == known[0]
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
    ):
        (tmp_path / name).write_text("two")
        assert key() not in known, name
        known.append(key())


def test_a_failed_stage_leaves_no_folder(tmp_path, monkeypatch):
    store, stage = Store(tmp_path), Ending(how="raise")
    with pytest.raises(ValueError, match="half way"):
        store.ensure(stage)
    assert not store.folder(stage).exists() and not store.done(stage)
    monkeypatch.setattr(Ending, "run", lambda self, work: {"fine": not list(work.output.iterdir())})
    assert read_json(store.ensure(stage) / "manifest.json")["fine"], "the second try starts from an empty folder"


def test_two_processes_share_the_work(finished, tmp_path):
    _, config = finished
    command = [sys.executable, "-m", "undo_core", "run", str(config), f"--output={tmp_path / 'shared'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert weight_hashes(tmp_path / "shared" / "stages") == weight_hashes(finished[0] / "stages")


def test_run_is_a_function_too(tmp_path):
    config = small(
        output=str(tmp_path),
        data=DataConfig(train_rows=100, eval_prompts=20),
        model=ModelConfig(
            config={
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
        ),
        pretrain=PretrainConfig(train=TrainConfig(steps=2, batch_size=4)),
        unlearn=UnlearnConfig(train=TrainConfig(steps=1, batch_size=4)),
        noise=NoiseConfig(alphas=[0.5]),
        distill=DistillConfig(recover=None, train=TrainConfig(steps=2, batch_size=4)),
        relearn=AttackConfig(rates=[1e-3], evaluate_at=[0, 1], headline_step=1, extend=0, batch_size=4),
        controls=ControlsConfig(filter=False, random=False),
    )
    page = run(config, "test")
    assert page.is_file() and [m["name"] for m in json.loads((tmp_path / "results-seed0.json").read_text())["models"]] == [
        "original",
        "unlearn",
        "undo-0.5",
    ]
