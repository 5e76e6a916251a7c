"""What several ranks cannot do is refused by name, before anything runs. No process is started here: the number of ranks is set."""

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from undo_core import distributed
from undo_core.attacks.config import LoraConfig
from undo_core.attacks.lora import adapted
from undo_core.cli import main
from undo_core.data.sequences import Sequences
from undo_core.distributed import ranks
from undo_core.distributed.dropout import whole_dropout
from undo_core.training import TrainConfig, sequence_source, train
from undo_core.training.losses import cross_entropy

DEMO = "configs/arithmetic-cpu.yaml"


def llama(**options):
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=8, **options))


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(distributed, "count", lambda: 2)


def test_a_process_group_of_somebody_else_is_not_trained_in_unnoticed(monkeypatch):
    """Each of its processes would train a copy of its own, and all would write one folder."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    source = {"text": sequence_source(Sequences(torch.ones(4, 5, dtype=torch.int64), pad_id=0), 2, 0)}
    loss = lambda model, batches, counted: cross_entropy(model, batches["text"], counted["text"])  # noqa: E731
    with pytest.raises(ValueError, match=r"got a process group of 2 processes.*undo_core\.distributed\.start\(\)"):
        train(llama(), loss, source, TrainConfig(steps=1, batch_size=2), progress=False)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_dropout_inside_a_fused_attention_kernel(two_ranks, attention):
    model = llama(attention_dropout=0.1)
    model.config._attn_implementation = attention
    with pytest.raises(ValueError, match=rf"attention: got {attention}.*wanted eager"), whole_dropout(model, [4]):
        pass
    model.config._attn_implementation = "eager"
    with whole_dropout(model, [4]):
        pass


def test_an_error_in_a_lora_attack_is_that_of_its_rank(two_ranks):
    """Merging would start collectives that the other ranks do not join, and hide the error."""
    pytest.importorskip("peft")
    model = llama()
    with pytest.raises(RuntimeError, match="only here"), adapted(model, LoraConfig(rank=1), 0):
        raise RuntimeError("only here")
    assert any("lora" in name for name, _ in model.named_parameters())


def test_undo_plan_refuses_what_undo_run_would(capsys, request):
    demo = str(request.config.rootpath / DEMO)
    assert main(["plan", demo, "--ranks=2", "--unlearn.train.optimizer=adafactor"]) == 2
    assert "optimizer: got adafactor on 2 ranks" in capsys.readouterr().err
