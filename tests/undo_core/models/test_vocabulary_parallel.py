"""Models whose head is shared among processes; ``support/parallel_head_models.py`` is what two and four processes run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rounding import PATH, gamma
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from undo_core import ops, parallelize_head
from undo_core.models import head_of, hidden_states

PROGRAM = Path(__file__).resolve().parents[2] / "support" / "parallel_head_models.py"


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def make(tied=True, dtype=torch.float32):
    config = AutoConfig.for_model(
        "llama", vocab_size=67, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)


@pytest.mark.parametrize("tied", [True, False])
def test_a_mesh_of_one_process_changes_no_bit(mesh, tied):
    ids = torch.arange(24).view(2, 12)
    found = []
    for model in (make(tied), parallelize_head(make(tied), mesh)):
        head = head_of(model)
        loss = ops.linear_cross_entropy(hidden_states(model, ids), head.weight, ids, plan="recompute", **head.options())
        loss.backward()
        gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        found.append([loss.detach(), model(input_ids=ids).logits.detach(), *gradients])
    assert isinstance(model.lm_head.weight, DTensor) and (model.get_input_embeddings().weight is model.lm_head.weight) == tied
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_cannot_be_shared_is_refused(mesh):
    model = parallelize_head(make(), mesh)
    with pytest.raises(ValueError, match=r"^model: got an output layer that is sharded already"):
        parallelize_head(model, mesh)
    with pytest.raises(ValueError, match=r"^mesh: got a mesh of 2 dimensions"):
        parallelize_head(make(), DeviceMesh("cpu", [[0]]))
    other = make()
    other.lm_head = torch.nn.Sequential(other.lm_head)
    with pytest.raises(ValueError, match=r"^model: got an output layer that is a Sequential"):
        parallelize_head(other, mesh)


@pytest.mark.distributed_long
@pytest.mark.parametrize("world", [2, 4])
def test_gradients_are_those_of_the_whole_model(world, tmp_path):
    """On a mesh of one dimension, and on one of two with FSDP2 over the other; tied and untied; compared with float64."""
    done = subprocess.run([sys.executable, PROGRAM, str(world), tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(world):
        said = json.loads((tmp_path / f"out.{rank}").read_text())
        assert len(said) == (4 if world == 2 else 8)
        for case, errors in said.items():
            assert errors["loss"] < gamma(PATH) and errors["logits"] < 1e-5, (case, errors["loss"], errors["logits"])
            for name, ours in errors["ours"].items():
                assert ours <= 2 * errors["plain"][name] + gamma(PATH), (case, name, ours, errors["plain"][name])
