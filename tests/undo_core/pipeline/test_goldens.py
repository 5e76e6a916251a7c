"""Frozen texts: what users see, and what runs are found by: stage keys, manifests, results, help texts and plans.

Each test makes its text again and compares it with the file in ``goldens/``. A change that is meant is recorded by

    UNDO_GOLDENS=write python -m pytest tests/undo_core/pipeline/test_goldens.py

and is then read in the diff. What depends on the machine or on versions (times, sizes of a process, digests of weights,
computed numbers) is replaced by a word.
"""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import torch
import undo_kernels
import yaml
from rich.console import Console
from stage_kinds import KINDS as CLASSES
from undo_kernels.ops.noise_rules import NoiseRule

from undo_core.attacks.config import AttackConfig
from undo_core.cli import single_stages as commands
from undo_core.cli.parser import command_parser, run_config
from undo_core.data.config import DataConfig
from undo_core.io.files import hash_json, read_json
from undo_core.models.config import ModelConfig
from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.graph import graph_of
from undo_core.pipeline.run import missing_stages, save_results
from undo_core.pipeline.stages.gate import Gate
from undo_core.pipeline.store import Store
from undo_core.pipeline.sweep_config import SweepConfig, expand
from undo_core.pipeline.workers import run_stages
from undo_core.planning.fit import fit_notes
from undo_core.planning.table import plan_table
from undo_core.planning.timing import Measure
from undo_core.training import TrainConfig
from undo_core.unlearning import UnlearnConfig

ROOT = Path(__file__).resolve().parents[3]
GOLDENS = Path(__file__).parent / "goldens"
RUNS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("sweep-"))
KINDS = {kind.kind for kind in CLASSES}
SWEEPS = sorted((ROOT / "configs").glob("sweep-*.yaml"))


def golden(name: str, text: str) -> str:
    """Returns the recorded text, or records and returns ``made`` if goldens are written."""
    path = GOLDENS / name
    if os.environ.get("UNDO_GOLDENS") == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path.read_text()


def check_json(name: str, value) -> None:
    text = json.dumps(value, indent=1) + "\n"
    assert json.loads(text) == json.loads(golden(name, text))


# -- files that configurations name, written by hand so that no library decides their bytes
# --------------------------------------

CHECKPOINT = {
    "model_type": "gemma2",
    "vocab_size": 20_000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 2048,
    "sliding_window": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
VOCABULARY = {"<pad>": 0, "<eos>": 1, **{f"word{i}": i for i in range(2, 300)}}
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, i in (("<pad>", 0), ("<eos>", 1))
    ],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "<eos>"},
}
SPECIAL = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<eos>"}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Makes a working folder with all files that the configurations name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("keep", "forget"):
        Path(f"{name}.txt").write_text(f"one {name}\ntwo {name}\n")
    for name in ("gemma-2-2b", "gemma-3-270m", "model"):
        folder = Path("checkpoints") / name
        folder.mkdir(parents=True)
        for file, value in (("config", CHECKPOINT), ("tokenizer", TOKENIZER), ("tokenizer_config", SPECIAL)):
            (folder / f"{file}.json").write_text(json.dumps(value))


def configuration(path: Path) -> RunConfig:
    """Returns a run's configuration. An overlay is applied to the demo; text files are added where none are named."""
    settings = yaml.safe_load(path.read_text())
    name = f"configs/{path.name}"
    arguments = ["--config", name] if "model" in settings else ["--config=configs/arithmetic-cpu.yaml", f"--config={name}"]
    if "data" in settings and not settings["data"].get("retain", True):
        arguments += ["--data.retain=[keep.txt]", "--data.forget=[forget.txt]"]
    return run_config(arguments)


def stages(config: RunConfig):
    """Returns every stage of a run except those that extend grids."""
    return missing_stages(Store(Path("nowhere")), config, graph_of(config))


# -- keys ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_keys_of_runs(path, files):
    check_json(f"keys/{path.stem}.json", {stage.name: stage.title for stage in stages(configuration(path))})


