"""Heads are what the model's own logits say, or refused."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from undo_core.models import UnsupportedHead, forward_flops, head_of, hidden_states, initialise

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def build(kind, **extra):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **extra), attn_implementation="eager").eval()


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("gemma2", {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 2.0}),
        ("gemma3_text", {"num_key_value_heads": 1, "head_dim": 8}),
        ("llama", {}),
        ("qwen2", {"num_key_value_heads": 1}),
        ("qwen3", {"num_key_value_heads": 1, "head_dim": 8}),
        ("mistral", {"num_key_value_heads": 1}),
        ("phi", {}),
        ("gpt_neox", {}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_head_parts_give_the_models_logits(kind, extra):
    model = build(kind, **extra)
    if (bias := model.get_output_embeddings().bias) is not None:
        nn.init.normal_(bias)
    ids = torch.arange(12)[None]
    head = head_of(model)
    z = hidden_states(model, ids) @ head.weight.T
    z = (z if head.bias is None else z + head.bias) * head.scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    torch.testing.assert_close(z, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert (head.softcap, head.scale) == (extra.get("final_logit_softcapping"), {"cohere": 0.3, "granite": 0.25}.get(kind, 1.0))


def test_a_head_that_does_more_is_refused_by_name():
    model = build("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    with pytest.raises(UnsupportedHead, match="LlamaForCausalLM's logits differ"):
        head_of(model)
    model = build("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedHead, match="Sequential"):
        head_of(model)


def test_initialisation_is_a_function_of_the_seed():
    config = AutoConfig.for_model("llama", **SMALL)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = initialise(config, 1), initialise(config, 1), initialise(config, 2)
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"
    pairs = zip(first.parameters(), again.parameters(), other.parameters(), strict=True)
    same = [(torch.equal(a, b), torch.equal(a, c)) for a, b, c in pairs]
    assert all(a for a, _ in same) and not all(b for _, b in same)


@pytest.mark.parametrize(("kind", "extra"), [("gemma2", {"num_key_value_heads": 1, "head_dim": 8}), ("gpt2", {})])
def test_flops_are_those_of_the_matrix_products(kind, extra):
    from torch.utils.flop_counter import FlopCounterMode

    model, length = build(kind, **extra), 24
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(3, length, dtype=torch.long), use_cache=False)
    assert forward_flops(model, length) * 3 * length == pytest.approx(counter.get_total_flops(), rel=0.02)
