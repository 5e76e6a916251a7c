"""Attacks that train: each breaks unlearning, mixes, other optimizers, resuming; settings, keys and memory."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from attacked_models import BASE, SHAPE, accuracies, peft, stage_of, weights
from rounding import assert_as_exact_as, assert_same_function, gamma
from stage_kinds import NOWHERE
from torch import nn

from undo_core.attacks import AttackConfig, LoraConfig, Trial
from undo_core.attacks.relearning import attack, mixed_cross_entropy, relearn
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.stages import Probe
from undo_core.training import TrainConfig, bytes_per_parameter, sequence_source
from undo_core.training.batches import SequenceSource
from undo_core.training.optimizers import Updater


def test_the_model_to_attack_has_forgotten(world):
    before, after = (accuracies(world)(model) for model in world[3:])
    assert before["forget"] > 0.9 and before["retain"] > 0.9 and after["forget"] < 0.3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mix": {"forget": 0.5, "retain": 0.5}, "micro_batch_size": 7, "activation_checkpointing": True, "attention": "eager"},
        {"optimizer": "sgd", "rates": [0.03]},
        {"optimizer": "adafactor", "rates": [0.03], "weight_decay": 0.01},
        pytest.param({"kind": "lora", "rates": [1e-2], "lora": LoraConfig(rank=8)}, marks=peft),
        pytest.param({"kind": "lora", "rates": [1e-2], "lora": LoraConfig(16, 32.0, ["up_proj", "down_proj"])}, marks=peft),
    ],
    ids=["finetune", "mix", "sgd", "adafactor", "lora", "lora-mlp"],
)
def test_each_training_attack_breaks_unlearning_alone(world, changes):
    _, forget, retain, _, unlearned = world
    before = weights(unlearned).clone()
    config = dataclasses.replace(BASE, **changes)
    results = relearn(unlearned, forget, config, retain=retain, evaluate=accuracies(world), progress=False)
    (result,) = results.values()
    first, last = result.history
    assert first["forget"] < 0.3 and last["forget"] > first["forget"] + 0.4
    assert torch.equal(weights(unlearned), before), "copies are attacked"
    assert set(result.positions) == set(config.mix)


def test_benign_fine_tuning_reads_nothing_that_was_forgotten(world):
    _, _, retain, _, unlearned = world
    config = dataclasses.replace(BASE, mix={"retain": 1.0}, evaluate_at=[0, 2], headline_step=2)
    (result,) = relearn(unlearned, None, config, retain=retain, evaluate=accuracies(world), progress=False).values()
    assert result.positions == {"retain": 2 * 25 * 8}


@pytest.mark.parametrize(
    ("mix", "size", "sequences"),
    [
        ({"forget": 1.0}, 5, {"forget": 5}),
        ({"retain": 3.0}, 5, {"retain": 5}),
        ({"forget": 0.5, "retain": 0.5}, 64, {"forget": 32, "retain": 32}),
        ({"forget": 1, "retain": 3}, 20, {"forget": 5, "retain": 15}),
        ({"forget": 0.125, "retain": 0.875}, 15, {"forget": 2, "retain": 13}),
    ],
)
def test_a_mix_has_its_shares(world, mix, size, sequences):
    config = AttackConfig(mix=mix, batch_size=size, evaluate_at=[0, 3], headline_step=3)
    assert config.sequences() == sequences
    _, forget, retain, _, unlearned = world
    result = attack(copy.deepcopy(unlearned), forget, 1e-3, config, retain=retain, evaluate=lambda m: {}, progress=False)
    assert result.positions == {name: 3 * 8 * count for name, count in sequences.items()}


def test_a_mixed_loss_is_the_mean_over_all_labels(world):
    _, forget, retain, model, _ = world
    batches = {"forget": sequence_source(forget, 3, 0)(0), "retain": sequence_source(retain, 9, 0)(0)}
    got = mixed_cross_entropy(model, batches, {name: batch.counted for name, batch in batches.items()})
    ids = torch.cat([batch.input_ids for batch in batches.values()])
    plain, wanted = (
        F.cross_entropy(m(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
        for m in (model, copy.deepcopy(model).double())
    )
    assert_same_function(got, plain, wanted)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("how", ["sgd", "adafactor", pytest.param("lora", marks=peft)])
def test_killed_at_any_step_it_ends_with_the_same_bits(world, tmp_path, how, inside):
    _, forget, retain, _, unlearned = world
    changes = {"kind": "lora"} if how == "lora" else {"optimizer": how}
    mix = {"forget": 0.5, "retain": 0.5}
    config = dataclasses.replace(
        BASE, **changes, mix=mix, evaluate_at=[0, 4, 8], headline_step=8, seed=5, step_in_backward=inside
    )
    plain = sequence_source(forget, 12, 5)

    def run(folder, source):
        folder.mkdir(exist_ok=True)
        model = copy.deepcopy(unlearned)
        options = {"folder": folder, "checkpoint_seconds": 0.0, "progress": False}
        return model, attack(model, source, 1e-2, config, retain=retain, evaluate=accuracies(world), **options)

    model, whole = run(tmp_path / "whole", plain)
    for kill in (1, 5):

        class Dying(SequenceSource):
            def __call__(self, step, kill=kill):
                if step == kill:
                    raise KeyboardInterrupt
                return super().__call__(step)

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / f"killed-{kill}", Dying(forget, 12, 5))
        resumed, result = run(tmp_path / f"killed-{kill}", plain)
        assert torch.equal(weights(resumed), weights(model)) and result.history == whole.history


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16-master"])
def test_other_optimizers_are_torch_s_and_take_the_bytes_that_are_promised(world, name, precision):
    config = TrainConfig(lr=0.05, weight_decay=0.1, clip=0.0, optimizer=name, precision=precision)
    start = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    model = nn.Linear(64, 64, bias=False)
    model.weight.data = start.clone()
    updater = Updater(model, list(model.parameters()), config)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    expected, exact = nn.Parameter(start.to(dtype, copy=True)), nn.Parameter(start.to(dtype).double())
    of = {"sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, foreach=True)}
    of["adafactor"] = lambda p: torch.optim.Adafactor(p, 0.05, weight_decay=0.1, foreach=True)
    oracles = [of[name]([parameter]) for parameter in (expected, exact)]
    for step in range(3):
        gradient = torch.sin(torch.arange(64 * 64) * (step + 1.0)).view(64, 64).to(model.weight.dtype)
        updater.begin(step, 0.05)
        with updater.attached():
            (model.weight * gradient).sum().backward()
        updater.step()
        for parameter, oracle in zip((expected, exact), oracles, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            oracle.step()
    # Both round each of three steps into momentum and weight.
    assert_as_exact_as(updater.targets[0], expected, exact, gamma(2 * 3, dtype))
    promised = bytes_per_parameter(config)
    assert promised["weights"] == model.weight.element_size()
    kept = sum(tensor.nbytes for key, tensor in updater.tensors().items())
    assert promised["optimizer"] == pytest.approx(
        kept / model.weight.numel(), abs=0.3
    )  # without the sums over rows and columns


def test_plain_bfloat16_at_a_low_rate_moves_few_weights(world):
    _, forget, _, _, unlearned = world
    model = copy.deepcopy(unlearned).bfloat16()
    moved = {}
    for precision, rate in itertools.product(("bfloat16", "bfloat16-stochastic"), (1e-6, 1e-3)):
        attacked = copy.deepcopy(model)
        config = dataclasses.replace(BASE, precision=precision, evaluate_at=[0, 5], headline_step=5)
        attack(attacked, forget, rate, config, evaluate=lambda m: {}, progress=False)
        moved[precision, rate] = float((weights(attacked) != weights(model)).float().mean())
    assert moved["bfloat16", 1e-6] < 0.1 < 0.5 < moved["bfloat16", 1e-3]
    assert moved["bfloat16-stochastic", 1e-6] > 0


def test_settings_at_their_default_are_in_no_stage_s_key():
    first = {"evaluate_at", "headline_step", "batch_size", "clip", "precision", "optimizer", "step_in_backward", "seed", "rate"}
    trial = Trial(rate=1e-3)
    settings = stage_of(AttackConfig(seed=1), trial).settings
    assert set(settings) == first
    changes = {"mix": {"retain": 1.0}, "micro_batch_size": 4, "weight_decay": 0.1, "beta1": 0.5, "attention": "eager"}
    changes["activation_checkpointing"] = True
    for name, value in changes.items():
        assert stage_of(AttackConfig(seed=1, **{name: value}), trial).settings == {**settings, name: value}
    adapters = stage_of(AttackConfig(seed=1, kind="lora", lora=LoraConfig(rank=4)), trial).settings
    assert set(adapters) == first | {"kind", "lora"} and adapters["lora"] == {"rank": 4, "alpha": 16.0, "targets": []}
    other = LoraConfig(rank_stabilised=True, initialisation="pissa")
    assert stage_of(AttackConfig(seed=1, kind="lora", lora=other), trial).settings["lora"] == dataclasses.asdict(other)
    prompted = stage_of(AttackConfig(kind="fewshot", seed=3), Trial(shots=2))
    assert isinstance(prompted, Probe) and prompted.settings == {"kind": "fewshot", "shots": 2, "seed": 3}
    quantise = AttackConfig(kind="quantise")
    assert [stage_of(quantise, trial).settings for trial in quantise.trials()] == [
        {"kind": "quantise", "bits": 8},
        {"kind": "quantise", "bits": 4, "group_size": 32},
    ]


@peft
def test_predicted_memory_knows_the_attack():
    from transformers import AutoConfig

    config = AutoConfig.for_model(**{**SHAPE, "vocab_size": 97, "hidden_size": 64, "intermediate_size": 256})
    predict = Predictor(config, 64, device="cpu")

    def attacked(**changes):
        return predict(stage_of(AttackConfig(seed=0, batch_size=2048, **changes), Trial(rate=1e-3)), torch.float32)

    full, sgd, none, lora = (
        attacked(**changes) for changes in ({}, {"optimizer": "sgd"}, {"optimizer": "adafactor"}, {"kind": "lora"})
    )
    assert full.optimizer == 2 * sgd.optimizer > 1.9 * full.weights and none.optimizer == 0
    assert 0 < lora.optimizer < 0.3 * full.optimizer and lora.gradients < 0.3 * max(full.gradients, full.weights)
    small = attacked(micro_batch_size=2, activation_checkpointing=True)
    mixed = attacked(mix={"forget": 0.5, "retain": 0.5})
    assert small.activations < 0.5 * full.activations and mixed.activations == pytest.approx(full.activations, rel=0.1)
    quantised, prompted = (
        predict(Probe(attack=attack, prepared=NOWHERE, model=NOWHERE, **how), torch.float32)
        for attack, how in (("quantise", {"bits": 4}), ("fewshot", {"shots": 3}))
    )
    assert quantised.total < full.total and prompted.activations > 0


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"kind": "prune"}, "kind: got 'prune', wanted one of finetune, lora"),
        ({"mix": {}}, "mix: got {}"),
        ({"mix": {"wikitext": 1.0}}, "mix: got {'wikitext'"),
        ({"mix": {"forget": -1.0}}, "mix: got {'forget': -1.0}"),
        ({"mix": {"forget": math.nan}}, "mix: got {'forget': nan}"),
        ({"mix": {"forget": 0.001, "retain": 1.0}}, "mix: got .* wanted shares of at least one of the batch_size 64 sequences"),
        ({"shots": []}, r"shots: got \[\], wanted different integers >= 1"),
        ({"shots": [0]}, r"shots: got \[0\]"),
        ({"bits": [4, 16]}, r"bits: got \[4, 16\], wanted different integers from 2 to 8"),
        ({"seeds": 0}, "seeds: got 0"),
        ({"group_size": 0}, "group_size: got 0"),
        ({"micro_batch_size": 0}, "micro_batch_size: got 0"),
        ({"attention": "magic"}, "attention: got 'magic'"),
        ({"beta1": 1.0}, "beta1: got 1.0"),
        ({"optimizer": "sgd", "precision": "bfloat16-stochastic"}, "optimizer: got sgd with precision bfloat16-stochastic"),
        ({"step_in_backward": True, "micro_batch_size": 2}, "step_in_backward: got true"),
    ],
)
def test_bad_settings_name_the_key(changes, wanted):
    with pytest.raises(ValueError, match=f"^{wanted}"):
        AttackConfig(**changes)


def test_text_that_is_missing_and_attacks_that_train_nothing_are_refused(world):
    evaluate_now = accuracies(world)
    with pytest.raises(ValueError, match=r"^retain: got None, wanted text for its share of the mix, 0\.5"):
        relearn(world[4], world[1], AttackConfig(mix={"forget": 0.5, "retain": 0.5}), evaluate=evaluate_now)
    with pytest.raises(ValueError, match=r"^kind: got fewshot, which trains nothing"):
        relearn(world[4], world[1], AttackConfig(kind="fewshot"), evaluate=evaluate_now)


def test_metrics_without_forget_are_refused_before_any_step(world):
    steps = []

    def forget(step):
        steps.append(step)
        return {"input_ids": world[1].input_ids[:4].long()}

    with pytest.raises(ValueError, match=r"^evaluate: got metrics acc, wanted an entry forget"):
        relearn(world[4], forget, AttackConfig(rates=[1e-3]), evaluate=lambda model: {"acc": 1.0}, progress=False)
    assert not steps
