"""Noise on the shards of a DTensor has the bits of the noise on the whole: two, three and four processes, no network."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from undo_kernels.library.backends import implementation
from undo_kernels.noise_segments import Segment
from undo_kernels.ops.sharding import local_pieces

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import copy
import multiprocessing
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import AutoConfig, AutoModelForCausalLM
from undo_core import noise_ as damage
from undo_kernels.library.backends import implementation
from undo_kernels.noise_segments import Segment
from undo_kernels.ops import noise_
from undo_kernels.ops.noise import apply
from undo_kernels.ops.sharding import local_pieces


def work(rank, world, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    line = init_device_mesh("cpu", (world,))
    # shape, mesh, placements, pieces on each rank (None: any number)
    cases = [
        ((7, 5), line, [Shard(0)], 1),
        ((7, 5), line, [Shard(1)], 1),
        ((1, 6), line, [Shard(0)], None),  # ranks without elements
        ((5,), line, [Shard(0)], None),
        ((4, 6), line, [Replicate()], 1),
        ((3, 5, 4), line, [Shard(1)], 1),
        ((3, 5, 7), line, [Shard(2)], 1),
    ]
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2))
        cases += [
            ((7, 5), grid, [Shard(0), Shard(1)], 1),
            ((7, 5), grid, [Shard(1), Shard(0)], 1),
            ((9, 4), grid, [Shard(0), Shard(0)], 1),
            ((7, 5), grid, [Replicate(), Shard(1)], 1),
            ((3, 5, 6), grid, [Shard(1), Shard(2)], 3),
            ((8, 3), grid, [_StridedShard(0, split_factor=2), Shard(0)], 1),
            ((8, 3), grid, [_StridedShard(0, split_factor=4), Replicate()], 4),
            ((2, 8, 3), grid, [_StridedShard(1, split_factor=4), Replicate()], 8),
        ]

    noise = implementation("noise_", torch.device("cpu"))
    for shape, mesh, placements, pieces in cases:
        for dtype in (torch.float32, torch.bfloat16):
            for law, scale in (("uniform", 1e-8), ("normal", 0.1), ("elements", 0.25)):
                target = torch.randn(shape, generator=torch.Generator().manual_seed(1)) if law == "elements" else None
                whole = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
                shards = distribute_tensor(whole, mesh, placements)
                found = local_pieces("w", shards)
                wanted, got = (apply({"w": t}, alpha=0.0, beta=0.0, seed=1)["w"][1] for t in (whole, shards))
                # Squares are rounded in float32 and added in float64, in shards in another order.
                torch.testing.assert_close(got, wanted, rtol=32 * 2**-24, atol=0)
                assert pieces in (None, len(found)) or not shards.to_local().numel(), (shape, placements, found)
                local = shards.to_local()
                assert sum(view.numel() for view, *_ in found) == local.numel()
                if found:
                    noise([Segment(view, "w", law, 0.75, scale, *where, target) for view, *where in found], 3, True)
                noise([Segment(whole, "w", law, 0.75, scale, target=target)], 3, True)
                full = shards.full_tensor()
                assert torch.equal(full, whole), (shape, placements, dtype, law)
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))  # a shard that is not contiguous
    local = distribute_tensor(whole, line, [Shard(0)]).to_local()
    strided = torch.empty(8, len(local)).T.copy_(local)
    shards = DTensor.from_local(strided, line, [Shard(0)], shape=whole.shape, stride=whole.stride())
    assert len(local) < 2 or not strided.is_contiguous()
    for tensors in ({"w": shards}, {"w": whole}):
        noise_(tensors, alpha=0.25, beta=0.5, seed=3)
    assert torch.equal(shards.full_tensor(), whole)
    torch.manual_seed(0)  # a Hugging Face model, whose initial values are read off its class: A_log of every element its own
    config = AutoConfig.for_model("mamba", vocab_size=30, hidden_size=5, intermediate_size=10, num_hidden_layers=1, state_size=3)
    model = AutoModelForCausalLM.from_config(config)
    sharded = copy.deepcopy(model)
    for part in (*sharded.backbone.layers, sharded):
        fully_shard(part, mesh=line)
    reports = [damage(each, alpha=0.5, seed=1) for each in (model, sharded)]
    assert reports[0].keys() == reports[1].keys() and not reports[1].left
    for (name, p), q in zip(model.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(p, q.full_tensor()), name
    try:
        local_pieces("w", DTensor.from_local(torch.ones(4, 4), line, [Partial()]))
    except ValueError as error:
        assert str(error).startswith("tensors['w']: got a DTensor with placement "), error
    else:
        raise AssertionError("Partial was taken")
    if world == 4:  # what FSDP2 over tensor parallelism makes
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        torch.manual_seed(0)
        layer = torch.nn.Linear(6, 8)
        whole = {name: p.detach().clone() for name, p in layer.named_parameters()}
        parallelize_module(layer, grid["tensor"], ColwiseParallel())
        fully_shard(layer, mesh=grid["data"])
        assert isinstance(layer.weight.placements[0], _StridedShard), layer.weight.placements
        for tensors in (layer, whole):
            noise_(tensors, alpha=0.25, beta=0.5, seed=3, toward=1.0)
        assert all(torch.equal(p.detach().full_tensor(), whole[name]) for name, p in layer.named_parameters())
    dist.destroy_process_group()


context = multiprocessing.get_context("fork")  # the slow imports are done once, and no thread has started
for world in (2, 3, 4):
    workers = [context.Process(target=work, args=(rank, world, f"{sys.argv[1]}/{world}")) for rank in range(world)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit(f"{world} processes: exit codes {[worker.exitcode for worker in workers]}")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_shards_have_the_bits_of_the_whole(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_a_plain_tensor_is_one_piece():
    tensor = torch.nn.Parameter(torch.ones(3, 4))
    ((view, *where),) = local_pieces("w", tensor)
    assert view.data_ptr() == tensor.data_ptr() and view.shape == (3, 4) and where == [0, 0, 0]
    implementation("noise_", view.device)([Segment(view, "w", "uniform", 0.5, 1e-8, *where)], 1, True)
    assert not torch.equal(tensor, torch.ones(3, 4))
