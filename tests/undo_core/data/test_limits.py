"""Sequences longer than a model's positions and ids past its vocabulary are refused where they reach a model."""

import dataclasses

import pytest
import torch
from tokenizer_kinds import tokenizer_of
from transformers import AutoConfig

from undo_core import TrainConfig, UnlearnConfig, cache_teacher, distill, evaluate, relearn, unlearn
from undo_core.attacks.relearning import AttackConfig
from undo_core.data.limits import limits_of
from undo_core.data.sequences import Sequences
from undo_core.evaluation.multiple_choice import log_likelihoods
from undo_core.models import build_model, positions_of
from undo_core.unlearning import RMUConfig

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
MODELS = {
    "gpt2": {"n_positions": 12},
    "opt": {"max_position_embeddings": 12, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "llama": {"max_position_embeddings": 12, "intermediate_size": 32},
    "mpt": {"max_seq_len": 12, "d_model": 16, "n_layers": 2, "n_heads": 2},
}
SHORT = TrainConfig(steps=1, batch_size=2, lr=1e-3)


def make(kind, seed=0):
    return build_model({"model_type": kind, **TINY, **MODELS[kind]}, tokenizer_of("padded"), seed)


def sequences(length, largest=299):
    return Sequences(torch.full((4, length), largest, dtype=torch.int32), 0)


def uses(kind, data, folder):
    """Returns each public function that reads sequences, by the names of the argument and of the function."""
    method = UnlearnConfig("graddiff", train=SHORT)
    attack = AttackConfig(rates=[1e-3], batch_size=2, evaluate_at=[0, 1], headline_step=1, extend=0)
    return {
        "text distill": lambda: distill(make(kind), make(kind, 1), data, SHORT, progress=False),
        "forget unlearn": lambda: unlearn(make(kind), forget=data, retain=sequences(5), config=method, progress=False),
        "retain unlearn": lambda: unlearn(make(kind), forget=sequences(5), retain=data, config=method, progress=False),
        "forget relearn": lambda: relearn(make(kind), data, attack, evaluate=lambda _: {"forget": 0.0}, progress=False),
        "sequences evaluate": lambda: evaluate(make(kind), data),
        "sequences cache": lambda: cache_teacher(make(kind), data, folder / "cache", progress=False),
        "check cache": lambda: cache_teacher(make(kind), sequences(5), folder / "check", check=data, progress=False),
    }


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_every_face_names_what_the_model_cannot_read(kind, tmp_path):
    assert positions_of(make(kind).config) == 12
    for data, message in (
        (
            sequences(14),
            "got sequences of 14 tokens, of which the last is a label alone, wanted sequences that take at most the model's "
            "12 positions",
        ),
        (sequences(5, 300), "got token id 300, wanted ids below the model's vocabulary of 300"),
        (sequences(5, -1), "got token id -1, wanted ids from 0"),
    ):
        for name, use in uses(kind, data, tmp_path).items():
            with pytest.raises(ValueError, match=f"^{name.split()[0]}: {message}"):
                use()
    assert not (tmp_path / "cache").exists()
    assert evaluate(make(kind), sequences(13))["n"] == 4
    with pytest.raises(ValueError, match=r"^requests\[0\]: got \[3\], \[300\]"):
        log_likelihoods(make(kind), [([3], [300])])


def test_what_has_no_limit_has_none():
    """A model whose limit has another name in its configuration is treated as unlimited; transformers fails beyond it."""
    bloom = AutoConfig.for_model("bloom", vocab_size=300, hidden_size=16, n_layer=1, n_head=2)
    assert positions_of(bloom) is None and positions_of(AutoConfig.for_model("mamba")) is None
    config = AutoConfig.for_model("mpt", **MODELS["mpt"], vocab_size=300)
    assert positions_of(config) == 12
    limits = dataclasses.replace(limits_of(make("llama")), positions=None)
    limits.check_sequences(sequences(4000), "rows")


def test_a_teacher_reads_the_text_too():
    short = build_model({"model_type": "gpt2", **TINY, "n_positions": 8}, tokenizer_of("padded"), 0)
    with pytest.raises(ValueError, match=r"^text: got sequences of 10 tokens.* the model's 8 positions"):
        distill(make("gpt2"), short, sequences(10), SHORT, progress=False)


def test_rmu_reads_the_last_token_too():
    config = UnlearnConfig("rmu", train=SHORT, rmu=RMUConfig(target_layer=1))
    with pytest.raises(
        ValueError, match=r"^forget: got sequences of 13 tokens, wanted sequences that take at most the model's 12 positions"
    ):
        unlearn(make("llama"), forget=sequences(13), retain=sequences(12), config=config, progress=False)
    unlearn(make("llama"), forget=sequences(12), retain=sequences(12), config=config, progress=False)
