"""Shrink targets come from the model's own initialisation."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from undo_core import noise_
from undo_core.noise.initialisation import initialisation

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "gemma2": ({"num_key_value_heads": 1, "head_dim": 8}, 0.0),
    "gemma3_text": ({"num_key_value_heads": 1, "head_dim": 8}, 0.0),
    "llama": ({}, 1.0),
    "qwen2": ({"num_key_value_heads": 1}, 1.0),
    "mistral": ({"num_key_value_heads": 1}, 1.0),
    "gpt_neox": ({}, 1.0),
    "phi": ({}, 1.0),
}


@pytest.mark.parametrize("kind", MODELS)
def test_norms_shrink_toward_where_they_start(kind):
    extra, start = MODELS[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **extra))
    values = initialisation(model).values
    fresh = dict(model.named_parameters())
    assert set(values) == {name for name, p in fresh.items() if p.ndim == 1}
    for name, value in values.items():
        assert value == (start if "norm" in name and name.endswith("weight") else 0.0), name
        assert torch.equal(fresh[name], torch.full_like(fresh[name], value)), "what a fresh model of this kind has"
    with torch.no_grad():
        for name in values:
            fresh[name].add_(0.5)
    report = noise_(model, alpha=0.75, beta=0.1, seed=3)
    for name, value in values.items():
        assert torch.equal(fresh[name], torch.full_like(fresh[name], value + 0.125)), "eighths are exact"
        assert report[name].before > report[name].after or value
    assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()


def test_it_is_the_same_again():
    config = AutoConfig.for_model("llama", **SMALL)
    models = [AutoModelForCausalLM.from_config(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        noise_(model, alpha=0.5, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_an_error_changes_nothing():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"^alpha: got 2"):
        noise_(model, alpha=2, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
