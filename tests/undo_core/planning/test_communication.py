"""The bytes between ranks that the formulas predict are those that processes with gloo move."""

import collections
import multiprocessing
import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from undo_kernels import backend
from undo_kernels.ops import linear_kl_div
from wire import CountCollectives

from undo_core.planning.communication import (
    Collective,
    Unit,
    fsdp_collectives,
    head_collectives,
    padded,
    units_of,
    wire_bytes,
)


class Tied(nn.Module):
    """Two layers of odd sizes, a frozen one, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 6, bias=False), nn.Linear(6, 6))
        self.layers[2].requires_grad_(False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embedding(ids)))


LAYERS = ["layers.0", "layers.1", "layers.2"]


def counted(collectives: list[Collective]) -> collections.Counter:
    found = collections.Counter()
    for one in collectives:
        found[one.kind, one.payload] += one.calls
    return found


def on_rank(rank: int, ranks: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for trained, passes in ((True, 1), (True, 3), (False, 2)):
        torch.manual_seed(0)
        model = Tied()
        expected = fsdp_collectives(units_of(model, LAYERS), ranks, itemsize=2, passes=passes, trained=trained)
        for name in LAYERS:
            fully_shard(model.get_submodule(name), mp_policy=policy, reshard_after_forward=True)
        fully_shard(model, mp_policy=policy)
        with CountCollectives() as moved, torch.set_grad_enabled(trained):
            for _ in range(passes):
                loss = model(torch.arange(8)).float().square().mean()
                if trained:
                    loss.backward()
                else:
                    model.reshard()
        assert moved.found == counted(expected), (trained, passes, moved.found, expected)
    head_on_rank(ranks)
    dist.destroy_process_group()


def head_on_rank(ranks: int) -> None:
    """A distillation loss on a head of 11 entries, which two ranks divide unevenly, and on the trunk's hidden states."""
    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    student, teacher = (distribute_tensor(torch.randn(11, 6), mesh, [Shard(0)]) for _ in range(2))
    hidden, target = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6)
    with CountCollectives() as moved, backend("cpu"):
        for _ in range(2):
            linear_kl_div(hidden, student.requires_grad_(), target, teacher, plan="recompute").backward()
    expected = counted(head_collectives("forward", tokens=5, width=6, ranks=ranks, calls=2))
    assert moved.found == expected, (moved.found, expected)


def test_fully_sharded_passes_move_what_is_predicted(tmp_path):
    """The processes are forked before any thread has started, after the slow imports."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, str(tmp_path / "store")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "[0, 0]\n"), done.stderr


def test_a_parameter_is_padded_to_whole_shards():
    assert padded([(11, 6), (7,)], 2) == 12 * 6 + 8 and padded([(8, 3)], 8) == 24 and padded([(1, 5)], 4) == 20


def test_units_hold_each_parameter_once():
    units = units_of(Tied(), LAYERS)
    assert units == [
        Unit("layers.0", ((7, 6), (7,))),
        Unit("layers.1", ((6, 7),)),
        Unit("layers.2", (), ((6, 6), (6,))),
        Unit("", ((11, 6),), gathered=True),
    ]


def test_a_ring_sends_what_the_definition_of_the_collectives_needs():
    """Each rank lacks all shards but its own; an all-reduce is a reduce-scatter and an all-gather."""
    assert Collective("all_gather", "", 800, 4, calls=2).wire == 2 * 600
    assert Collective("all_reduce", "", 800, 4).wire == 2 * 600
    assert wire_bytes([Collective("reduce_scatter", "", 800, 8), Collective("all_gather", "", 800, 1)]) == 700


def test_a_parallel_head_moves_nothing_of_the_size_of_the_vocabulary():
    """A maximum of student and teacher, six sums and a loss for each token, in float64, and the hidden gradient in float32."""
    found = head_collectives("forward", tokens=10, width=6, ranks=2, calls=3)
    assert counted(found) == {("all_reduce", 160): 3, ("all_reduce", 480): 3, ("all_reduce", 80): 3, ("all_reduce", 240): 3}
    assert wire_bytes(head_collectives("forward", tokens=10, width=6, ranks=2, gradient=False)) == 720


def test_one_rank_sends_nothing():
    model = Tied()
    assert wire_bytes(fsdp_collectives(units_of(model, LAYERS), 1, itemsize=4)) == 0
    assert wire_bytes(head_collectives("forward", 10, 6, 1)) == 0


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=on_rank, args=(rank, 2, sys.argv[1])) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print([worker.exitcode for worker in workers])
