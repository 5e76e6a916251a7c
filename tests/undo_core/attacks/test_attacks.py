"""Attacks other than full fine-tuning: adapters, mixes, other optimizers, prompting, quantisation."""

import copy
import dataclasses
import importlib.util
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rounding import PATH, assert_as_exact_as, assert_same_function, gamma
from stage_kinds import NOWHERE
from torch import nn

from undo_core.attacks import AttackConfig, LoraConfig, Trial, few_shot, quantise_, worst_of
from undo_core.attacks.grid import explore, extension_of, next_rate
from undo_core.attacks.lora import adapted
from undo_core.attacks.relearning import attack, mixed_cross_entropy, relearn
from undo_core.data.sequences import Sequences
from undo_core.data.tokenizers import character_tokenizer
from undo_core.evaluation.metrics import evaluate
from undo_core.models import build_model
from undo_core.pipeline.attacked_model import trial_stage
from undo_core.pipeline.config import DataConfig, ModelConfig, RunConfig
from undo_core.pipeline.graph import graph_of
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.stages import Probe
from undo_core.training import TrainConfig, bytes_per_parameter, sequence_source, train
from undo_core.training.batches import SequenceSource
from undo_core.training.losses import cross_entropy
from undo_core.training.optimizers import Updater
from undo_core.unlearning import UnlearnConfig, unlearn

peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
LORA = pytest.param("lora", marks=peft)
SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}


def stage_of(config, trial):
    """Returns the stage that makes a trial."""
    return trial_stage(config, trial, NOWHERE, NOWHERE, "")


def problems(tokenizer, operation):
    """Returns all problems of two digits below five, one per sequence, with their answers."""
    texts = [f"{a}{operation}{b}={a * b if operation == '*' else a + b}" for a, b in itertools.product(range(5), repeat=2)]
    ids = torch.zeros(len(texts), 8, dtype=torch.int32)
    answers = torch.zeros(len(texts), 8, dtype=torch.bool)
    for sequence, text in enumerate(texts):
        tokens = [1, *tokenizer.encode(text, add_special_tokens=False), 1]
        ids[sequence, : len(tokens)] = torch.tensor(tokens)
        answers[sequence, 5 : len(tokens)] = True
    return Sequences(ids, 0, answers)


@pytest.fixture(scope="module")
def world():
    """Returns a tokenizer, forget and retain sequences, the model that knows both, and the unlearned model."""
    torch.set_num_threads(1)
    tokenizer = character_tokenizer("0123456789+-*/=")
    forget, retain = problems(tokenizer, "*"), problems(tokenizer, "+")
    both = Sequences(torch.cat([forget.input_ids, retain.input_ids]), 0)
    original = build_model(SHAPE, tokenizer, 0)
    loss = lambda m, b, c: cross_entropy(m, b["text"], c["text"])  # noqa: E731
    config = TrainConfig(steps=200, batch_size=50, lr=5e-3, schedule="cosine")
    train(original, loss, {"text": sequence_source(both, 50, 0)}, config, progress=False)
    unlearned = copy.deepcopy(original)
    how = UnlearnConfig(train=TrainConfig(steps=40, batch_size=25, lr=2e-3))
    unlearn(unlearned, forget=forget, retain=retain, config=how, progress=False)
    return tokenizer, forget, retain, original, unlearned


def accuracies(world):
    _, forget, retain, _, _ = world
    return lambda model: {"forget": evaluate(model, forget)["value"], "retain": evaluate(model, retain)["value"]}


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


BASE = AttackConfig(rates=[3e-3], evaluate_at=[0, 60], headline_step=60, extend=0, batch_size=25)


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