def test_keys_of_sweeps(files):
    """Records each run's models at its first seed, and a digest of all its stages."""
    found = {}
    for path in SWEEPS:
        sweep = SweepConfig(**yaml.safe_load(path.read_text()))
        first = {key: values[:1] if key == "seed" else values for key, values in sweep.grid.items()}
        for config in expand(dataclasses.replace(sweep, grid=first)):
            models = {model.name: model.stage.name for model in graph_of(config).models}
            found[f"{path.stem}: {config.name}"] = {**models, "all": hash_json([stage.name for stage in stages(config)])[:12]}
    check_json("keys/sweeps.json", found)


# -- help ----------------------------------------------------------------------------------------------------------------------


def test_help(monkeypatch):
    """Line breaks may differ; the parser's library decides them."""
    monkeypatch.setenv("COLUMNS", "120")
    parser = command_parser()
    texts = {"undo": parser.format_help()}
    texts |= {name: sub.format_help() for name, sub in parser._subcommands_action._name_parser_map.items()}
    assert {path.stem for path in (GOLDENS / "help").glob("*.txt")} <= set(texts)
    for name, text in texts.items():
        assert "".join(text.split()) == "".join(golden(f"help/{name}.txt", text).split()), name


# -- plans ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def anywhere(monkeypatch):
    """Removes what depends on the machine: no GPU, no kernels of this processor, and one second per step."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Measure, "_step", lambda self, sequences, length: 1.0)
    monkeypatch.setattr(Measure, "_matrix_rate", lambda self: 1e12)
    monkeypatch.setattr(Gate, "estimated_seconds", lambda self, scene: 1.0)
    with undo_kernels.backend("reference"):
        yield


def close(one: str, other: str) -> bool:
    """Whether two numbers of memory agree; what a model keeps for its backward pass differs a little between versions."""
    values = [word.replace(",", "") for word in (one, other)]
    if one == other or not all(re.fullmatch(r"[\d.]+", value) for value in values):
        return one == other
    return abs(float(values[0]) - float(values[1])) <= max(2, 0.03 * float(values[1]))


# The many students of leak-channels need stages that other plans have too, and seconds to plan.
@pytest.mark.parametrize("path", [path for path in RUNS if path.stem != "leak-channels"], ids=lambda path: path.stem)
def test_plans(path, files, anywhere, monkeypatch):
    """Work and disk agree exactly, memory within 3 %."""
    monkeypatch.setattr("undo_core.planning.table.load_warning", lambda workers: "")
    console = Console(width=140, highlight=False)
    with console.capture() as capture:
        console.print(plan_table(configuration(path)))
    text = "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())
    for got, wanted in zip(text.split("Peak memory"), golden(f"plans/{path.stem}.txt", text).split("Peak memory"), strict=True):
        words = zip(got.split(), wanted.split(), strict=True)
        assert got == wanted or ("during" in got and all(close(*pair) for pair in words)), got


def test_what_makes_a_run_fit(files, anywhere):
    config = configuration(ROOT / "configs" / "arithmetic-cpu.yaml")
    small = dataclasses.replace(config.model, config={**config.model.config, "num_hidden_layers": 1})
    config = dataclasses.replace(config, model=small, noise=dataclasses.replace(config.noise, alphas=[0.6]))
    flags, hopeless = fit_notes(config, 590 << 20)
    text = "\n".join([*flags, *hopeless]) + "\n"
    assert text == golden("fit.txt", text)


# -- manifests and results
# ------------------------------------------------------------------------------------------------------

OF_THE_MACHINE = ("versions", "machine", "seconds", "peak_bytes", "predicted_bytes")
EXACT = ("settings", "config", "flops", "alpha", "rate", "rates")  # keys whose numbers a model does not compute


def steady(value, name: str = "", exact: bool = False):
    """Removes what depends on the machine: digests, sizes, times, and results in floating point."""
    exact = exact or name in EXACT
    if name in OF_THE_MACHINE:
        return "of the machine"
    if isinstance(value, dict):
        return {key: steady(entry, key, exact) for key, entry in value.items()}
    if isinstance(value, list):
        return [steady(entry, "", exact) for entry in value]
    if isinstance(value, float) and not exact:
        return "computed"
    return re.sub(r"\b[0-9a-f]{64}\b", "<sha256>", value) if isinstance(value, str) else value


SHAPE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
EVERY_KIND = {
    "name": "every-kind",
    "output": "out",
    "data": {"train_rows": 100, "eval_prompts": 10},
    "model": {"config": SHAPE},
    "pretrain": {"stop_retain": 2.0, "train": {"steps": 2, "batch_size": 4}},
    "unlearn": {"forget_rows": 7, "train": {"steps": 2, "batch_size": 4}},
    "noise": {"alphas": [0.5], "rules": [{"match": "embeddings", "alpha": 0.2}], "layers": "0"},
    "distill": {"recover": -2.0, "train": {"steps": 2, "batch_size": 4}, "teacher": {"kind": "cached", "dtype": "bfloat16"}},
    "relearn": {"rates": [0.001], "evaluate_at": [0, 1], "headline_step": 1, "extend": 0, "batch_size": 4},
    "controls": {"random": False, "gate": {"share": 0.05}},
    "damage": {"operators": ["prune"], "alphas": [0.4]},
    "students": {"erased": {"alpha": 0.5, "erase": {"tokens": 2}}},
    "attacks": {
        "prompted": {"kind": "fewshot", "shots": [1]},
        "merged": {"kind": "merge", "weights": [0.5]},
        "batched": {"together": 2, "rates": [0.001, 0.002], "evaluate_at": [0, 1], "headline_step": 1, "extend": 0},
    },
    "measures": {"similarity": {"kind": "cka", "sequences": 4}},
}


def test_a_manifest_of_each_kind_and_the_results(files):
    Path("run.yaml").write_text(yaml.safe_dump(EVERY_KIND))
    config = run_config(["--config=run.yaml"])
    store, plan = Store(Path("out/stages")), graph_of(config)
    manifests = {}
    while missing := missing_stages(store, config, plan):
        run_stages(store, missing, 1, lambda stage: manifests.setdefault(stage.kind, store.manifest(stage)))
    assert set(manifests) == KINDS - {
        "replay",
        "search",
        "untie",
    }  # a command of its own, optuna (test_search.py), a tied model (test_students.py)
    check_json("manifests.json", steady(manifests))
    check_json("results.json", steady(save_results(store, config, plan, "undo run")))


def test_a_manifest_of_each_command(files):
    train = TrainConfig(steps=1, batch_size=4)
    commands.prepare("data", DataConfig(train_rows=50, eval_prompts=10), ModelConfig(config=SHAPE), seed=3)
    commands.unlearn("data", "unlearned", "data", UnlearnConfig("graddiff", train=train))
    commands.noise("unlearned", "noised", rules=[NoiseRule("embeddings", alpha=0.1)], layers="0")
    commands.noise("unlearned", "replayed", replay="*q_proj*")
    commands.damage("unlearned", "damaged", "permute", alpha=0.5)
    commands.cache("unlearned", "cached", "data", topk=4, batch_size=8)
    commands.distill("unlearned", "noised", "streamed", "data", train, recover=None, streamed=True, hidden_weight=0.5)
    commands.distill("unlearned", "noised", "distilled", "data", train, cache="cached", recover=-2.0)
    grid = {"evaluate_at": [0, 1], "headline_step": 1, "extend": 0, "batch_size": 4}
    commands.relearn("distilled", "relearned", "data", AttackConfig(rates=[0.01], **grid))
    commands.relearn("distilled", "prompted", "data", AttackConfig(kind="fewshot", shots=[1]))
    found = {str(path.parent): read_json(path) for path in sorted(Path().glob("**/manifest.json"))}
    assert {facts["kind"] for facts in found.values()} == KINDS - {
        "pretrain",
        "initialise",
        "gate",
        "intervene",
        "measure",
        "grid",
        "search",
        "erase",
        "untie",
    }
    check_json("commands.json", steady(found))
    again = commands.noise("unlearned", "noised", rules=[NoiseRule("embeddings", alpha=0.1)], layers="0")
    assert again == 0, "found again"
