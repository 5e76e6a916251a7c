"""An error on one rank, at any point, ends all ranks, with one message."""

import os
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from rank_cases import pretraining, untied
from ranks import on_ranks
from tiny_run import write_run

from undo_core import distributed
from undo_core.cli import main
from undo_core.distributed import ranks
from undo_core.training import Batch, TrainConfig
from undo_core.training.optimizers import Updater


def fail_once(where):
    """Has rank 1 raise an error in step 2: in the loss, while rank 0 waits in a collective, or in the optimizer's step."""
    if distributed.rank() == 0:
        return
    from undo_core.pipeline.stages import pretrain

    calls, raised = [], RuntimeError(f"broken {where}")

    def breaking(function):
        def call(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise raised
            return function(*arguments)

        return call

    if where == "loss":
        pretrain.next_token_loss = breaking(pretrain.next_token_loss)
    else:
        Updater.step = breaking(Updater.step)


def run_command(folder, where):
    """Runs the command as torchrun would; it ends the process where it fails."""
    sys.stderr = open(folder / f"said-{distributed.rank()}", "w")  # noqa: SIM115
    fail_once(where)
    main(["run", str(folder / "base.yaml"), f"--output={folder / 'out'}"])


@pytest.mark.parametrize("where", ["loss", "step"])
def test_an_error_on_one_rank_in_a_step_ends_all_with_one_message(tmp_path, where):
    write_run(tmp_path, steps=6)
    began = time.monotonic()
    with pytest.raises(AssertionError, match="it died"):
        on_ranks(2, run_command, tmp_path, where, kill=False)
    assert time.monotonic() - began < 120, "a rank waits for the other"
    said = [(tmp_path / f"said-{rank}").read_text().splitlines() for rank in (0, 1)]
    said = [[line for line in lines if line.startswith("undo: ")] for lines in said]
    assert said == [[], [f"undo: failed: rank 1 of 2: RuntimeError: broken {where}"]]


def die_as_rank_1(make):
    """Has rank 1 end where it would connect to the others."""

    def dying(*arguments, **settings):
        if dist.get_rank() == 1:
            os._exit(9)
        return make(*arguments, **settings)

    return dying


def test_a_rank_that_ends_while_all_connect_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(ranks, "FORMING", timedelta(seconds=2))
    monkeypatch.setattr(dist, "new_group", die_as_rank_1(dist.new_group))
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1 of 2 failed:\nit died|rank 0 of 2 lost another rank, which was killed"):
        on_ranks(2, int, kill=False)
    assert time.monotonic() - began < 60, "a rank waits for the other"


def late_sum():
    time.sleep(3.0 * distributed.rank())
    return sum(distributed.gather(distributed.rank()))


def test_ranks_that_have_connected_wait_for_one_another(monkeypatch):
    monkeypatch.setattr(ranks, "FORMING", timedelta(seconds=1))
    assert on_ranks(2, late_sum) == [1, 1]


def shrinking(step):
    ids = torch.randint(2, 17, (8 if step == 0 else 1, 10), generator=torch.Generator().manual_seed(step))
    return Batch(ids, ids > 0)


def small_batch():
    with pytest.raises(ValueError) as error:
        pretraining(untied(), TrainConfig(steps=3, batch_size=8), source=shrinking)
    return str(error.value)


def test_a_batch_smaller_than_the_ranks_is_refused_alike_by_all():
    said = on_ranks(2, small_batch)
    assert said == ["batch: got a micro-batch of 1 sequences on 2 ranks, wanted at least one for each"] * 2
