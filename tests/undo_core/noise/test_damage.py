"""Damage by other operators, against their definitions, and matched to the damage of the published noise."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from rounding import assert_rounded, gamma
from transformers import AutoConfig, AutoModelForCausalLM

from undo_core import noise_, ops
from undo_core.cli import main
from undo_core.io.files import read_json
from undo_core.noise.damage import BLOCK, ELEMENT_BYTES, OPERATORS, DamageConfig, damage_, damage_checkpoint

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "gemma2": {"num_key_value_heads": 1, "head_dim": 8},  # tied
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 1},  # experts are stacked on load
}


def model_of(kind, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **MODELS[kind]), dtype=dtype)


def folders(tmp_path, model):
    source, output = tmp_path / "source", tmp_path / "output"
    model.save_pretrained(source, max_shard_size="20KB")
    output.mkdir()
    return source, output


def values(model):
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


def distance(before, after):
    """Returns the distance over all matrices, computed by hand."""
    matrices = [name for name in before if before[name].ndim > 1]
    change = sum(float(np.square(after[name] - before[name]).sum()) for name in matrices)
    return math.sqrt(change / sum(float(np.square(before[name]).sum()) for name in matrices))


def damaged(operator, **options):
    model = model_of("gemma2")
    draw = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.ndim > 1:  # no two entries alike
            p.data = (torch.randperm(p.numel(), generator=draw).view(p.shape) + 0.25) / p.numel() - 0.5
    before = values(model)
    report = damage_(model, operator, **{"strength": 0.3, "seed": 4, **options})
    after = values(model)
    for name in before:
        if before[name].ndim == 1:
            assert np.array_equal(before[name], after[name]), "vectors stay"
        else:
            assert report[name].before == pytest.approx(np.linalg.norm(before[name]), rel=gamma(16))  # of float32 squares
            assert report[name].change == pytest.approx(np.linalg.norm(after[name] - before[name]), rel=gamma(16))
    return before, after


def test_prune():
    before, after = damaged("prune")
    for name in (name for name in before if before[name].ndim > 1):
        sizes = np.sort(np.abs(before[name]).ravel())
        count = round(0.3 * sizes.size)
        gone = after[name] == 0
        assert gone.sum() == count and np.abs(before[name][gone]).max() <= sizes[count - 1]
        assert np.array_equal(after[name][~gone], before[name][~gone])


def test_pruning_equal_entries_takes_the_first():
    model = torch.nn.Linear(4, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, -1.0, 1.0, 2.0], [1.0, 1.0, 3.0, -1.0]])
    damage_(model, "prune", strength=0.5, seed=0)
    assert model.weight.tolist() == [[0.0, 0.0, 0.0, 2.0], [0.0, 1.0, 3.0, -1.0]]


@pytest.mark.parametrize(("operator", "axis"), [("permute", None), ("permute-rows", 0), ("permute-columns", 1)])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_permutations_are_one_cycle(operator, axis, strength):
    before, after = damaged(operator, strength=strength)
    for name in (name for name in before if before[name].ndim > 1):
        units = [np.moveaxis(x, axis, 0) if axis is not None else x.reshape(-1, 1) for x in (before[name], after[name])]
        count = round(strength * len(units[0]))
        where = {unit.tobytes(): i for i, unit in enumerate(units[0])}
        assert len(where) == len(units[0]), "the test needs different units"
        came_from = [where[unit.tobytes()] for unit in units[1]]
        assert sorted(came_from) == list(range(len(came_from)))
        moved = [i for i, origin in enumerate(came_from) if origin != i]
        assert len(moved) == count
        at, steps = came_from[moved[0]], 1
        while at != moved[0]:
            at, steps = came_from[at], steps + 1
        assert steps == count
        assert moved != list(range(count)) or count == len(came_from), "which ones move is drawn"


def test_gaussian():
    before, after = damaged("gaussian", strength=0.5)
    for name in (name for name in before if before[name].ndim > 1):
        drawn = ops.replay(name, before[name].shape, seed=4, law="normal", std=1.0).numpy()
        wanted = before[name] + 0.5 * np.sqrt(np.mean(before[name] ** 2)) * drawn
        assert_rounded(*map(torch.from_numpy, (after[name], wanted, np.abs(before[name]) + np.abs(wanted - before[name]))))
    count = sum(values.size for values in before.values() if values.ndim > 1)
    # The size of as many normal draws, within six standard deviations; the draws have the same bits everywhere.
    assert distance(before, after) == pytest.approx(0.5, rel=6 / math.sqrt(2 * count))


def test_what_is_drawn_depends_on_seed_and_name():
    first, same, other = (damaged("permute", seed=seed)[1] for seed in (4, 4, 5))
    for name in first:
        assert np.array_equal(first[name], same[name])
        assert first[name].ndim == 1 or not np.array_equal(first[name], other[name])
    q = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    before = damaged("permute")[0]
    places = [np.flatnonzero(first[name] != before[name]) for name in q]
    assert not np.array_equal(*places)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("kind", "dtype"), [("gemma2", torch.float32), ("mixtral", torch.bfloat16)])
def test_disk_has_the_bits_of_memory(tmp_path, operator, kind, dtype):
    source, output = folders(tmp_path, model_of(kind, dtype))
    facts = damage_checkpoint(source, output, operator, strength=0.3, seed=4, progress=False)
    here = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    before = values(here)
    assert damage_(here, operator, strength=0.3, seed=4) == facts["tensors"]
    there = AutoModelForCausalLM.from_pretrained(output, dtype=dtype)
    for (name, p), (_, q) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert facts["distance"] == pytest.approx(distance(before, values(there)), rel=gamma(16)) and facts["wanted"] is None


@pytest.mark.parametrize("alpha", [0.25, 0.6])
@pytest.mark.parametrize("operator", OPERATORS)
def test_as_much_as_the_noise(tmp_path, operator, alpha):
    source, output = folders(tmp_path, model_of("gemma2"))
    like = {"alpha": alpha, "beta": 0.1, "seed": 9}
    facts = damage_checkpoint(source, output, operator, seed=4, like=like, progress=False)
    noised, there = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, output))
    before = values(noised)
    noise_(noised, **like)
    wanted, got = distance(before, values(noised)), distance(before, values(there))
    assert facts["wanted"] == pytest.approx(wanted, rel=gamma(16)) and facts["distance"] == pytest.approx(got, rel=gamma(16))

    def at(strength):
        model = model_of("gemma2")
        return damage_(model, operator, strength=min(strength, 1.0), seed=4), distance(before, values(model))

    assert at(facts["strength"])[0] == facts["tensors"]
    if operator == "gaussian":  # in closed form, except for the rounding of each weight
        assert got == pytest.approx(wanted, rel=gamma(6) * (1 + 1 / wanted))
    else:  # 1.5 units of the smallest matrix, which has 8, below is too little and above is too much
        step = 1.5 / 8 if operator in ("permute-rows", "permute-columns") else facts["strength"] / 64
        assert at(max(facts["strength"] - step, 0.0))[1] < wanted < at(facts["strength"] + step)[1]


def test_the_strength_of_rows_is_the_best_there_is(tmp_path):
    source, output = folders(tmp_path, model_of("gemma2"))
    like = {"alpha": 0.4, "beta": 0.1, "seed": 9}
    facts = damage_checkpoint(source, output, "permute-rows", seed=4, like=like, progress=False)
    before, reached = values(model_of("gemma2")), []
    for share in np.linspace(0, 0.4, 80):
        model = model_of("gemma2")
        damage_(model, "permute-rows", strength=float(share), seed=4)
        reached.append(distance(before, values(model)))
    misses = sorted({abs(x**2 - facts["wanted"] ** 2) for x in reached})
    assert abs(facts["distance"] ** 2 - facts["wanted"] ** 2) <= misses[0] * (1 + gamma(16)) and misses[0] < 0.9 * misses[1]


def test_chosen_layers_alone(tmp_path):
    before, after = values(model_of("gemma2")), None
    source, output = folders(tmp_path, model_of("gemma2"))
    like = {"alpha": 0.2, "seed": 9}
    facts = damage_checkpoint(source, output, "gaussian", seed=4, like=like, layers="1", progress=False)
    after = values(AutoModelForCausalLM.from_pretrained(output))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers.1." in name and before[name].ndim > 1}
    close = gamma(6) * (1 + 1 / facts["wanted"])
    assert facts["distance"] == pytest.approx(facts["wanted"], rel=close), "over all matrices, so more in the chosen ones"
    assert distance(before, after) == pytest.approx(facts["distance"], rel=gamma(16))


def test_what_cannot_be_is_refused(tmp_path):
    source, output = folders(tmp_path, model_of("gemma2"))
    much = {"alpha": 1.0, "beta": 50.0, "seed": 9}
    for operator, options, name in [
        ("prune", {"like": much}, "like"),
        ("prune", {"strength": 1.5}, "strength"),
        ("gaussian", {"strength": -1.0}, "strength"),
        ("prune", {}, "strength"),
        ("prune", {"strength": 0.1, "like": much}, "strength"),
        ("melt", {"strength": 0.1}, "operator"),
        ("prune", {"strength": 0.1, "layers": "7"}, "layers"),
        ("prune", {"strength": 0.1, "layers": "3-1"}, "match"),
        ("prune", {"strength": 0.1, "seed": -1}, "seed"),
    ]:
        with pytest.raises(ValueError, match=rf"^{name}: got .*wanted"):
            damage_checkpoint(source, output, operator, **{"seed": 4, **options}, progress=False)
    assert not list(output.iterdir())
    for settings in ({"operators": ["melt"]}, {"operators": ["prune", "prune"]}, {"alphas": [0.0]}, {"layers": "a"}):
        with pytest.raises(ValueError, match=r"got .*wanted"):
            DamageConfig(**settings)


def test_memory_is_bounded_by_the_largest_matrix(tmp_path):
    """The process may grow by ELEMENT_BYTES for each entry of an embedding of four million."""
    shape = {**SMALL, "vocab_size": 65536, "hidden_size": 64, "num_hidden_layers": 1}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **shape, **MODELS["gemma2"])).save_pretrained(
        tmp_path / "s"
    )
    program = f"""
