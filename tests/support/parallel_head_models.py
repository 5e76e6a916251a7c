"""Transformers models whose head is shared among processes: run as ``python parallel_head_models.py WORLD OUT``.

Each process writes to the file OUT.RANK, as JSON, how far its gradients are from those of the whole model in float64, by case and by
parameter, and by how much those of the whole model in float32 are.
"""

import json
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
from gloo_processes import forked
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from undo_core import ops, parallelize_head
from undo_core.models import head_of

VOCABULARY = 67  # a prime: no number of processes divides it
MODELS = (("gemma2", True), ("gemma3_text", True), ("llama", True), ("llama", False))


def make(kind, tied, seed=0):
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, tie_word_embeddings=tied, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def batch(rows):
    ids = torch.randint(0, VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(1))
    ids[0, 3:7] = torch.tensor([0, 34, 17, 51])  # padding's id, and the first entries of other processes
    return ids


def loss_of(model, ids, teacher, count):
    """Distillation and cross-entropy on the same products, over so many tokens in all; a method, so that FSDP2 can wrap it."""
    head, other = head_of(model), head_of(teacher)
    with torch.no_grad():
        teacher_hidden = teacher.base_model(ids).last_hidden_state
    return ops.linear_kl_div(
        model.base_model(ids).last_hidden_state, head.weight, teacher_hidden, other.weight, labels=ids.roll(-1, 1), label_weight=0.5,
        normalizer=float(count), plan="direct" if head.weight.dtype == torch.float64 else "recompute", **head.options("student_"),
        **other.options("teacher_"),
    )  # fmt: skip


def gradients(model):
    return {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in model.named_parameters()}


def errors(found, exact):
    return {name: float((found[name].double() - want).norm() / want.norm().clamp_min(1e-30)) for name, want in exact.items()}


def whole(kind, tied, dtype, ids):
    model, teacher = make(kind, tied).to(dtype), make(kind, tied, 1).to(dtype)
    loss = loss_of(model, ids, teacher, ids.numel())
    loss.backward()
    return loss.item(), gradients(model), model(ids).logits.detach()


def sharded(kind, tied, mesh):
    model, teacher = (parallelize_head(make(kind, tied, seed), mesh) for seed in (0, 1))
    ids = batch(4)
    loss = loss_of(model, ids, teacher, ids.numel())
    loss.backward()
    assert isinstance(model.lm_head.weight.grad, DTensor)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    return loss.item(), gradients(model), model(ids).logits.detach()


def sharded_twice(kind, tied, mesh):
    """Data-parallel over one dimension of the mesh, with FSDP2, and vocabulary-parallel over the other."""
    model, teacher = (parallelize_head(make(kind, tied, seed), mesh["tensor"]) for seed in (0, 1))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    for module in (model, *model.model.layers):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no product before the sum
    try:
        head_of(model)
    except ValueError as error:  # FSDP has not gathered it here
        assert "whose head is sharded" in str(error), error
    else:
        raise AssertionError("the head was read outside of the forward pass")
    model.loss = types.MethodType(loss_of, model)
    register_fsdp_forward_method(model, "loss")
    ids = batch(4)
    own = ids.chunk(mesh["data"].size())[mesh["data"].get_local_rank()]
    loss = model.loss(own, teacher, ids.numel())
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=mesh["data"].get_group())
    return total.item(), gradients(model), model(own).logits.detach()


def work(line, out):
    world, said = line.size(), {}
    grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor")) if world > 2 else None
    for kind, tied in MODELS:
        value, exact, _ = whole(kind, tied, torch.float64, batch(4))
        _, plain, logits = whole(kind, tied, torch.float32, batch(4))
        for name, run, mesh in (("tensor", sharded, line), ("data and tensor", sharded_twice, grid)):
            if mesh is None:
                continue
            got, found, own = run(kind, tied, mesh)
            part = logits if run is sharded else logits.chunk(2)[mesh["data"].get_local_rank()]
            said[f"{kind}, {'tied' if tied else 'untied'}, {name}"] = {
                "loss": abs(got - value) / value,
                "logits": float((own - part).abs().max()),
                "ours": errors(found, exact),
                "plain": errors(plain, exact),
            }
    Path(f"{out}.{dist.get_rank()}").write_text(json.dumps(said))


if __name__ == "__main__":
    sys.exit(forked(int(sys.argv[1]), work, sys.argv[2]))
