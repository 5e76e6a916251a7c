"""Noise with a strength of its own for the vocabulary matrices, and the alpha of equal distance, against float64 by hand."""

import math
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from undo_kernels.ops.noise_rules import NoiseRule

from undo_core import noise_
from undo_core.noise.checkpoint import noise_checkpoint, replay_checkpoint
from undo_core.noise.damage import damage_checkpoint
from undo_core.noise.parameters import select

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
KEPT = [NoiseRule("head", alpha=0.0), NoiseRule("embeddings", alpha=0.0)]
REDRAWN = [NoiseRule("head", alpha=1.0, beta=1.0, law="normal", std=0.02), NoiseRule("embeddings", alpha=0.25)]


def model_of(tied):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = AutoConfig.for_model("llama", **SMALL, tie_word_embeddings=tied)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def values(model):
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


@pytest.fixture
def folders(tmp_path):
    model, source, output = model_of(tied=False), tmp_path / "source", tmp_path / "output"
    model.save_pretrained(source)
    output.mkdir()
    return values(model), source, output


def loaded(folder):
    return values(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def matrices(found):
    return {name: value for name, value in found.items() if value.ndim > 1}


def test_the_head_has_a_match_of_its_own():
    for tied, head in ((False, "lm_head.weight"), (True, "model.embed_tokens.weight")):
        model = model_of(tied)
        assert [name for name, p in select(model).parameters.items() if p.head] == [head]
        before = values(model)
        noise_(model, alpha=0.5, seed=1, rules=[NoiseRule("not head", alpha=0.0)])
        changed = {name for name, value in values(model).items() if not np.array_equal(value, before[name])}
        assert changed == {head}
    linear = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 4, bias=False), "rest": torch.nn.Linear(4, 4, bias=False)})
    before = values(linear)
    noise_(linear, alpha=0.5, seed=1, toward=0.0, rules=[NoiseRule("head.weight", alpha=0.0)])
    assert np.array_equal(values(linear)["head.weight"], before["head.weight"]), "outside of a model head is a name"


@pytest.mark.parametrize("rules", [KEPT, REDRAWN], ids=["kept", "redrawn"])
def test_the_alpha_of_equal_distance(folders, rules):
    before, source, output = folders
    like = {"alpha": 0.6, "beta": 0.1, "law": "xavier_uniform", "seed": 7}
    drawn = {name: noise.double().numpy() for name, noise in replay_checkpoint(source, "*", seed=7)}
    total = sum(np.square(value).sum() for value in matrices(before).values())
    usual = {name: 0.6 * (0.1 * drawn[name] - value) for name, value in matrices(before).items()}
    wanted = sum(np.square(change).sum() for change in usual.values())

    report = noise_checkpoint(source, output, alpha=0.6, seed=7, rules=rules, like=like, progress=False)
    after = loaded(output)
    moved = {name: np.square(after[name] - value).sum() for name, value in matrices(before).items()}
    assert report.distance == pytest.approx(math.sqrt(wanted / total), rel=1e-6)
    assert math.sqrt(sum(moved.values()) / total) == pytest.approx(report.distance, rel=1e-6)

    own = sum(moved[name] for name in ("lm_head.weight", "model.embed_tokens.weight"))
    rest = sum(np.square(change / 0.6).sum() for name, change in usual.items() if fnmatchcase(name, "*layers*"))
    assert report.alpha == pytest.approx(math.sqrt((wanted - own) / rest), rel=1e-6) and report.alpha != 0.6
    name = "model.layers.0.mlp.up_proj.weight"
    by_hand = (1 - report.alpha) * before[name] + report.alpha * 0.1 * drawn[name]
    assert np.abs(after[name] - by_hand).max() < 1e-7
    assert np.array_equal(after["lm_head.weight"], before["lm_head.weight"]) == (rules is KEPT)


def test_a_distance_out_of_reach_is_refused_before_anything_is_written(folders):
    _, source, output = folders
    given = {"alpha": 0.6, "seed": 7, "progress": False}
    far = [NoiseRule("embeddings", alpha=1.0, beta=50.0)]
    with pytest.raises(ValueError, match=r"like: got noise of distance 0\.\d+, wanted one from [1-9]\d*\.\d+"):
        noise_checkpoint(source, output, **given, rules=far, like={"alpha": 0.1, "seed": 7})
    with pytest.raises(ValueError, match=r"to 0\.\d+, with alpha 1 for the others"):
        noise_checkpoint(source, output, **given, rules=[NoiseRule("matrices", alpha=0.0)], like={"alpha": 1.0, "seed": 7})
    assert not list(output.iterdir())


def test_gaussian_noise_on_the_head_alone(folders):
    before, source, output = folders
    facts = damage_checkpoint(source, output, "gaussian", strength=0.3, seed=2, match="head", progress=False)
    after = loaded(output)
    assert set(facts["tensors"]) == {"lm_head.weight"}
    assert {name for name, value in after.items() if not np.array_equal(value, before[name])} == {"lm_head.weight"}
    change = after["lm_head.weight"] - before["lm_head.weight"]
    ratio = np.linalg.norm(change) / np.linalg.norm(before["lm_head.weight"])
    assert ratio == pytest.approx(0.3, abs=4 * 0.3 / math.sqrt(2 * change.size)), "640 draws"
    for match, layers, wanted in (("head", "0", "one of the two"), ("vectors", None, "one that matches matrices")):
        with pytest.raises(ValueError, match=f"match: .*{wanted}"):
            damage_checkpoint(source, output, "gaussian", strength=0.3, seed=2, match=match, layers=layers, progress=False)
