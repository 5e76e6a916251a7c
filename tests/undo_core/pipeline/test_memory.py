import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from stage_kinds import NOWHERE
from transformers import AutoConfig
from undo_kernels.library.backends import BackendWarning

from undo_core.models import initialise
from undo_core.pipeline.memory import live_tensors, meta
from undo_core.pipeline.memory.live_tensors import LiveTensors
from undo_core.pipeline.memory.meta import meta_model
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.needs import PARTS
from undo_core.pipeline.stages import Distill, Noise, Pretrain
from undo_core.training import TrainConfig
from undo_core.training.memory_savers import lean
from undo_core.training.optimizers import BLOCK_CPU
from undo_core.training.precision import convert_

ROOT = Path(__file__).resolve().parents[3]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def distilled(**train) -> Distill:
    """Returns a distillation that is predicted and not run."""
    inputs = dict.fromkeys(("prepared", "teacher", "student"), NOWHERE)
    return Distill(train=TrainConfig(steps=1, **train), recover=None, **inputs)


def saved_bytes(model, settings, device) -> int:
    """Returns the bytes that autograd keeps after a forward pass, without those of the parameters."""
    convert_(model, settings.precision)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    ids = torch.ones(4, 100, dtype=torch.long, device=device)
    with (
        LiveTensors(PARTS),
        lean(model.train(), settings),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
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
    """The prediction uses the plan of the kernels, not that of the reference, which holds every logit."""
    config = AutoConfig.for_model(
        "gemma2", vocab_size=50_000, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=1, **SHAPE
    )
    stage = distilled(batch_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BackendWarning)
        peak = Predictor(config, 257, device="cpu")(stage, torch.float32)
    logits = 4 * 16 * 256 * 50_000
    assert 0 < peak.workspace < logits
    assert peak.total - peak.process < 2 * logits  # student's and teacher's


def test_vocabulary_entries_that_are_padding_take_no_workspace():
    config = AutoConfig.for_model("llama", vocab_size=20_000, pad_token_id=0, bos_token_id=1, eos_token_id=1, **SHAPE)
    stages = [dataclasses.replace(distilled(batch_size=4), vocab_size=size) for size in (None, 5000)]
    phases = [Predictor(config, 65, device="cpu").phases(stage, torch.float32) for stage in stages]
    whole, part = ({memory.phase: memory.workspace for memory in found}["forward"] for found in phases)
    assert 0 < part < whole


# Compared beyond the process's own memory, for a few quick and different cases. UNDO_ALL_MEMORY=1 runs every one (an
# hour).
QUICK = ["llama: bfloat16-master", "llama: 8-bit", "gemma2: distill, cached"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not count peaks")
def test_predicted_peaks_are_within_a_tenth_of_the_measured():
    cases = [] if os.environ.get("UNDO_ALL_MEMORY") else ["--exact", "--cases", *QUICK]
    command = [sys.executable, "-W", "ignore", str(ROOT / "bench" / "bench_memory.py"), "--json", *cases]
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    records = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert run.returncode == 0 and len(records) >= len(QUICK), run.stderr[-2000:]
    wrong = {r["case"]: r for r in records if not 0.9 <= r["predicted"] / r["measured"] <= 1.1}
    assert not wrong


def test_updates_are_counted_in_their_own_code():
    """An update that is not fused runs block by block; a fused one takes no memory."""
    for optimizer, precision in (("adamw-8bit", "float32"), ("adamw-4bit", "float32"), ("adamw", "bfloat16-stochastic")):
        dtype = torch.bfloat16 if precision == "bfloat16-stochastic" else torch.float32
        taken = [meta._update_bytes(count, dtype, optimizer, precision, "cpu") for count in (1 << 20, 1 << 28)]
        assert 10 * BLOCK_CPU < taken[0] == taken[1] < 90 * BLOCK_CPU, optimizer
    assert meta._update_bytes(1 << 16, torch.float32, "adamw-8bit", "float32", "cuda") == 0
    assert meta._update_bytes(1 << 16, torch.float32, "adamw", "float32", "cpu") == 0


def test_shapes_that_are_known_count_as_those_that_are_computed(monkeypatch):
    config = AutoConfig.for_model(
        "gemma2", vocab_size=5000, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=1, **SHAPE
    )
    stage = distilled(batch_size=4)
    known = Predictor(config, 33, device="cpu").phases(stage, torch.float32)
    monkeypatch.setattr(live_tensors, "_run", lambda function, args, kwargs: function(*args, **kwargs))
    assert Predictor(config, 33, device="cpu").phases(stage, torch.float32) == known


def test_loading_takes_the_file_in_its_own_dtype():
    config = AutoConfig.for_model("llama", vocab_size=5000, pad_token_id=0, bos_token_id=1, eos_token_id=1, **SHAPE)
    sizes = [p.numel() for p in meta_model(config).parameters()]
    trained = Pretrain(train=TrainConfig(precision="bfloat16"), splits=("retain",), prepared=NOWHERE)
    noised = Noise(alpha=0.5, beta=0.1, law="normal", seed=0, model=NOWHERE)
    predict = Predictor(config, 33, device="cpu")
    loading = {dtype: predict.phases(trained, dtype)[0].weights for dtype in (torch.float32, torch.bfloat16)}
    assert loading == {torch.float32: 6 * sum(sizes) + 2 * max(sizes), torch.bfloat16: 4 * sum(sizes)}
    assert predict.phases(noised, torch.bfloat16)[0].weights == 2 * max(sizes), "tensor by tensor"
    assert Predictor(config, 33, device="cuda").phases(noised, torch.float32)[0].total == 0, "on the host"
