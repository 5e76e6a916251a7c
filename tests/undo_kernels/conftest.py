"""What the tests of several backends share."""

import pytest
import torch
from bfloat16_ways import WAYS, use_way
from undo_kernels import cpu, recorded

if not torch.cuda.is_available():
    from interpreter import replace_language_once

    replace_language_once()


@pytest.fixture(scope="module")
def small_tiles():
    """Small problems of several tiles; the default's tile has thousands of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu.plan, "_BLOCK_V", 1024)
        yield


@pytest.fixture
def ran_in_cpp():
    """Asserts afterwards that the losses ran in C++, where a small problem would have gone to plain PyTorch without a word."""
    with recorded() as calls:
        yield
    assert calls and {call.backend for call in calls} == {"cpu"}, calls


@pytest.fixture(params=cpu.vector_units())
def instruction_set(request, monkeypatch):
    """Name of the instruction set that the C++ kernels use during the test."""
    monkeypatch.setenv("UNDO_CPU_ISA", request.param)
    return request.param


@pytest.fixture(params=WAYS)
def bfloat16(request, monkeypatch):
    """How heads in bfloat16 are multiplied during the test: each of this processor's ways, also emulated ones."""
    use_way(request.param, monkeypatch)
    return request.param


@pytest.fixture(scope="session")
def trained():
    """Final hidden states and head of a small language model after some training on a second-order Markov text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    vocabulary = 1024
    config = AutoConfig.for_model(
        "gemma2", vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        table = torch.randint(1, vocabulary, (vocabulary, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(60):
            ids = torch.randint(1, vocabulary, (16, 33))
            for t in range(1, 33):
                ids[:, t] = table[ids[:, t - 1], torch.randint(0, 4, (16,)) * torch.randint(0, 2, (16,))]
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 4.0, "the model has learnt something"
        hidden = model.base_model(input_ids=ids).last_hidden_state.detach().reshape(-1, 64)[:192]
    return hidden, model.lm_head.weight.detach(), torch.randn(192, 64, generator=torch.Generator().manual_seed(1))
