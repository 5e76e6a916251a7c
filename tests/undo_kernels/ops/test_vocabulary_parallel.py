"""Losses on a head that is sharded by vocabulary entries, on two and four processes; ``support/vocabulary_parallel.py`` lists the cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from undo_kernels import ops
from undo_kernels.vocabulary_shard import bytes_exchanged

PROGRAM = Path(__file__).resolve().parents[2] / "support" / "vocabulary_parallel.py"


def said_by_all(world, out, which):
    """What each case said on each process, where it did not pass."""
    command = [sys.executable, PROGRAM, str(world), out, which]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    files = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(world)]
    assert len(files[0]) > 3 and all(file.keys() == files[0].keys() for file in files)
    return {f"{name}, process {rank}": text for rank, file in enumerate(files) for name, text in file.items() if text}


def test_on_two_processes(tmp_path):
    failed = said_by_all(2, tmp_path / "out", "essential")
    assert not failed, "\n".join(f"{name}: {text}" for name, text in failed.items())


@pytest.mark.distributed_long
@pytest.mark.parametrize(("world", "which"), [(2, "long"), (4, "essential"), (4, "long"), (2, "triton"), (4, "triton")])
def test_on_more_processes_with_more_options(world, which, tmp_path):
    failed = said_by_all(world, tmp_path / "out", which)
    assert not failed, "\n".join(f"{name}: {text}" for name, text in failed.items())


def test_what_is_exchanged_does_not_depend_on_the_vocabulary():
    """The figures of the guide: a call on 8,192 tokens of width 2,304."""
    found = bytes_exchanged("forward", 8192, 2304, 8)
    assert found == {"maxima": 8192 * 16, "sums": 8192 * 48, "losses": 8192 * 8, "hidden gradient": 8192 * 2304 * 4}
    assert bytes_exchanged("own", 10, 4, 2, labels=True, gradient=False) == {"maxima": 80, "sums": 400}
    assert bytes_exchanged("bucket", 10, 4, 2, known=6)["sums"] == 10 * 8 * 10


def test_a_sharded_head_of_one_process_is_the_whole_head():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        h, w, th, tw = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 301, 5, 301))
        whole = ops.linear_kl_div(h, w, th, tw, plan="recompute")
        sharded = [distribute_tensor(t, mesh, [Shard(0)]) for t in (w, tw)]
        assert torch.equal(ops.linear_kl_div(h, sharded[0], th, sharded[1], plan="recompute"), whole)
    finally:
        if made:
            dist.destroy_process_group()
