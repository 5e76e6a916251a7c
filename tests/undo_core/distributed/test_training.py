"""Training on two ranks: gradients, curves and resumed runs are those of one process. All cases share one pair of processes."""

import collections
import dataclasses
import functools
import json

import pytest
import torch
from rank_cases import CONFIG, MODELS, STAGES, first_gradients, largest_error, pretraining, sequences, untied
from ranks import on_ranks
from stage_kinds import NOWHERE
from torch.distributed.tensor import distribute_tensor
from wire import CountCollectives

from undo_core import distributed
from undo_core.distributed.sharding import shard, whole_state
from undo_core.evaluation.metrics import evaluate
from undo_core.models import head_of
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.stages import Distill, Unlearn
from undo_core.planning.communication import stage_collectives
from undo_core.training import TrainConfig
from undo_core.training.batches import SequenceSource
from undo_core.training.optimizers import Updater
from undo_core.training.precision import weight_dtype
from undo_core.training.sharded import check_ranks, sharded
from undo_core.unlearning import UnlearnConfig

# One case of each kind of loss, teacher and attack; `make test-distributed` runs all on every model.
CASES = [
    *(("pretrain", model) for model in MODELS),
    ("npo", "demo"),
    ("rmu-sequence", "tied"),
    ("sam", "untied"),
    ("repnoise", "untied"),
    ("cir", "tied"),
    ("ilu", "untied"),
    ("distill-resident", "tied"),
    ("distill-cached", "demo"),
    ("distill-on-policy", "demo"),
    ("relearn-lora", "untied"),
]
MICRO = dataclasses.replace(CONFIG, micro_batch_size=4)
# With a large eps AdamW's step is smooth in the gradient; with a small one the rounding of a gradient near 0 moves a weight by lr.
CURVE = TrainConfig(steps=4, batch_size=8, lr=1e-2, eps=1e-2, clip=0.5, eval_every=2, seed=1)
MASTERED = dataclasses.replace(CURVE, precision="bfloat16-master")
STOCHASTIC = dataclasses.replace(CURVE, precision="bfloat16-stochastic")
BOUNDS = {"float32": (CURVE, 1e-5), "bfloat16-master": (MASTERED, 2**-7), "bfloat16-stochastic": (STOCHASTIC, 2**-5)}


class Killed(SequenceSource):
    """A source that ends the run at step 2."""

    def __call__(self, step):
        if step == 2:
            raise KeyboardInterrupt
        return super().__call__(step)


def curve(config, folder, killed=False):
    """Trains, or is killed in step 2; returns the weights and the history."""
    model = untied()
    more = {"evaluate": lambda model: {"nats": evaluate(model, sequences(seed=5), batch_size=16)["value"]}}
    kind = Killed if killed else SequenceSource
    try:
        result = pretraining(model, config, source=kind(sequences(), config.batch_size, 0), folder=folder,
                             checkpoint_seconds=-1.0, **more)  # fmt: skip
    except KeyboardInterrupt:
        return None
    state = model.state_dict() if distributed.count() == 1 else whole_state(model, weight_dtype(config.precision))
    return state, result.history


def stochastic(seed=3):
    """Whole weights after three updates with gradients that do not depend on the number of ranks; blocks of 100 elements."""
    model, config = untied(), TrainConfig(precision="bfloat16-stochastic", lr=1e-2, seed=seed, clip=0.0)
    trained = list(model.parameters())
    trained = trained if distributed.count() == 1 else sharded(model, trained, config)
    updater = Updater(model, trained, config)
    (optimizer,) = updater.parts
    optimizer.block = 100  # no shard begins with a block
    for step in range(3):
        updater.begin(step, config.lr)
        for number, parameter in enumerate(trained):
            generator = torch.Generator().manual_seed(10 * step + number)
            gradient = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
            parameter.grad = (
                distribute_tensor(gradient, parameter.device_mesh, parameter.placements) if updater.sharded else gradient
            )
        updater.step()
    return whole_state(model) if updater.sharded else model.state_dict()


def outside(model):
    """What reading the head of a sharded model outside a forward pass raises."""
    shard(model)
    with pytest.raises(ValueError, match="head") as raised:
        head_of(model)
    return str(raised.value)


# Stages whose traffic is predicted, by the case that runs them.
PLANNED = {
    "maxent": Unlearn(config=UnlearnConfig(method="maxent", train=CONFIG), prepared=NOWHERE, model=NOWHERE),
    "rmu": Unlearn(config=UnlearnConfig(method="rmu", train=MICRO), prepared=NOWHERE, model=NOWHERE),
    "distill-resident": Distill(train=MICRO, recover=None, prepared=NOWHERE, teacher=NOWHERE, student=NOWHERE),
}


def moved(case):
    """All-gathers and reduce-scatters of the first step, as counted: how many of each number of bytes."""
    with CountCollectives(ignored=("c10d.allgather_", "c10d.broadcast_")) as found:
        STAGES[case](untied(), PLANNED[case].training)
    return {what: calls for what, calls in found.found.items() if what[0] != "all_reduce"}


