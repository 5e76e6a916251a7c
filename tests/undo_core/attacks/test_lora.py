"""Adapters: trained alone, merged to the same function, started at the model from a seed."""

import copy
import importlib.util
import warnings

import pytest
import torch
from attacked_models import GPT2, peft
from rounding import assert_same_function
from torch import nn

from undo_core.attacks import AttackConfig, LoraConfig
from undo_core.attacks.lora import adapted
from undo_core.attacks.relearning import attack
from undo_core.models import build_model
from undo_core.training import TrainConfig, sequence_source, train
from undo_core.training.losses import cross_entropy


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


@peft
def test_unknown_layers_are_named(world):
    model = copy.deepcopy(world[4])
    with pytest.raises(ValueError, match=r"^lora\.targets: got \['c_attn'\], wanted names of linear layers: .*q_proj"):
        attack(model, world[1], 1e-3, AttackConfig(kind="lora", lora=LoraConfig(targets=["c_attn"])), evaluate=lambda m: {})


def test_bad_settings_name_the_key():
    with pytest.raises(
        ValueError, match=r"^lora\.initialisation: got 'zeros', wanted one of kaiming, gaussian, orthogonal, pissa"
    ):
        LoraConfig(initialisation="zeros")
    with pytest.raises(ValueError, match=r"^lora\.rank: got 3 with the orthogonal initialisation, wanted an even number"):
        LoraConfig(rank=3, initialisation="orthogonal")
    with pytest.raises(ValueError, match=r"^lora\.rank: got 0"):
        LoraConfig(rank=0)


def test_a_missing_package_is_one_line(world, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"^kind: got lora, which needs .*; pip install 'undo-core\[attacks\]'"):
        attack(copy.deepcopy(world[4]), world[1], 1e-3, AttackConfig(kind="lora"), evaluate=lambda m: {})
