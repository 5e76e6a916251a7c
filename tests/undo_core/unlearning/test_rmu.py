"""RMU against the usual way, which keeps a second, frozen model, runs every layer and keeps every hidden state."""

import contextlib
import copy
import json

import pytest
import torch
from rounding import assert_same_function
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from undo_core import TrainConfig, UnlearnConfig, ops, unlearn
from undo_core.data.sequences import Sequences
from undo_core.models import forward_flops
from undo_core.training.batches import Batch
from undo_core.training.training_state import CheckpointWriter
from undo_core.unlearning import METHODS, RMUConfig, unlearn_flops
from undo_core.unlearning.activations import Trunk, evaluating

SHAPE = {
    "vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "phi": {},
    "gpt_neox": {},
    "gpt2": {"n_layer": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
PATTERNS = {"gpt_neox": "mlp.dense_4h_to_h.weight", "phi": "mlp.fc2.weight", "gpt2": "mlp.c_proj.weight"}


def build(kind, seed=0, **more):
    attention = {"attn_implementation": "eager"} if kind == "gemma2" else {}
    config = AutoConfig.for_model(kind, **{**SHAPE, **MODELS[kind], **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention)
        for parameter in model.parameters():  # zero biases and norms would hide a mistake
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def settings(kind="llama", retain_weight=2.0, seed=4, **more):
    more = {
        "first_layer": 1,
        "target_layer": 3,
        "coefficient": 6.5,
        "trained": PATTERNS.get(kind, "mlp.down_proj.weight"),
        **more,
    }
    return UnlearnConfig(method="rmu", retain_weight=retain_weight, rmu=RMUConfig(**more), train=TrainConfig(seed=seed))


def draw(seed=0, size=5, length=9):
    """Returns right-padded sequences without an attention mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, SHAPE["vocab_size"], (size, length), generator=generator)
    for sequence, cut in enumerate(torch.randint(3, length + 1, (size,), generator=generator).tolist()):
        ids[sequence, cut:] = 0
    return Batch(ids, ids != 0)


def data(seed=0):
    parts = {"forget": draw(seed), "retain": draw(seed + 1)}
    return parts, {name: batch.counted for name, batch in parts.items()}


def disturb(method):
    """Moves the trained matrices away from the frozen ones."""
    with torch.no_grad():
        for parameter in method.parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def usual(model, frozen, config, parts):
    """Computes the definition, without saving anything."""
    rmu, total = config.rmu, 0.0
    direction = ops.misdirection(SHAPE["hidden_size"], config.train.seed, rmu.direction)
    for name, weight in (("forget", 1.0), ("retain", config.retain_weight)):
        batch = parts[name]
        hidden = model(input_ids=batch.input_ids, output_hidden_states=True).hidden_states[rmu.target_layer]
        target = rmu.coefficient * direction
        if name == "retain":
            with torch.no_grad():
                target = frozen(input_ids=batch.input_ids, output_hidden_states=True).hidden_states[rmu.target_layer]
        square = (hidden - target).square().mean(-1)
        labels = batch.mask.clone()
        labels[:, 0] = False
        if rmu.normalize == "all":
            total = total + weight * square.mean()
        elif rmu.normalize == "masked":
            total = total + weight * square[labels].mean()
        else:
            total = total + weight * torch.stack([s[m].mean() for s, m in zip(square, labels, strict=True)]).mean()
    return total


def trained_names(model, kind):
    pattern = PATTERNS.get(kind, "mlp.down_proj.weight")
    return [name for name, _ in model.named_parameters() if name.endswith(pattern) and (".1." in name or ".2." in name)]


def compare(model, config, kind, parts, counted):
    frozen = copy.deepcopy(model).eval()
    other = copy.deepcopy(model).train(model.training)
    method = METHODS["rmu"](model, config)
    disturb(method)
    other.load_state_dict(model.state_dict())
    with method.alone(model):
        loss = method.loss(model, parts, counted)
        loss.backward()
    wanted = usual(other, frozen, config, parts)
    wanted.backward()
    wide = copy.deepcopy(other).double()
    wide.zero_grad()
    exact = usual(wide, copy.deepcopy(frozen).double(), config, parts)
    exact.backward()
    assert_same_function(loss, wanted, exact, "loss")
    got, right, true = (dict(m.named_parameters()) for m in (model, other, wide))
    names = {name for name, p in got.items() if p.grad is not None}
    assert names == set(trained_names(model, kind))
    for name in names:
        assert_same_function(got[name].grad, right[name].grad, true[name].grad, name)


@pytest.mark.parametrize("normalize", ["all", "masked", "sequence"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_and_the_gradients_are_those_of_the_usual_way(kind, normalize):
    compare(build(kind).train(), settings(kind, normalize=normalize, direction="uniform"), kind, *data())


def test_padding_on_the_left_with_an_attention_mask():
    model = build("gemma2")
    batch = draw()
    ids = batch.input_ids.flip(1)
    trunk, mask = Trunk(model), (ids != 0).long()
    wanted = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[3]
    entered = trunk.enter(ids, mask)
    got = entered.run(entered.hidden, 0, 3)
    got, wanted = got[mask.bool()], wanted[mask.bool()]
    assert_same_function(
        got, wanted, wanted
    )  # transformers' own mask gives NaN in float64, because twice its lowest number is infinite


def test_after_the_last_layer_the_final_norm_is_not_applied():
    model = build("llama")
    ids = draw().input_ids
    caught = []
    with model.model.layers[3].register_forward_hook(lambda module, args, output: caught.append(output)):
        normed = model(input_ids=ids, output_hidden_states=True).hidden_states[4]
    entered = Trunk(model).enter(ids)
    got = entered.run(entered.hidden, 0, 4)
    wide = copy.deepcopy(model).double()
    with wide.model.layers[3].register_forward_hook(lambda module, args, output: caught.append(output)):
        wide(input_ids=ids)
    assert_same_function(got, *caught)
    assert (got - normed).norm() > 0.1 * normed.norm()


@contextlib.contextmanager
def counting(model):
    """Counts how often each layer and the head ran."""
    calls = dict.fromkeys([*range(4), "head"], 0)

    def count(key):
        return lambda *_: calls.__setitem__(key, calls[key] + 1)

    hooks = [layer.register_forward_hook(count(k)) for k, layer in enumerate(Trunk(model).layers)]
    hooks.append(model.get_output_embeddings().register_forward_hook(count("head")))
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", ["gemma2", "llama", "qwen3", "gpt_neox"])
def test_what_runs_and_how_often(kind):
    model = build(kind)
    for weight, wanted in ((2.0, {0: 2, 1: 3, 2: 3, 3: 0, "head": 0}), (0.0, {0: 1, 1: 1, 2: 1, 3: 0, "head": 0})):
        method = METHODS["rmu"](model, settings(kind, retain_weight=weight))
        with counting(model) as calls, method.alone(model):
            method.loss(model, *data()).backward()
        assert calls == wanted


def test_only_the_trained_matrices_have_gradients_and_moments(monkeypatch):
    model = build("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)  # trained all the same
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimized, with_gradient = [], set()
    make, step = torch.optim.AdamW.__init__, torch.optim.AdamW.step

    def watched(self):
        with_gradient.update(name for name, p in model.named_parameters() if p.grad is not None)
        return step(self)

    monkeypatch.setattr(
        torch.optim.AdamW, "__init__", lambda self, ps, **kw: (optimized.extend(ps), make(self, optimized, **kw))[1]
    )
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    sequences = Sequences(draw(size=16).input_ids, 0)
    config = UnlearnConfig(method="rmu", rmu=settings().rmu, train=TrainConfig(steps=2, batch_size=4, lr=1e-2))
    unlearn(model, forget=sequences, retain=sequences, config=config, progress=False)
    names = set(trained_names(model, "llama"))
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == names == with_gradient
    assert len(optimized) == len(names)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert all(p.grad is None for p in model.parameters())


def test_requires_grad_is_restored_after_a_failure():
    model = build("llama")
    method = METHODS["rmu"](model, settings())
    with pytest.raises(RuntimeError, match="on purpose"), method.alone(model):
        raise RuntimeError("on purpose")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["gemma2", "gpt_neox"])
def test_gradient_checkpointing_does_not_change_the_gradients(kind):
    model = build(kind).train()
    model.gradient_checkpointing_enable()
    compare(model, settings(kind), kind, *data())


def test_a_compiled_model_gives_the_same_gradients():
    model = build("qwen3")
    plain = copy.deepcopy(model)
    model.model.compile(backend="eager")
    for layer in model.model.layers[2:]:  # a trained layer beside its frozen copy, and the target's
        layer.compile(backend="eager")
    results = []
    for one in (model, plain):
        method = METHODS["rmu"](one, settings())
        disturb(method)
        with method.alone(one):
            loss = method.loss(one, *data())
            results.append((loss.detach(), *torch.autograd.grad(loss, method.parameters)))
    for compiled, usual_way in zip(*results, strict=True):  # the same operations, which the compiler may fuse
        assert_same_function(compiled, usual_way, usual_way)


def test_dropout_is_off_in_what_is_shared_and_frozen():
    model = build("gpt_neox", attention_dropout=0.3, hidden_dropout=0.3).train()
    method = METHODS["rmu"](model, settings("gpt_neox"))
    parts, counted = data()
    with torch.no_grad():
        noisy = [float(method.loss(model, parts, counted)) for _ in range(2)]
    assert noisy[0] != noisy[1] and all(m.training for m in model.modules()), "the trained layers keep the model's mode"
    with torch.no_grad(), evaluating(model):
        assert not any(m.training for m in model.modules())
        alone = method.loss(model, {"retain": parts["retain"]}, counted)
    assert float(alone) == 0, "nothing has moved, and no dropout tells the frozen activations from the shared ones"


class Killed(Exception):
    pass


@pytest.mark.parametrize("normalize", ["masked", "all"])
def test_a_killed_run_continues_to_the_same_bits_against_the_original_activations(tmp_path, monkeypatch, normalize):
    sequences = Sequences(draw(size=40).input_ids, 0), Sequences(draw(seed=7, size=40).input_ids, 0)
    rmu = settings(normalize=normalize).rmu
    config = UnlearnConfig(method="rmu", rmu=rmu, train=TrainConfig(steps=6, batch_size=8, lr=1e-2, micro_batch_size=3))

    def run(folder):
        model = build("llama")
        folder.mkdir(exist_ok=True)
        unlearn(
            model,
            forget=sequences[0],
            retain=sequences[1],
            config=config,
            folder=folder,
            progress=False,
            checkpoint_seconds=-1.0,
        )
        return model.state_dict()

    whole = run(tmp_path / "whole")

    class Dying(CheckpointWriter):
        def write(self, step, state):
            super().write(step, state)
            if step == 3:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("undo_core.training.loop.CheckpointWriter", Dying)
        with pytest.raises(Killed):
            run(tmp_path / "cut")
    resumed = run(tmp_path / "cut")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    assert [json.loads(line) for line in logs[0]] == [json.loads(line) for line in logs[1]]


def test_flops_count_the_layers_that_run():
    model, length = build("llama"), 9
    layer = forward_flops(model, length, [model.model.layers[0]])
    assert 4 * layer + 2 * 32 * 53 == forward_flops(model, length)
    attention, matrix = 4 * 4 * 8 * length, 2 * 32 * 48
    forget = layer + 2 * 2 * layer + 2 * attention + 2 * matrix
    assert unlearn_flops(model, settings(), length) == {"forget": forget, "retain": forget + 2 * layer}
    assert unlearn_flops(model, settings(retain_weight=0.0), length) == {"forget": forget, "retain": 0}
    assert unlearn_flops(model, UnlearnConfig(), length)["retain"] == 3 * forward_flops(model, length)


def test_a_model_that_does_something_between_its_layers_is_refused(monkeypatch):
    model = build("llama")
    layer = model.model.layers[1]
    run = type(model.model).forward

    def between(self, *args, **kwargs):
        with layer.register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:])):
            return run(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", between)
    with pytest.raises(ValueError, match=r"^model: got LlamaForCausalLM, whose hidden states after 2 layers differ"):
        Trunk(model)
    model.model.layers = nn.ModuleList(model.model.layers[:3])
    with pytest.raises(ValueError, match=r"^model: got LlamaForCausalLM, in which no list of its 4 layers"):
        Trunk(model)


def test_rmu_refuses_what_the_model_has_not():
    with pytest.raises(ValueError, match=r"^rmu\.target_layer: got 5, wanted at most the model's 4"):
        METHODS["rmu"](build("llama"), settings(target_layer=5))
    with pytest.raises(ValueError, match=r"^rmu\.trained: got 'nothing'"):
        METHODS["rmu"](build("llama"), settings(trained="nothing"))