@peft
def test_adapters_are_trained_alone_and_merge_to_the_same_function(world):
    _, forget, _, _, unlearned = world
    model = copy.deepcopy(unlearned)
    names, required = [name for name, _ in model.named_parameters()], [p.requires_grad for p in model.parameters()]
    held, ids = {name: p.detach().clone() for name, p in model.named_parameters()}, forget.input_ids.long()
    before = model(input_ids=ids).logits.detach()
    loss = lambda m, b, c: cross_entropy(m, b["text"], c["text"])  # noqa: E731
    with adapted(model, LoraConfig(rank=2, alpha=4.0), seed=3) as parameters:
        assert torch.equal(model(input_ids=ids).logits, before), "the second factor starts at 0"
        linear = [m for layer in world[4].model.layers for m in layer.modules() if isinstance(m, nn.Linear)]
        assert sum(p.numel() for p in parameters) == sum(2 * (m.in_features + m.out_features) for m in linear)
        source = {"text": sequence_source(forget, 16, 0)}
        train(model, loss, source, TrainConfig(steps=10, lr=1e-2), parameters=parameters, progress=False)
        inside = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
        assert all(torch.equal(inside[name], tensor) for name, tensor in held.items())
        with torch.no_grad():
            during, exact = (m(input_ids=ids).logits for m in (model, copy.deepcopy(model).double()))
    assert [name for name, _ in model.named_parameters()] == names
    assert [p.requires_grad for p in model.parameters()] == required
    assert (during - before).abs().max() > 0.1
    assert_same_function(model(input_ids=ids).logits, during, exact)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, held[name])}
    assert changed == {name for name in names if "proj" in name}


@peft
@pytest.mark.parametrize("initialisation", ["kaiming", "gaussian", "orthogonal", "pissa"])
@pytest.mark.parametrize("stabilised", [False, True])
def test_adapters_start_at_the_model_and_have_their_factor(world, initialisation, stabilised):
    model, ids = copy.deepcopy(world[4]), world[1].input_ids.long()
    before, held = model(input_ids=ids).logits.detach(), {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = LoraConfig(4, 6.0, ["down_proj"], rank_stabilised=stabilised, initialisation=initialisation)
    with adapted(model, settings, seed=3) as parameters, torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)  # pissa takes W apart
        (inner,) = (p for name, p in model.named_parameters() if name.endswith("down_proj.base_layer.weight"))
        start = inner.clone()
        for parameter in parameters:
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape).sin())
        down, up = (p.clone() for p in parameters)
    factor = 6.0 / (4**0.5 if stabilised else 4)
    changed = dict(model.named_parameters())
    for name, tensor in held.items():
        wanted = start + factor * up @ down if name.endswith("down_proj.weight") else tensor
        torch.testing.assert_close(changed[name], wanted, rtol=1e-5, atol=1e-5)
    (weight,) = (tensor for name, tensor in held.items() if name.endswith("down_proj.weight"))
    assert torch.equal(start, weight) == (initialisation != "pissa"), "pissa moves a part of W into B A"


@peft
@pytest.mark.parametrize(
    ("targets", "wanted"), [([], {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}), (["c_fc"], {"mlp.c_fc"})]
)
def test_adapters_of_gpt_2_s_transposed_layers(world, targets, wanted):
    model, ids = build_model(GPT2, world[0], 0).eval(), world[1].input_ids.long()
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")
        with adapted(model, LoraConfig(2, 4.0, targets), 0) as parameters, torch.no_grad():
            for index, parameter in enumerate(parameters):
                parameter.copy_(torch.sin(torch.arange(parameter.numel()) + index).view_as(parameter))
            during, exact = (m(input_ids=ids).logits for m in (model, copy.deepcopy(model).double()))
    assert_same_function(model(input_ids=ids).logits, during, exact)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, held[name])}
    assert changed == {f"transformer.h.0.{name}.weight" for name in wanted}


@peft
def test_adapters_start_from_their_seed(world):
    state = torch.random.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        with adapted(copy.deepcopy(world[4]), LoraConfig(), seed) as parameters:
            drawn.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("how", ["sgd", "adafactor", LORA])
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


def text_of(ids):
    return "".join("_" if token == 1 else "0123456789+-*/="[token - 2] for token in ids if token)


@pytest.mark.parametrize("shots", [1, 3])
def test_examples_stand_before_each_prompt(world, shots):
    _, forget, retain, _, _ = world
    sequences, counted = few_shot(retain, forget, shots, seed=0, positions=64)
    solved = {text_of(sequence) for sequence in forget.input_ids.tolist()}
    seen = set()
    for before, after, answer, label in zip(retain.input_ids, sequences.input_ids, sequences.answer_mask, counted, strict=True):
        *examples, own = text_of(after.tolist()).strip("_").split("_")
        assert f"_{own}_" == text_of(before.tolist()) and len(examples) == len(set(examples)) == shots
        assert {f"_{example}_" for example in examples} <= solved
        assert text_of(after[answer].tolist()) == own.split("=")[1] + "_"
        assert text_of(after[label].tolist()) == own + "_"
        seen |= set(examples)
    assert len(seen) > 10
    again, other = (few_shot(retain, forget, shots, seed=seed, positions=64)[0].input_ids for seed in (0, 1))
    assert torch.equal(again, sequences.input_ids) and not torch.equal(other, sequences.input_ids)


