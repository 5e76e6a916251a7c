"""Training on ranks that share a head (``parallel.tensor``): gradients, evaluations and traffic. All cases share two groups of processes."""

import collections
import dataclasses

import pytest
import rank_cases
import torch
from rank_cases import CONFIG, MODELS, STAGES, first_gradients, largest_error, sequences, untied
from ranks import on_ranks
from stage_kinds import NOWHERE
from undo_kernels.ops import dispatch
from wire import CountCollectives

from undo_core import distributed, parallelize_head
from undo_core.data.sequences import Sequences
from undo_core.distributed import ParallelConfig, head_ops
from undo_core.distributed.head_ops import logits_of, most_likely
from undo_core.distributed.sharding import run, shard
from undo_core.distributed.vocabulary import check_shareable
from undo_core.evaluation.metrics import evaluate
from undo_core.models import head_of, hidden_states
from undo_core.models.config import ModelConfig
from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.graph import graph_of
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.stages import Distill, Pretrain, Unlearn
from undo_core.pipeline.sweep import all_stages
from undo_core.planning.communication import exchange_collectives, stage_collectives
from undo_core.unlearning import UnlearnConfig

# One case of each kind of loss and teacher; `make test-distributed` runs all on every model.
TWO = [
    *(("pretrain", model) for model in MODELS),
    ("npo", "demo"),
    ("undial", "untied"),
    ("rmu-all", "demo"),
    ("repnoise", "tied"),
    ("distill-resident", "demo"),
    ("distill-cached", "untied"),
    ("distill-topk", "demo"),
    ("relearn-lora", "tied"),
]
FOUR = [("pretrain", "untied"), ("retain-kl", "demo"), ("simnpo", "tied")]
STEP = dataclasses.replace(CONFIG, batch_size=8)
MICRO = dataclasses.replace(STEP, micro_batch_size=4)
# Stages whose traffic is predicted, by the case that runs them and its model.
PLANNED = {
    ("pretrain", "demo"): Pretrain(train=MICRO, splits=("retain",), prepared=NOWHERE),
    ("maxent", "tied"): Unlearn(config=UnlearnConfig(method="maxent", train=STEP), prepared=NOWHERE, model=NOWHERE),
    ("npo", "untied"): Unlearn(config=UnlearnConfig(method="npo", train=STEP), prepared=NOWHERE, model=NOWHERE),
    ("distill-resident", "demo"): Distill(train=MICRO, recover=None, prepared=NOWHERE, teacher=NOWHERE, student=NOWHERE),
    ("distill-topk", "untied"): Distill(
        train=STEP, recover=None, prepared=NOWHERE, teacher=NOWHERE, student=NOWHERE,
        config=rank_cases.TeacherConfig("topk", k=5),
    ),
}  # fmt: skip


@torch.no_grad()
def scored(model):
    """Sequences that are scored by cross-entropy, by answers, and by choices. Every other answer is the model's own."""
    plain = sequences(15, seed=5)
    answers = torch.zeros(plain.input_ids.shape, dtype=torch.bool)
    answers[:, 3] = True
    own = model.eval()(plain.input_ids[::2, :3].long()).logits[:, -1].argmax(-1)
    plain.input_ids[::2, 3] = own.int()
    at = torch.zeros_like(answers)
    at[torch.arange(15), torch.arange(15) % 3 + 1] = True
    others = torch.randint(2, rank_cases.VOCABULARY, (15, 4), generator=torch.Generator().manual_seed(1))
    right = plain.input_ids[at].long()
    choices = torch.where((others == right[:, None]) | (torch.arange(4) == 1), right[:, None], others)
    return {
        "nats": plain,
        "answers": Sequences(plain.input_ids, 0, answer_mask=answers),
        "choices": Sequences(plain.input_ids, 0, answer_mask=at, choices=choices),
    }


def evaluated(model):
    """Metrics of a model, which several ranks divide among themselves first."""
    parts = scored(model)
    shard(model)
    return {name: evaluate(model, part, batch_size=4)["value"] for name, part in parts.items()}