import shutil
from pathlib import Path
from undo_core.noise.damage import damage_checkpoint
from undo_core.io.memory_use import peak_bytes, reset_peak
source, output = Path({str(tmp_path / "s")!r}), Path({str(tmp_path / "o")!r})
grown = []
for operator in ("gaussian", "permute"):  # the first loads every library
    output.mkdir()
    reset_peak(); before = peak_bytes()
    damage_checkpoint(source, output, operator, seed=1, like=dict(alpha=.5, seed=1), progress=False)
    grown.append(peak_bytes() - before)
    shutil.rmtree(output)
print(grown)
"""
    # Memory is returned at once, because what the allocator keeps varies as much as the measured amount.
    exact = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | exact)
    grown = json.loads(done.stdout.splitlines()[-1])
    assert grown[1] < ELEMENT_BYTES * 65536 * 64 + 64 * BLOCK, grown


def test_the_command(tmp_path, capsys):
    source, _ = folders(tmp_path, model_of("gemma2"))
    assert main(["damage", str(source), str(tmp_path / "d"), "prune", "--alpha=0.5", "--seed=3"]) == 0
    facts = read_json(tmp_path / "d" / "manifest.json")
    assert f"distance {facts['distance']:.4f}, the noise's {facts['wanted']:.4f}" in " ".join(capsys.readouterr().out.split())
    assert facts["distance"] == pytest.approx(facts["wanted"], rel=1e-3)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "d").config.model_type == "gemma2"
    assert main(["damage", str(source), str(tmp_path / "e"), "prune"]) == 2
    assert "strength: got None with alpha None, wanted exactly one of the two" in capsys.readouterr().err

    assert main(["noise", str(source), str(tmp_path / "n"), "--alpha=0.5", "--layers=0"]) == 0
    before, after = (values(AutoModelForCausalLM.from_pretrained(folder)) for folder in (source, tmp_path / "n"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers.0." in name and before[name].any()}


@pytest.mark.parametrize("operator", OPERATORS)
def test_matrices_that_are_not_contiguous_get_the_bits_of_contiguous_ones(operator):
    layer = torch.nn.Linear(6, 5, bias=False)
    strided = torch.nn.Linear(6, 5, bias=False)
    strided.weight = torch.nn.Parameter(layer.weight.detach().clone().T.contiguous().T)
    assert not strided.weight.is_contiguous()
    reports = [damage_(each, operator, strength=0.4, seed=2) for each in (layer, strided)]
    assert torch.equal(layer.weight, strided.weight) and reports[0] == reports[1]
    assert reports[0]["weight"].change > 0
    strided.weight = torch.nn.Parameter(torch.ones(5, 1).expand(5, 6))
    with pytest.raises(ValueError, match=r"^tensors: got 'weight', whose elements share memory, wanted"):
        damage_(strided, operator, strength=0.4, seed=2)