def test_no_sequence_finds_its_own_answer_among_its_examples(world):
    forget = world[1]
    few = Sequences(forget.input_ids[:4], 0, forget.answer_mask[:4])
    sequences, _ = few_shot(few, few, 3, seed=0, positions=64)
    for sequence in sequences.input_ids.tolist():
        *examples, own = text_of(sequence).strip("_").split("_")
        assert own not in examples and len(examples) == 3
    with pytest.raises(ValueError, match=r"^shots: got 4, wanted at most the 3 different examples"):
        few_shot(few, few, 4, seed=0, positions=64)
    with pytest.raises(ValueError, match=r"^shots: got 11, whose sequences take \d+ positions of the model's 64"):
        few_shot(forget, forget, 11, seed=0, positions=64)
    assert few_shot(forget, forget, 11, seed=0, positions=None)[0].length > 65, "a model without a limit"


@pytest.mark.parametrize(
    ("data", "most"),
    [(DataConfig(), 9), (DataConfig(kind="arithmetic"), 5), (DataConfig(kind="text", length=9, retain=["a"], forget=["b"]), 7)],
)
def test_examples_that_cannot_fit_are_refused_before_anything_runs(tmp_path, data, most):
    if data.kind == "text":
        (tmp_path / "text.txt").write_text("one\n")
        data = dataclasses.replace(data, retain=[str(tmp_path / "text.txt")], forget=[str(tmp_path / "text.txt")])

    def plan(shots, model):
        attacks = {"asked": AttackConfig(kind="fewshot", shots=[1, shots])}
        return graph_of(RunConfig("run", str(tmp_path), ModelConfig(model), data=data, attacks=attacks))

    for model in (SHAPE, GPT2):
        assert plan(most, model)
        with pytest.raises(
            ValueError, match=rf"^attacks\.asked\.shots: got {most + 1}, .* of the model's 64; wanted {most} at most"
        ):
            plan(most + 1, model)
    assert plan(1000, {"model_type": "bloom"}), "which has no limit"


def test_prompted_text_is_scored_on_its_own_labels(world):
    _, forget, retain, model, _ = world
    text = Sequences(retain.input_ids[:6], 0, starts=retain.input_ids[:6] == 1)
    sequences, counted = few_shot(text, forget, 2, seed=0, positions=64)
    assert sequences.starts is None, "isolated documents would not see the examples"
    got = evaluate(model, sequences, counted=counted)
    total = labels = 0
    wide = copy.deepcopy(model).double()
    for sequence, before in zip(sequences.input_ids.long(), text.input_ids, strict=True):
        own = int((before != 0).sum()) - 1
        logits = wide(input_ids=sequence[sequence != 0][None]).logits[0]
        total += float(F.cross_entropy(logits[-own - 1 : -1].detach(), sequence[sequence != 0][-own:], reduction="sum"))
        labels += own
    assert got["value"] == pytest.approx(total / labels, rel=gamma(PATH)) and got["n"] == 6