@torch.no_grad()
def scores_for_the_same_tokens(model, mesh=None):
    """Most likely tokens, and logits of some, of a model whose head is whole, or shared by ranks that all have these tokens."""
    ids = sequences(3).input_ids.long()
    if mesh is not None:
        parallelize_head(model, mesh)
    hidden, head = hidden_states(model, ids).flatten(0, 1), head_of(model)
    return most_likely(hidden, head), logits_of(hidden, head, torch.arange(30)[:, None] * torch.tensor([3, 5]) % 17)


def evaluated_for_the_same_tokens(model, mesh):
    """Metrics of a model whose head is shared by ranks that must all run the same batches."""
    parts = {**scored(model), "unpadded": unpadded(15, seed=5)}
    if mesh is not None:
        parallelize_head(model, mesh)
    return {name: evaluate(model, part, batch_size=5)["value"] for name, part in parts.items()}


@torch.no_grad()
def hooked(model):
    """Hidden states of a model whose embedding has a hook that doubles its output."""
    head_of(model)
    model.eval().get_input_embeddings().register_forward_hook(lambda module, inputs, output: 2 * output)
    shard(model)
    return run(model, hidden_states, sequences(3).input_ids.long())


def looked_up_outside(index):
    """What each rank says of a token that the first one takes from outside the embedding."""
    model = MODELS["tied"]()
    ids = sequences(3).input_ids.long()
    if distributed.rank() == 0:
        ids[0, 0] = index
    shard(model)
    with pytest.raises(IndexError) as error:
        run(model, hidden_states, ids)
    return str(error.value)


