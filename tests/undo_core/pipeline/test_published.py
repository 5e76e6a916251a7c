"""The published settings: the shipped files have them, every method runs with them, and each file runs at a tiny size."""

import dataclasses
import functools
import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from generated_questions import bytewise_tokenizer, questions, write
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from undo_core.cli import main
from undo_core.data.sequences import Sequences
from undo_core.data.tokenizers import train_bpe
from undo_core.io.files import read_json
from undo_core.models import architecture, build_model
from undo_core.pipeline.sweep_config import SweepConfig, expand
from undo_core.unlearning import unlearn

ROOT = Path(__file__).resolve().parents[3]
WORDS = {
    "english": "house river garden window morning paper light stone field bread",
    "korean": "집 강 정원 창문 아침 종이 빛 돌 들 빵 나무 바람 구름 길",
}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
RATES = [1e-6, 4e-6, 7e-6, 1e-5, 5e-5, 7e-5, 1e-4, 4e-4, 7e-4, 1e-3]


def shipped(name):
    return yaml.safe_load((ROOT / "configs" / f"sweep-{name}-methods.yaml").read_text())


@functools.cache
def runs_of(name):
    """Returns the runs of a sweep at its first seed, by name."""
    settings = shipped(name)
    settings["grid"] = {"seed": settings["grid"]["seed"][:1]}
    return {config.name: config for config in expand(SweepConfig(**settings))}


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("name", "parameters", "pretrain", "teacher", "distill", "attack"),
    [  # tokens of a step and sequences of a pass; steps, rates from and to, weight decay
        (
            "language",
            112_904_000,
            (819_200, 5, 2441, 4e-4, 4e-5, 0.1, 50),
            (8192, 100, 3e-5),
            (491_520, 4, 9e-4, 7e-4, 0.0, 50),
            (8 * 2048, "bfloat16"),
        ),
        (
            "arithmetic",
            328_772_352,
            (92_160, 15, 1000, 4e-4, None, 0.0, 100),
            (10_240, 10, 9e-5),
            (92_160, 15, 7e-4, 7e-5, 0.0, 20),
            (15 * 256, "float32"),
        ),
    ],
)
def test_the_numbers_are_the_published_ones(at_root, name, parameters, pretrain, teacher, distill, attack):
    (config,) = expand(SweepConfig("x", base=f"configs/{name}.yaml", output="nowhere", grid={"seed": [0]}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture({"vocab_size": 256_000, **config.model.config}))
    assert sum(p.numel() for p in model.parameters()) == parameters
    length = config.data.length
    train = config.pretrain.train
    got = (train.batch_size * length, train.micro_batch_size, train.steps, train.lr, train.min_lr, train.weight_decay)
    assert (*got, train.eval_every) == pretrain and train.warmup == 50
    train = config.unlearn.train
    assert (train.batch_size * length, train.steps, train.lr) == teacher and train.schedule == "constant"
    assert config.unlearn.title == "maxent" and config.unlearn.retain_weight == 1
    train = config.distill.train
    got = (train.batch_size * length, train.micro_batch_size, train.lr, train.min_lr, train.weight_decay, train.eval_every)
    assert got == distill and train.warmup == 50 and train.schedule == "cosine" and config.distill.recover == 0.05
    assert config.noise.beta == 0.1
    assert config.noise.alphas == {"language": [0.2, 0.4, 0.6, 0.8], "arithmetic": [0.55, 0.65, 0.7, 0.75]}[name]
    relearn = config.relearn
    assert relearn.rates == RATES and relearn.evaluate_at[-1] == relearn.headline_step == 500 and not relearn.extend
    assert (relearn.batch_size * length, relearn.precision) == attack and relearn.mix == {"forget": 1.0}


def test_the_language_data_are_the_published_ones(at_root):
    (config,) = expand(SweepConfig("x", base="configs/language.yaml", output="nowhere", grid={"seed": [0]}))
    data, train = config.data, 1 - 2 * config.data.valid_fraction
    assert (data.retain, data.forget) == (
        ["hf://HuggingFaceFW/fineweb-edu:sample-10BT"],
        ["hf://HuggingFaceFW/fineweb-2:kor_Hang"],
    )
    assert data.tokens * train == pytest.approx(1e9, rel=1e-4)
    assert data.tokens * data.valid_fraction == pytest.approx(5e5, rel=2e-3)
    steps = (config.pretrain.train.steps, config.distill.train.steps)
    assert steps == (2e9 // 819_200, 2e9 // 491_520), "an epoch of both"


LANGUAGE = {  # steps, sequences, sequences of a pass, rate, retain weight; seeds are below
    "graddiff": (100, 4, None, 6e-5, 1),
    "maxent": (100, 4, None, 3e-5, 1),
    "rmu": (500, 4, None, 3e-5, 0),
    "maxent-sam": (100, 4, 1, 8e-5, 1),
    "maxent-repnoise": (100, 4, 1, 8e-5, 2),
    "rmu-sam": (500, 4, 1, 3e-5, 0),
    "rmu-repnoise": (500, 4, 1, 3e-5, 0),
    "npo": (100, 4, None, 3e-5, 1),
    "simnpo": (100, 4, None, 3e-5, 1),
    "undial": (100, 4, None, 3e-5, 0),
}
ARITHMETIC = {
    "graddiff": (10, 40, 20, 8e-6, 15),
    "maxent": (10, 40, None, 9e-5, 1),
    "rmu": (500, 40, None, 8e-6, 0),
    "maxent-sam": (10, 40, 5, 8e-5, 1),
    "maxent-repnoise": (10, 40, 5, 8e-5, 2),
    "rmu-sam": (500, 40, 5, 8e-6, 0),
    "rmu-repnoise": (500, 40, 5, 8e-6, 0),
    "npo": (10, 40, None, 9e-5, 1),
    "simnpo": (10, 40, None, 9e-5, 1),
    "undial": (10, 40, None, 9e-5, 0),
}
SHARES = {"rmu": 0.5, "maxent": 0.2, "maxent-sam": 0.5, "maxent-repnoise": 0.5, "npo": 0.5, "simnpo": 0.5, "undial": 0.0}
MICRO = {"rmu": None, "maxent-repnoise": 1}  # the others 4
OTHERS = {"npo": 5e-6, "simnpo": 9.5e-6, "undial": 1e-4}  # from their own code; the others 2e-5
WMDP = {k: (90, 40, MICRO.get(k, 4), OTHERS.get(k, 2e-5), share / (1 - share)) for k, share in SHARES.items()}
SEEDS = {"language": [111, 222, 333, 444, 555], "arithmetic": [111, 222, 333, 444, 555], "wmdp": [42, 43, 44, 45]}


@pytest.mark.parametrize(("name", "table"), [("language", LANGUAGE), ("arithmetic", ARITHMETIC), ("wmdp", WMDP)])
def test_the_methods_are_the_published_ones(at_root, name, table):
    assert shipped(name)["grid"] == {"seed": SEEDS[name]}
    layers = {"language": (5, 11, 6.5), "arithmetic": (5, 11, 6.0), "wmdp": (10, 15, 80.0)}[name]
    got = {}
    for run, config in runs_of(name).items():
        settings, train = config.unlearn, config.unlearn.train
        got[run] = (train.steps, train.batch_size, train.micro_batch_size, train.lr, settings.retain_weight)
        assert settings.title == run.replace("-", "+")
        assert (train.schedule, train.weight_decay, train.warmup, train.clip) == ("constant", 0, 0, 1)
        assert settings.retain_loss == ("kl" if (name, settings.method) == ("wmdp", "maxent") else "cross-entropy")
        assert train.precision == ("bfloat16" if name == "wmdp" and settings.robust != "sam" else "float32")
        if settings.method == "rmu":
            assert (settings.rmu.first_layer, settings.rmu.target_layer, settings.rmu.coefficient) == layers
            assert settings.rmu.normalize == "all" and settings.rmu.direction == "gaussian"
        assert settings.sam.rho == 0.01 and (settings.repnoise.alpha, settings.repnoise.beta) == (1, 1)
        assert settings.robust != "repnoise" or settings.repnoise.layers is None
        assert settings.npo.beta == (0.0225 if (name, run) == ("wmdp", "npo") else 0.1)
        assert (settings.simnpo.beta, settings.simnpo.gamma, settings.undial.gamma) == (0.1, 0, 10)
    assert got.keys() == table.keys()
    for run, wanted in table.items():
        assert got[run] == wanted, run


@pytest.mark.parametrize(
    ("name", "run"), [(name, run) for name, table in (("language", LANGUAGE), ("wmdp", WMDP)) for run in table]
)
def test_every_method_runs_with_them(at_root, tokenizer, sequences, name, run):
    """Takes two steps with a narrow model of as many layers; arithmetic uses the same code paths as language."""
    settings = runs_of(name)[run].unlearn
    size = {"batch_size": 4, "micro_batch_size": settings.train.micro_batch_size and min(settings.train.micro_batch_size, 2)}
    config = dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=2, lr=1e-2, **size))
    model = build_model({"model_type": "gemma2", **SHAPE, "hidden_size": 8, "num_hidden_layers": 16}, tokenizer, 0)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    result = unlearn(model, forget=sequences, retain=sequences, config=config, progress=False)
    changed = {key for key, p in model.named_parameters() if not torch.equal(p.float(), before[key].to(p.dtype).float())}
    first, last = config.rmu.first_layer, config.rmu.target_layer
    named = {f"model.layers.{k}.mlp.down_proj.weight" for k in range(first, last)}
    assert changed == named if config.method == "rmu" else len(changed) > 16 * 5
    assert result.steps == 2 and all(p.isfinite().all() for p in model.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes a tokenizer, a checkpoint in bfloat16 and two files of generated text."""
    folder, draw = tmp_path_factory.mktemp("published"), random.Random(0)
    for name, words in WORDS.items():
        lines = [{"text": " ".join(draw.choices(words.split(), k=draw.randint(8, 30)))} for _ in range(300)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = train_bpe([str(folder / f"{name}.jsonl") for name in WORDS], 320)
    tokenizer.save_pretrained(folder / "tokenizer")
    lettered = bytewise_tokenizer()
    lettered.save_pretrained(folder / "model")
    torch.manual_seed(0)
    ids = {"vocab_size": len(lettered), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    Gemma2ForCausalLM(Gemma2Config(**SHAPE, **ids)).bfloat16().save_pretrained(folder / "model")
    return folder


def reduced(folder, output):
    """Returns overrides of text, tokens, lengths, steps and rates; all other settings of the file stay."""
    settings = {"data.retain": [f"{folder}/english.jsonl"], "data.forget": [f"{folder}/korean.jsonl"], "data.length": 32}
    settings |= {"data.tokens": 4000, "data.valid_fraction": 0.1, "output": str(output), "relearn.rates": [1e-3]}
    settings |= {"relearn.evaluate_at": [0, 2], "relearn.headline_step": 2, "relearn.batch_size": 4}
    for stage, batch in (("pretrain", 10), ("distill", 8)):
        settings |= {f"{stage}.train.steps": 4, f"{stage}.train.batch_size": batch, f"{stage}.train.eval_every": 2}
    return settings


def test_the_language_run_runs(folder, tmp_path):
    shape = json.dumps({"model_type": "gemma2", **SHAPE})
    settings = reduced(folder, tmp_path / "out") | {"unlearn.train.steps": 2, "noise.alphas": [0.6], "distill.recover": None}
    arguments = [f"--{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in settings.items()]
    arguments += [f"--model.config={shape}", f"--data.tokenizer={folder / 'tokenizer'}"]
    assert main(["run", str(ROOT / "configs/language.yaml"), *arguments]) == 0
    found = read_json(tmp_path / "out" / "results-seed42.json")
    assert [model["name"] for model in found["models"]] == ["original", "unlearn", "undo-0.6", "random", "filter"]
    (data,) = (tmp_path / "out" / "stages").glob("prepare-*/data")
    sequences = {path.stem: Sequences.load(path) for path in data.iterdir()}
    assert all(part.length == 32 and part.starts is None for part in sequences.values())
    assert int(sequences["train_retain"].input_ids.max()) < read_json(data.parent / "config.json")["vocab_size"] == 320
    positions = {stage: [] for stage in ("pretrain", "unlearn", "distill")}
    for stage, counted in positions.items():
        counted += [read_json(path)["positions_by_source"] for path in data.parents[1].glob(f"{stage}-*/manifest.json")]
    assert {part["text"] for part in positions["pretrain"]} == {4 * 10 * 32, 4 * 8 * 32}, "data filtering in students' batches"
    assert positions["unlearn"] == [{"forget": 2 * 4 * 32, "retain": 2 * 4 * 32}]
    assert positions["distill"] == 2 * [{"text": 4 * 8 * 32}]


def test_wmdps_maxent_runs_in_a_sweep(folder, tmp_path, at_root):
    """The sweep starts from a checkpoint in bfloat16 and uses the divergence on the retain text; its seeds share the text."""
    settings = shipped("wmdp")
    own = {key: value for key, value in reduced(folder, "").items() if not key.startswith("pretrain") and key != "output"}
    small = {
        "model.path": str(folder / "model"),
        "data.distill.sources": {own["data.retain"][0]: 1.0},
        "data.distill.tokens": 6000,
    }
    write(tmp_path / "asked.jsonl", questions(30, seed=1))
    small |= {f"data.questions.{name}.files": [str(tmp_path / "asked.jsonl")] for name in ("forget", "retain")}
    small |= {f"data.questions.retain.{name}": value for name, value in {"examples": [], "shots": 0, "limit": 1.0}.items()}
    small |= {
        "data.questions.valid_fraction": 0.3,
        "data.distill.length": 32,
        "distill.train.warmup": 1,
        "distill.train.micro_batch_size": 4,
    }
    settings["overrides"] |= own | small | {"unlearn.train.steps": 2, "unlearn.train.batch_size": 8}
    settings["runs"] = [run for run in settings["runs"] if run["name"] == "maxent"]
    settings["grid"] = {"seed": [42, 43]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(settings))
    assert main(["sweep", str(tmp_path / "sweep.yaml"), f"--output={tmp_path / 'out'}"]) == 0
    stages = tmp_path / "out" / "stages"
    assert len(list(stages.glob("prepare-*"))) == 1
    teachers = [read_json(path) for path in stages.glob("unlearn-*/manifest.json")]
    assert len(teachers) == 2 and {teacher["settings"]["retain_loss"] for teacher in teachers} == {"kl"}
    assert (tmp_path / "out" / "report" / "comparison.html").exists()