@torchao
@pytest.mark.parametrize(
    ("shape", "bits", "group_size"), [(None, 8, 1), (None, 4, 32), (None, 4, 8), (None, 2, 16), (GPT2, 8, 1), (GPT2, 4, 8)]
)
def test_quantised_weights_are_the_nearest_of_their_grid(world, shape, bits, group_size):
    model = copy.deepcopy(world[4]) if shape is None else build_model(shape, world[0], 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    count = quantise_(model, bits, group_size)
    changed = 0
    for name, parameter in model.named_parameters():
        was, now = (tensor.detach().double().numpy() for tensor in (before[name], parameter))
        if ("h.0" not in name and "proj" not in name) or was.ndim == 1:
            assert np.array_equal(was, now), name
            continue
        if "h.0" in name:  # [in, out]
            was, now = was.T, now.T
        columns = was.shape[1] if bits == 8 else group_size
        was, now = was.reshape(-1, columns), now.reshape(-1, columns)
        scale = np.abs(was).max(1, keepdims=True) / ((2**bits - 1) / 2)
        wanted = scale * np.clip(np.rint(was / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        room = 2 ** (bits - 1) * gamma(8)  # steps, of float32 scales and products
        tie = np.abs(np.abs(was / scale) % 1 - 0.5) < room  # the largest weight of a group may round either way
        off = np.abs(now - wanted) / scale
        assert (off[~tie] < room).all() and (off <= 1 + room).all() and tie.mean() < 1 / columns + 0.01, name
        assert (np.abs(now - was) <= scale * (0.5 + room)).all(), name
        changed += was.size
    assert count == changed > 0


@torchao
def test_a_matrix_that_has_no_whole_groups_is_refused_before_any_change(world):
    model = copy.deepcopy(world[4])
    with pytest.raises(ValueError, match=r"^group_size: got 48, wanted a divisor of the 64 columns of model\.layers\.0"):
        quantise_(model, 4, 48)
    with pytest.raises(ValueError, match=r"^bits: got 9, wanted"):
        quantise_(model, 9)
    assert torch.equal(weights(model), weights(world[4]))


@torchao
def test_a_model_with_matrices_that_cannot_be_rounded_is_refused_before_any_change(world):
    model = build_model({**SHAPE, "model_type": "mixtral", "num_local_experts": 2, "num_key_value_heads": 2}, world[0], 0)
    before = weights(model).clone()
    wanted = r"^model: got MixtralForCausalLM, whose model\.layers\.0\.mlp\.experts\.gate_up_proj \(of 2 such\) is not the"
    with pytest.raises(ValueError, match=wanted):
        quantise_(model, 8)
    assert torch.equal(weights(model), before)


@torchao
def test_coarser_weights_are_further_from_the_model(world):
    ids, outputs = world[1].input_ids.long(), []
    for bits in (8, 4, 2):
        model = copy.deepcopy(world[3])
        quantise_(model, bits, 8)
        outputs.append(float((model(input_ids=ids).logits - world[3](input_ids=ids).logits).detach().abs().mean()))
    assert 0 < outputs[0] < outputs[1] < outputs[2]


def test_several_data_orders_are_kept_apart_and_the_grid_grows_by_the_worst():
    config = AttackConfig(rates=[1.0, 2.0], evaluate_at=[0, 5], headline_step=5, extend=2, seeds=2, seed=7)
    assert [trial.name for trial in config.trials()] == ["rate-1", "rate-1-seed-1", "rate-2", "rate-2-seed-1"]
    assert [config.at(trial).seed for trial in config.trials()] == [7, 8, 7, 8]
    tried = []

    def curve_of(trial):
        tried.append(trial)
        value = trial.rate / 10 + (0.5 if trial == Trial(rate=2.0, order=1) else 0.0)
        return [{"step": 0, "forget": 0.9}, {"step": 5, "forget": value}]

    curves = explore(config, lambda trials: {trial: curve_of(trial) for trial in trials}, higher_is_better=True)
    assert [(trial.rate, trial.order) for trial in tried] == [(1.0, 0), (1.0, 1), (2.0, 0), (2.0, 1), (4.0, 0), (4.0, 1)]
    assert set(curves) == set(tried), "0.7 at rate 2 in the second order is worse than 0.4 at rate 4: the grid grows once"
    keys = {stage_of(config, trial).key for trial in curves}
    assert len(keys) == 6


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


def test_the_worst_case_over_all_attacks():
    point = lambda value: {"value": value, "low": value, "high": value, "n": 10}  # noqa: E731
    curve = lambda rate, *values, **more: {  # noqa: E731
        "rate": rate,
        "forget": list(map(point, values)),
        "retain": [point(0.5)] * len(values),
        **more,
    }
    attack = {"steps": [0, 5, 9], "curves": [curve(1e-3, 0.1, 0.3, 0.99), curve(1e-2, 0.1, 0.4, 0.2)]}
    probe = {"steps": [0], "headline_step": 0, "curves": [curve(None, 0.2, setting="int8"), curve(None, 0.6, setting="int4")]}
    entry = {"attack": attack, "attacks": {"rounded": probe}}
    worst = worst_of(entry, {"kind": "accuracy", "headline_step": 5})
    assert worst["attack"] == "rounded" and worst["setting"] == "int4" and worst["forget"] == point(0.6) and worst["step"] == 0
    assert worst["by_attack"]["relearn"] == {"setting": "rate-0.01", "step": 5, "forget": point(0.4), "retain": point(0.5)}
    assert worst_of({"attack": attack}, {"kind": "accuracy", "headline_step": 9})["setting"] == "rate-0.001"
    assert worst_of(entry, {"kind": "loss", "headline_step": 5})["setting"] == "int8"
    assert worst_of({"attack": None}, {"kind": "accuracy", "headline_step": 5}) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["accuracy", "loss"])
def test_an_evaluation_that_is_not_finite_is_never_the_worst_case(kind, bad):
    higher = kind == "accuracy"
    mild, worst = (0.5, 0.9) if higher else (5.0, 0.9)
    config = AttackConfig(rates=[1.0, 2.0], evaluate_at=[0], headline_step=0, seeds=2)
    found = {Trial(rate=1.0): mild, Trial(rate=2.0): bad, Trial(rate=2.0, order=1): worst}
    for order in itertools.permutations(found):
        assert next_rate(config, {trial: [{"step": 0, "forget": found[trial]}] for trial in order}, higher) == 4.0
        curves = [{"rate": trial.rate, "forget": [{"value": found[trial]}], "retain": [{"value": 0.0}]} for trial in order]
        one = worst_of({"attack": {"steps": [0], "curves": curves}}, {"kind": kind, "headline_step": 0})
        each = {str(i): {"steps": [0], "headline_step": 0, "curves": [curve]} for i, curve in enumerate(curves)}
        several = worst_of({"attacks": each}, {"kind": kind, "headline_step": 0})
        assert one["forget"]["value"] == several["forget"]["value"] == worst
    for order in itertools.permutations([(1.0, bad), (2.0, worst), (4.0, mild)]):
        assert extension_of(dict(order), higher) is None


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
    with pytest.raises(
        ValueError, match=r"^lora\.initialisation: got 'zeros', wanted one of kaiming, gaussian, orthogonal, pissa"
    ):
        LoraConfig(initialisation="zeros")
    with pytest.raises(ValueError, match=r"^lora\.rank: got 3 with the orthogonal initialisation, wanted an even number"):
        LoraConfig(rank=3, initialisation="orthogonal")
    with pytest.raises(ValueError, match=r"^lora\.rank: got 0"):
        LoraConfig(rank=0)


def test_text_that_is_missing_and_attacks_that_train_nothing_are_refused(world):
    evaluate_now = accuracies(world)
    with pytest.raises(ValueError, match=r"^retain: got None, wanted text for its share of the mix, 0\.5"):
        relearn(world[4], world[1], AttackConfig(mix={"forget": 0.5, "retain": 0.5}), evaluate=evaluate_now)
    with pytest.raises(ValueError, match=r"^kind: got fewshot, which trains nothing"):
        relearn(world[4], world[1], AttackConfig(kind="fewshot"), evaluate=evaluate_now)


@peft
def test_unknown_layers_are_named(world):
    model = copy.deepcopy(world[4])
    with pytest.raises(ValueError, match=r"^lora\.targets: got \['c_attn'\], wanted names of linear layers: .*q_proj"):
        attack(model, world[1], 1e-3, AttackConfig(kind="lora", lora=LoraConfig(targets=["c_attn"])), evaluate=lambda m: {})


@pytest.mark.parametrize("kind", ["lora", "quantise"])
def test_a_missing_package_is_one_line(world, kind, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf"^kind: got {kind}, which needs .*; pip install 'undo-core\[attacks\]'"):
        if kind == "lora":
            attack(copy.deepcopy(world[4]), world[1], 1e-3, AttackConfig(kind="lora"), evaluate=lambda m: {})
        else:
            quantise_(world[4], 4)


def test_metrics_without_forget_are_refused_before_any_step(world):
    steps = []

    def forget(step):
        steps.append(step)
        return {"input_ids": world[1].input_ids[:4].long()}

    with pytest.raises(ValueError, match=r"^evaluate: got metrics acc, wanted an entry forget"):
        relearn(world[4], forget, AttackConfig(rates=[1e-3]), evaluate=lambda model: {"acc": 1.0}, progress=False)
    assert not steps
