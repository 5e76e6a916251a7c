"""Problems from trained models: their hidden states give the models' own logits, from a run's folders or newly trained."""

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch
from rounding import assert_same_function

from undo_core.data.sequences import Sequences
from undo_core.models import load_model

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def activations(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("activations")


@pytest.fixture
def stages(activations, tmp_path):
    """Makes folders like those of a run: prepared data, a teacher and a distilled student."""
    config = activations.AutoConfig.for_model(
        "gemma2", vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, sliding_window=16, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    for seed, name in enumerate(("unlearn-b", "distill-c")):
        activations.initialise(config, seed).save_pretrained(tmp_path / name)
    ids = torch.randint(1, 50, (6, 9), generator=torch.Generator().manual_seed(0))
    ids[2, 5:] = 0
    (tmp_path / "prepare-a" / "data").mkdir(parents=True)
    Sequences(ids.to(torch.int32), pad_id=0).save(tmp_path / "prepare-a" / "data" / "valid_retain.safetensors")
    inputs = {"prepared": {"folder": "prepare-a"}, "teacher": {"folder": "unlearn-b"}, "student": {"folder": "noise-d"}}
    (tmp_path / "distill-c" / "manifest.json").write_text(json.dumps({"kind": "distill", "inputs": inputs}))
    return tmp_path, ids


@torch.no_grad()
def test_captured_states_give_the_models_own_logits(activations, stages, tmp_path):
    folder, ids = stages
    inputs = activations.capture(folder / "distill-c", tokens=30)
    assert inputs.softcap == 30.0 and inputs.student_hidden.shape == (30, 16) and inputs.labels.shape == (30,)
    counted = ((ids[:, :-1] != 0) & (ids[:, 1:] != 0)).flatten()
    for name, (hidden, weight) in {"distill-c": inputs.heads[:2], "unlearn-b": inputs.heads[2:]}.items():
        model = load_model(folder / name).eval()
        wanted = (m(input_ids=ids).logits[:, :-1].flatten(0, 1)[counted][:30] for m in (model, copy.deepcopy(model).double()))
        assert_same_function(30.0 * torch.tanh(hidden @ weight.T / 30.0), *wanted)
    assert torch.equal(inputs.labels, ids[:, 1:].flatten()[counted][:30])
    activations.save(inputs, tmp_path / "inputs.safetensors")
    again = activations.load(tmp_path / "inputs.safetensors").to(torch.bfloat16, "cpu")
    assert again.student_weight.requires_grad and torch.equal(again.teacher_hidden, inputs.teacher_hidden.bfloat16())


def test_a_folder_that_is_no_distill_stage_is_refused(activations, stages):
    folder, _ = stages
    with pytest.raises(
        ValueError, match=r"^--activations: got .*unlearn-b \(no manifest.json\), wanted the folder of a distill"
    ):
        activations.check(folder / "unlearn-b")
    (folder / "prepare-a" / "data" / "valid_retain.safetensors").unlink()
    with pytest.raises(ValueError, match=r"whose valid_retain.safetensors is missing"):
        activations.check(folder / "distill-c")


def test_a_run_on_trained_models_reports_errors_on_them(activations, tmp_path):
    bench = importlib.import_module("bench_kl")
    out = tmp_path / "results.json"
    names = ["--contenders", "undo-core", "products"]
    bench.main(["--quick", "--no-memory", "--rounds", "1", "--activations", *names, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["id"], row["dtype"], row["model"]) for row in rows] == [
        ("captured-f32", "float32", "generated"), ("captured-bf16", "bfloat16", "generated")
    ]  # fmt: skip
    for row, bound in zip(rows, (1e-4, 1e-2), strict=True):
        assert row["captured_loss"] > 0 and row["softcap"] == 30.0
        ours = bench.runner.harness.contender(row, "undo-core")
        assert len(ours["samples_s"]) == 1 and bench.runner.harness.gradient_error(ours) < bound
