"""An error on one rank, at any point, ends all ranks, with one message."""

import sys
import time

import pytest
import torch
from rank_cases import pretraining, untied
from ranks import on_ranks
from tiny_run import write_run

from undo_core import distributed
from undo_core.cli import main
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
