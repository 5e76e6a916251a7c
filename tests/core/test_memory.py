import dataclasses
import warnings

import pytest
import torch
from transformers import AutoConfig
from undo_kernels.library import BackendWarning

from undo_core.memory import PARTS, Predictor, meta_model
from undo_core.models import initialise
from undo_core.storages import Storages
from undo_core.training import TrainConfig
from undo_core.training.lean import lean
from undo_core.training.precision import convert_

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def saved_bytes(model, settings, device) -> int:
    """Storages that autograd keeps after a forward pass, the parameters' own left out."""
    convert_(model, settings.precision)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    ids = torch.ones(4, 100, dtype=torch.long, device=device)
    with Storages(PARTS), lean(model.train(), settings), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gemma2", "llama"])  # eager, sdpa
def test_activations_are_those_of_the_real_model(kind, precision, checkpointing):
    config = AutoConfig.for_model(kind, vocab_size=97, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=1, **SHAPE)
    settings = TrainConfig(precision=precision, activation_checkpointing=checkpointing)
    predicted = saved_bytes(meta_model(config), settings, "meta")
    assert predicted == pytest.approx(saved_bytes(initialise(config, 0), settings, "cpu"), rel=0.1)


def test_predictions_run_the_losses_plan_of_the_machine_they_are_for():
    """Not the reference's, which holds every logit; and nothing falls back on the way."""
    config = AutoConfig.for_model(
        "gemma2", vocab_size=50_000, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=1, **SHAPE
    )
    settings = {"train": dataclasses.asdict(TrainConfig(steps=1, batch_size=16))}
    with warnings.catch_warnings():
        warnings.simplefilter("error", BackendWarning)
        peak = Predictor(config, 257, device="cpu")("distill", settings)
    logits = 4 * 16 * 256 * 50_000
    assert 0 < peak.workspace < logits
    assert peak.total - peak.process < 2 * logits  # student's and teacher's