def everything(folder):
    """Runs all cases on this rank; the results count on rank 0."""
    found = {case: first_gradients(MODELS[case[1]](), STAGES[case[0]]) for case in CASES}
    found["micro"] = first_gradients(untied(), pretraining, MICRO)
    for name, (config, _) in BOUNDS.items():
        found[name] = curve(config, None)
        curve(config, folder / f"{name}-killed", killed=True)
        found[f"{name}-resumed"] = curve(config, folder / f"{name}-killed")
    curve(CURVE, folder / "to-one", killed=True)
    found["stochastic"] = stochastic()
    found["moved"] = {case: moved(case) for case in PLANNED}
    found["outside"] = outside(untied())
    found["from-one"] = curve(CURVE, folder / "from-one")
    found["alone"] = distributed.on_first(lambda: (distributed.rank(), distributed.count()))
    return found if distributed.rank() == 0 else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder):
    """Results of two ranks."""
    curve(CURVE, folder / "from-one", killed=True)
    return on_ranks(2, everything, folder)[0]


@functools.cache
def alone(config):
    """Weights and history of one process."""
    return curve(config, None)


@pytest.mark.parametrize(("stage", "model"), CASES)
def test_gradients_are_those_of_one_process(two, stage, model):
    assert largest_error(two[stage, model], first_gradients(MODELS[model](), STAGES[stage])) < 2e-6


def test_micro_batches_are_shared_out(two):
    assert largest_error(two["micro"], first_gradients(untied(), pretraining, MICRO)) < 2e-6


@pytest.mark.parametrize("name", BOUNDS)
def test_curves_agree_to_rounding(two, name):
    config, bound = BOUNDS[name]
    state, history = alone(config)
    assert largest_error(two[name][0], state) < bound
    assert [entry["step"] for entry in two[name][1]] == [entry["step"] for entry in history]
    for got, wanted in zip(two[name][1], history, strict=True):
        assert got["nats"] == pytest.approx(wanted["nats"], rel=bound)
        assert got.get("loss", 0) == pytest.approx(wanted.get("loss", 0), rel=bound)


def test_stochastic_rounding_draws_the_bits_of_one_process(two):
    wanted = stochastic()
    assert all(torch.equal(two["stochastic"][name], tensor) for name, tensor in wanted.items())
    other = stochastic(seed=4)
    assert not any(torch.equal(other[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("name", BOUNDS)
def test_killed_on_two_ranks_it_ends_with_the_same_bits(two, name):
    (state, history), (resumed, again) = two[name], two[f"{name}-resumed"]
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in state.items()) and history == again


def test_a_run_continues_on_another_number_of_ranks(two, folder):
    state, history = alone(CURVE)
    (checkpoint,) = (folder / "to-one" / "checkpoint").iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["step"] == 2
    for got, entries in (two["from-one"], curve(CURVE, folder / "to-one")):
        assert largest_error(got, state) < 1e-5
        assert [entry["nats"] for entry in entries] == pytest.approx([entry["nats"] for entry in history], rel=1e-5)


@pytest.mark.parametrize("case", PLANNED)
def test_the_plan_predicts_what_moves(two, case):
    model = untied()
    traffic = Predictor(model.config, 10, ranks=2)._predicted(PLANNED[case], torch.float32)[1]
    wanted = collections.Counter()
    for one in stage_collectives(traffic, 2):
        wanted[one.kind, one.payload] += one.calls
    if case == "distill-resident":  # the root unit of a teacher is gathered once and stays whole
        head, embedding, norm = (17 + 1) * 16, (17 + 1) * 16, 16
        wanted["all_gather", 4 * (head + embedding + norm)] += 1
    assert two["moved"][case] == wanted


def test_a_sharded_head_is_not_read_outside_a_forward_pass(two):
    assert "sharded" in two["outside"]


def test_rank_0_acts_as_if_alone(two):
    assert two["alone"] == (0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw-8bit"}, "optimizer: got adamw-8bit on 2 ranks"),
        ({"optimizer": "adafactor"}, "optimizer: got adafactor on 2 ranks"),
        ({"optimizer": "adamw-offload"}, "optimizer: got adamw-offload on 2 ranks"),
        ({"step_in_backward": True}, "step_in_backward: got true on 2 ranks"),
        ({"micro_batch_size": 1}, "micro_batch_size: got micro-batches of 1 sequences on 2 ranks"),
        ({"micro_batch_size": 7}, "micro_batch_size: got micro-batches of 1 sequences on 2 ranks"),  # 8 = 7 + 1
    ],
)
def test_what_does_not_work_on_shards_is_refused(changes, message):
    config = TrainConfig(batch_size=8, **changes)
    check_ranks(config, [8], 1)
    with pytest.raises(ValueError, match=message):
        check_ranks(config, [8], 2)
