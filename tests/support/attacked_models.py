"""Small models to attack, a short attack, and how its result is measured."""

import importlib.util

import pytest
import torch
from stage_kinds import NOWHERE

from undo_core.attacks import AttackConfig
from undo_core.evaluation.metrics import evaluate
from undo_core.pipeline.attacked_model import trial_stage

peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
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
BASE = AttackConfig(rates=[3e-3], evaluate_at=[0, 60], headline_step=60, extend=0, batch_size=25)


def stage_of(config, trial):
    """Returns the stage that makes a trial."""
    return trial_stage(config, trial, NOWHERE, NOWHERE, "")


def accuracies(world):
    """Returns what evaluates a model on the forget and retain sequences of the fixture ``world``."""
    _, forget, retain, _, _ = world
    return lambda model: {"forget": evaluate(model, forget)["value"], "retain": evaluate(model, retain)["value"]}


def weights(model):
    """Returns all weights of a model in one tensor."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