def unpadded(count=40, seed=0):
    """Sequences of one length, so that all ranks have as many counted tokens."""
    ids = torch.randint(2, rank_cases.VOCABULARY, (count, 10), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return Sequences(ids, 0)


def moved(case):
    """Collectives of the first step, as counted on this rank, without scalars: how many of each number of bytes."""
    rank_cases.sequences, dispatch._DIRECT = unpadded, {}
    stage, model = PLANNED[case], MODELS[case[1]]()
    config = stage.config.train if isinstance(stage, Unlearn) else stage.train
    ignored = ("c10d.allgather_", "c10d.broadcast_", "_c10d_functional.wait_tensor")
    with CountCollectives(ignored=ignored) as counted:
        STAGES[case[0]](model, config)
    return {what: calls for what, calls in counted.found.items() if what[1] > 8}


def everything(cases, planned):
    """Runs all cases on this rank of groups of two; the results count on rank 0."""
    distributed.arrange(ParallelConfig(tensor=2))
    head_ops.LOGITS = 56  # 6 tokens for 9 entries at a time, 7 for 8
    found = {case: first_gradients(MODELS[case[1]](), STAGES[case[0]]) for case in cases}
    found["evaluated"] = {name: evaluated(model()) for name, model in MODELS.items()}
    shared = untied()
    shard(shared)
    found["rows"] = shared.lm_head.weight.to_local().shape[0], distributed.tensor()
    with pytest.raises(ValueError, match="sharded here"):
        head_of(shared)
    with pytest.raises(ValueError, match=r"parallel\.tensor: got 3 on"):
        distributed.arrange(ParallelConfig(tensor=3))
    same = distributed.layout().mesh["tensor"]
    found["evaluated alike"] = {name: evaluated_for_the_same_tokens(MODELS[name](), same) for name in ("tied", "untied")}
    found["hooked"] = hooked(MODELS["demo"]())
    found["same"] = scores_for_the_same_tokens(MODELS["tied"](), same)
    found["moved"] = {case: moved(case) for case in planned}
    if distributed.count() == 2:  # the ranks of another group would wait for those that fail
        found["outside"] = [looked_up_outside(index) for index in (rank_cases.VOCABULARY, -1)]
    return found if distributed.rank() == 0 else None


@pytest.fixture(scope="module")
def two():
    return on_ranks(2, everything, TWO, list(PLANNED))[0]


@pytest.fixture(scope="module")
def four():
    return on_ranks(4, everything, FOUR, [("pretrain", "demo")])[0]


@pytest.mark.parametrize(("stage", "model"), TWO)
def test_gradients_on_two_ranks_are_those_of_one_process(two, stage, model):
    assert largest_error(two[stage, model], first_gradients(MODELS[model](), STAGES[stage])) < 2e-6


@pytest.mark.parametrize(("stage", "model"), FOUR)
def test_gradients_on_two_groups_of_two_are_those_of_one_process(four, stage, model):
    assert largest_error(four[stage, model], first_gradients(MODELS[model](), STAGES[stage])) < 2e-6


@pytest.mark.parametrize("model", MODELS)
def test_evaluations_are_those_of_one_process(two, four, model):
    wanted = evaluated(MODELS[model]())
    assert 0 < wanted["choices"] < 1 and 0.5 < wanted["answers"] < 1
    for found in (two, four):
        assert found["evaluated"][model] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_ranks_that_must_have_the_same_tokens_evaluate_all_of_them(two, four, model):
    wanted = evaluated_for_the_same_tokens(MODELS[model](), None)
    for found in (two, four):
        assert found["evaluated alike"][model] == pytest.approx(wanted, rel=1e-6)


def test_a_hook_of_the_embedding_runs_once(two):
    torch.testing.assert_close(two["hooked"], hooked(MODELS["demo"]()))


def test_a_token_outside_the_embedding_is_an_error_as_in_torch(two):
    assert two["outside"] == [f"input_ids: got an index outside the embedding of {rank_cases.VOCABULARY} entries"] * 2


def test_ranks_with_the_same_tokens_find_the_same_scores(two):
    likely, logits = scores_for_the_same_tokens(MODELS["tied"]())
    assert torch.equal(two["same"][0], likely)
    torch.testing.assert_close(two["same"][1], logits)


def test_a_rank_holds_its_part_of_the_head(two, four):
    assert (two["rows"], four["rows"]) == ((9, 2), (5, 2))  # of 17 entries


@pytest.mark.parametrize(("ranks", "case"), [*((2, case) for case in PLANNED), (4, ("pretrain", "demo"))])
def test_the_plan_predicts_what_moves(two, four, ranks, case, monkeypatch):
    monkeypatch.setattr(dispatch, "_DIRECT", {})  # the fused backend, which plain PyTorch replaces where the logits are few
    predictor = Predictor(MODELS[case[1]]().config, 10, ranks=ranks, tensor=2, device="cpu")
    wanted = collections.Counter()
    traffic, exchanges = (of(PLANNED[case], torch.float32) for of in (predictor.traffic, predictor.exchanges))
    for one in [*stage_collectives(traffic, ranks), *exchange_collectives(exchanges, 2)]:
        wanted[one.kind, one.payload] += one.calls * (one.ranks > 1)
    if case[0] == "distill-resident":  # the root unit of a teacher, here its norm, is gathered once and stays whole
        wanted["all_gather", 4 * 16] += 1
    assert {2: two, 4: four}[ranks]["moved"][case] == {what: calls for what, calls in wanted.items() if calls and what[1] > 8}


def test_one_process_shares_no_head():
    with pytest.raises(ValueError, match=r"parallel\.tensor: got 2 for a process that runs alone"):
        distributed.arrange(ParallelConfig(tensor=2))
    with pytest.raises(ValueError, match=r"parallel\.tensor: got 0, wanted an integer >= 1"):
        ParallelConfig(tensor=0)
    distributed.arrange(ParallelConfig())
    assert distributed.tensor() == 1


def test_heads_that_cannot_be_shared_are_refused():
    model = MODELS["tied"]()
    model.get_input_embeddings().max_norm = 1.0
    with pytest.raises(ValueError, match="model: got a tied embedding with max_norm"):
        check_shareable(model)
    model = untied()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="model: got an output layer that is a Sequential"):
        check_shareable(model)


def test_the_runs_of_a_sweep_share_no_heads():
    config = RunConfig("a", "out", ModelConfig(config={"model_type": "llama"}), parallel=ParallelConfig(2))
    with pytest.raises(ValueError, match=r"parallel\.tensor: got 2 in a sweep, wanted 1"):
        all_stages(config, graph_of(config), 2)
