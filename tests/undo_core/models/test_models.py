"""A head gives the model's own logits, or it is refused."""

import copy
import errno
import json
import os

import pytest
import torch
from causal_models import build as causal
from causal_models import config_of, fields_of
from rounding import assert_same_function
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Mistral3Config, Mistral3ForConditionalGeneration

from undo_core.models import (
    UnsupportedHead,
    evaluating,
    forward_flops,
    head_of,
    hidden_states,
    hidden_states_at,
    initialise,
    load_model,
    loading,
    vocabulary_of,
)
from undo_core.models.folder import read_configuration
from undo_core.models.loading import architecture, make

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
    assert_same_function(z, *(m(input_ids=ids).logits for m in (model, copy.deepcopy(model).double())))
    assert (head.softcap, head.scale) == (extra.get("final_logit_softcapping"), {"cohere": 0.3, "granite": 0.25}.get(kind, 1.0))


def test_entries_that_the_model_drops_are_not_counted():
    model = causal("inkling_text", unpadded_vocab_size=41).eval()
    stored, logits = len(model.lm_head.weight), model(input_ids=torch.arange(12)[None], use_cache=False).logits
    assert vocabulary_of(model) == logits.shape[-1] == 41 < stored


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


def counted_flops(model, length):
    """Returns the FLOPs of a token in a sequence of ``length``, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(3 * length).view(3, length) % 40, use_cache=False)
    flops = counter.get_flop_counts()["Global"]
    return sum(count for op, count in flops.items() if op is not torch.ops.aten.convolution) / (
        3 * length
    )  # it pads a sequence


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "jetmoe"])
def test_flops_are_those_of_the_matrix_products(kind):
    model = causal(kind).eval()
    model.set_attn_implementation("eager")  # torch counts no fused kernel of the CPU
    if kind in ("mixtral", "qwen3_moe", "gpt_oss"):
        model.set_experts_implementation("eager")
    config, length = model.config, 24
    # Besides the products of weights and of attention, the angles of rotary positions are a product of one position and each
    # frequency.
    rotary = 2 * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    assert 0 <= counted_flops(model, length) - forward_flops(model, length) <= rotary


def test_flops_of_linear_attention_do_not_grow_with_the_sequence():
    model = causal("qwen3_next").eval()
    model.set_attn_implementation("eager")
    assert set(model.config.layer_types) == {"linear_attention", "full_attention"}
    grown = [
        flops(model, 128) - flops(model, 64) for flops in (counted_flops, forward_flops)
    ]  # whole chunks of the implementation
    assert grown[0] == grown[1] > 0


class Scaled(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) * 1.0001


def test_a_head_with_a_forward_of_its_own_is_refused_however_near_it_is():
    model = build("llama")
    model.lm_head = Scaled(16, 40, bias=False)
    with pytest.raises(UnsupportedHead, match="LlamaForCausalLM whose output layer, a Scaled, overrides forward"):
        head_of(model)


@pytest.mark.parametrize(
    "after",
    [
        lambda z: z + torch.linspace(0, 1, z.shape[-1]),
        lambda z: z.masked_fill(torch.arange(z.shape[-1]) == 3, -torch.inf),
        lambda z: z * torch.linspace(1, 1.01, z.shape[-1]),
        lambda z: z.clamp(-100, 100),
        lambda z: z.log_softmax(-1),
    ],
)
def test_what_a_model_does_to_its_logits_beyond_scale_and_softcap_is_refused(after):
    model = build("llama")
    forward = model.forward

    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = after(output.logits)
        return output

    model.forward = changed
    with pytest.raises(UnsupportedHead, match="LlamaForCausalLM's logits differ"):
        head_of(model)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [("llama", {}), ("gpt2", {}), ("gemma2", {"num_key_value_heads": 1, "head_dim": 8}), ("granite", {"logits_scaling": 4.0})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_under_autocast_and_in_16_bits_are_the_same(kind, extra, dtype):
    wanted, model = head_of(build(kind, **extra)), build(kind, **extra).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        head = head_of(model)
    assert (head.scale, head.softcap) == (wanted.scale, wanted.softcap)


def test_each_modules_own_mode_is_restored():
    model = build("gpt2").train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    head_of(model)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("name", ["llama4", "gemma2", "granite", "falcon_h1", "recurrent_gemma", "modernbert-decoder", "blt"])
def test_a_model_without_contents_has_the_constants_of_its_head(name):
    constants = {"logits_scaling": 4.0, "lm_head_multiplier": 0.7, "logits_soft_cap": 2.0}
    constants = {key: value for key, value in constants.items() if key in fields_of(type(config_of(name)))}
    head = head_of(causal(name, **constants))
    with torch.device("meta"):
        found = head_of(causal(name, **constants))
    assert (found.scale, found.softcap, found.weight.shape) == (head.scale, head.softcap, head.weight.shape)


def test_a_wrapper_that_the_automatic_class_does_not_map_is_a_model_too():
    text = {**SMALL, "model_type": "mistral", "num_key_value_heads": 1, "head_dim": 8}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = Mistral3Config(text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8, "head_dim": 8})
    model, ids = Mistral3ForConditionalGeneration(config).eval(), torch.arange(8)[None]
    with torch.no_grad():
        got = hidden_states(model, ids) @ head_of(model).weight.T
        assert_same_function(got, *(m(input_ids=ids).logits for m in (model, copy.deepcopy(model).double())))
    with pytest.raises(ValueError, match="model: got mistral3, of which transformers' AutoModelForCausalLM makes no model"):
        initialise(config, 0)


def test_inner_hidden_states_are_transformers_own():
    for model in (build("llama"), causal("gemma3"), causal("bart"), causal("modernbert-decoder")):
        ids = torch.arange(8)[None] + 3
        hidden, inner = hidden_states_at(model, [0, 1], ids)
        wanted = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        assert all(torch.equal(a, b) for a, b in zip(inner, wanted, strict=False)) and len(inner) == 2
        assert torch.equal(hidden, hidden_states(model, ids))


@pytest.mark.parametrize("name", ["mamba", "rwkv", "gemma4_text", "blt", "bloom"])
def test_flops_of_models_without_one_number_of_heads_are_those_of_their_products_at_least(name):
    model = causal(name)
    products = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    assert 2 * products <= forward_flops(model, 8) < 4 * products


def test_generation_settings_that_cannot_be_read_are_not_replaced(tmp_path, monkeypatch):
    """transformers would go on with others, and the next stage would write those."""
    model = build("llama")
    model.generation_config.max_length = 77
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).generation_config.max_length == 77
    real = open

    def broken(file, *more, **named):
        if str(file).endswith("generation_config.json"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), file)
        return real(file, *more, **named)

    for module in ("builtins", "io"):
        monkeypatch.setattr(f"{module}.open", broken)
    with pytest.raises(OSError, match="generation_config"):
        load_model(tmp_path)


def test_a_configuration_with_many_experts_in_a_table_is_read(tmp_path):
    """Doge's files name 16384 experts, also those of its dense models."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "doge", "num_experts": 16384, "is_moe": False}))
    assert read_configuration(tmp_path).num_experts == 16384


def test_buffers_may_take_what_the_files_take(tmp_path, monkeypatch):
    """An old GPT with many positions has a mask of their square in each layer."""
    config = architecture({"model_type": "llama", **SMALL})
    model = make(config)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "BUFFER_BYTES", 8)
    assert sum(buffer.nbytes for buffer in model.buffers()) > 8
    loading.sized_skeleton(tmp_path, config)
