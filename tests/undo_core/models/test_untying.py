"""A model whose tied head gets a weight of its own computes the same, and is saved and loaded with both."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from undo_core.models import load_model
from undo_core.models.untying import untied

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS = {
    "gemma2": {**SMALL, "num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {
        "vocab_size": 40,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 16,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
    "bert": {**SMALL, "is_decoder": True},
}


def model_of(kind, **more):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS.get(kind, SMALL), **more)).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_untying(kind, tmp_path):
    model, ids = model_of(kind), torch.arange(8)[None]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    wanted, size = model(input_ids=ids).logits, model.get_input_embeddings().weight.numel()
    before = sum(p.numel() for p in model.parameters())
    apart = untied(model).eval()
    assert torch.equal(apart(input_ids=ids).logits, wanted)
    bias = 40 if kind == "bert" else 0  # its head's bias has two names as well
    assert sum(p.numel() for p in apart.parameters()) == before + size + bias
    apart.save_pretrained(tmp_path)
    again = load_model(tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, wanted)
    with torch.no_grad():
        again.get_output_embeddings().weight.zero_()
    assert again.get_input_embeddings().weight.abs().max() > 0


def test_a_token_that_ends_texts_and_pads_goes_on_being_trained(tmp_path):
    """The loaded model trains its embedding; transformers' own model of the configuration would leave it as it is."""
    model_of("llama", tie_word_embeddings=True, pad_token_id=2, eos_token_id=2).save_pretrained(tmp_path)
    apart = untied(load_model(tmp_path))
    apart(input_ids=torch.tensor([[3, 2, 4]])).logits.sum().backward()
    assert apart.get_input_embeddings().weight.grad[2].abs().max() > 0


def test_a_head_of_its_own_is_refused():
    with pytest.raises(
        ValueError, match="untie: got a LlamaForCausalLM whose head shares no weight, wanted one with a tied head"
    ):
        untied(model_of("llama"))
