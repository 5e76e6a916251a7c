"""Isolated documents in a packed sequence give the same results as each document alone, everywhere a model runs."""

import copy
import dataclasses

import pytest
import torch
from rounding import assert_same_function
from transformers import AutoConfig, AutoModelForCausalLM

from undo_core.data.sequences import Sequences
from undo_core.data.text import pack
from undo_core.distillation.cache import cache_teacher
from undo_core.distillation.student import distill
from undo_core.distillation.teacher import ModelTeacher, TeacherConfig
from undo_core.evaluation.metrics import evaluate
from undo_core.models import check_isolation, head_of, hidden_states, initialise, load_model
from undo_core.training import Batch, TrainConfig
from undo_core.training.batches import as_batch, sequence_source
from undo_core.training.losses import cross_entropy, uniform_kl
from undo_core.unlearning import RMUConfig, UnlearnConfig, unlearn
from undo_core.unlearning.activations import Trunk

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MODELS = {
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},  # shorter than the documents
    "llama": {},
    "qwen3": {},
}
SEPARATOR, PAD = 1, 0
generator = torch.Generator().manual_seed(0)
DOCUMENTS = [torch.randint(2, 50, (n,), generator=generator).tolist() for n in (5, 9, 1, 7, 12, 3, 6, 4, 8, 2)]


def make(kind, seed=0, attention=None):
    model = initialise(AutoConfig.for_model(kind, **SHAPE, **MODELS[kind]), seed)
    with torch.no_grad():  # at the usual scale attention moves little
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    if attention:
        model.set_attn_implementation(attention)
    return model.eval()


@pytest.fixture(params=[("gemma2", "eager"), ("llama", "sdpa"), ("llama", "eager"), ("qwen3", "sdpa")], ids="-".join)
def model(request):
    return make(request.param[0], 0, request.param[1])


@pytest.fixture
def sequences():
    return pack(DOCUMENTS, 16, SEPARATOR, PAD, isolated=True)


def spans(sequences):
    """Yields the sequence, first and last position of each piece of a document, with its separator and following padding."""
    for sequence, positions in enumerate(sequences.position_ids().tolist()):
        starts = [i for i, position in enumerate(positions) if position == 0]
        yield from ((sequence, a, b) for a, b in zip(starts, [*starts[1:], len(positions)], strict=True))


def test_positions_start_again_at_each_separator(sequences):
    packed = pack([[5, 6], [], [7, 7, 5, 6, 7, 8], [5, 6, 7]], 8, 1, 0, isolated=True)
    assert packed.input_ids.tolist() == [[1, 5, 6, 1, 1, 7, 7, 5], [6, 7, 8, 1, 5, 6, 7, 1]]
    assert packed.position_ids().tolist() == [[0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2, 3, 0]]
    assert packed.position_ids(torch.tensor([1])).tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert pack(DOCUMENTS, 16, SEPARATOR, PAD).position_ids() is None
    other = pack([[token if token != 5 else SEPARATOR for token in d] for d in DOCUMENTS], 16, SEPARATOR, PAD, isolated=True)
    assert torch.equal(other.position_ids(), sequences.position_ids()), "a separator's id within a document begins none"


def test_saved_sequences_stay_isolated(sequences, tmp_path):
    sequences.save(tmp_path / "sequences.safetensors")
    assert torch.equal(Sequences.load(tmp_path / "sequences.safetensors").starts, sequences.starts)
    shared = dataclasses.replace(sequences, starts=None)
    shared.save(tmp_path / "sequences.safetensors")
    assert Sequences.load(tmp_path / "sequences.safetensors").starts is None and shared.digest() != sequences.digest()


def test_a_packed_document_is_the_document_alone(model, sequences):
    ids, wide = sequences.input_ids.long(), copy.deepcopy(model).double()
    with torch.no_grad():
        together = hidden_states(model, ids, None, sequences.position_ids()) @ head_of(model).weight.T
        leaking = hidden_states(model, ids) @ head_of(model).weight.T
        for sequence, first, last in spans(sequences):
            alone = hidden_states(model, ids[sequence : sequence + 1, first:last]) @ head_of(model).weight.T
            exact = hidden_states(wide, ids[sequence : sequence + 1, first:last]) @ head_of(wide).weight.T
            assert_same_function(together[sequence, first:last], alone[0], exact[0])
            assert first == 0 or (leaking[sequence, first:last] - alone[0]).abs().max() > 1e-2


def alone(sequences):
    """Returns each piece of a document as a separate sequence, with the next piece's separator as its last label."""
    pieces, ids = [], sequences.input_ids.long()
    for sequence, first, last in spans(sequences):
        pieces.append(ids[sequence, first : last + 1])
    width = max(map(len, pieces))
    return Batch(*(torch.stack([_padded(piece, width) for piece in kept]) for kept in (pieces, [p != PAD for p in pieces])))


def _padded(piece, width):
    return torch.nn.functional.pad(piece, (0, width - len(piece)))


@pytest.mark.parametrize("loss", [cross_entropy, uniform_kl])
def test_losses_and_gradients_are_those_of_the_documents(model, sequences, loss):
    batch, single = sequence_source(sequences, len(sequences), 0)(0), alone(sequences)
    assert batch.counted == single.counted, "the separator after a document stays its last label"
    got, wanted = (loss(model, b, b.counted) for b in (batch, single))
    wide = copy.deepcopy(model).double()
    exact = loss(wide, single, single.counted)
    assert_same_function(got, wanted, exact, "loss")
    gradients = [
        torch.autograd.grad(value, list(m.parameters())) for value, m in ((got, model), (wanted, model), (exact, wide))
    ]
    assert_same_function(*gradients, "gradient")
    shared = sequence_source(dataclasses.replace(sequences, starts=None), len(sequences), 0)(0)
    assert abs(loss(model, shared, shared.counted) - wanted).item() > 1e-4


def test_micro_batches_keep_their_positions(model, sequences):
    batch = sequence_source(sequences, 4, 0)(0)
    parts = batch.split(3)
    assert torch.equal(torch.cat([part.position_ids for part in parts]), batch.position_ids)
    assert torch.equal(batch.to(torch.device("cpu")).position_ids, batch.position_ids)
    whole = cross_entropy(model, batch, batch.counted)
    exact = cross_entropy(copy.deepcopy(model).double(), batch, batch.counted)
    assert_same_function(sum(cross_entropy(model, part, batch.counted) for part in parts), whole, exact)


def test_evaluation_is_that_of_the_documents(model, sequences):
    single = alone(sequences)
    wanted = cross_entropy(model, single, single.counted).item()
    exact = cross_entropy(copy.deepcopy(model).double(), single, single.counted)
    assert_same_function(evaluate(model, sequences)["value"], wanted, exact)
    assert evaluate(model, dataclasses.replace(sequences, starts=None))["value"] != pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kind", list(MODELS))
def test_every_teacher_reads_isolated_documents(kind, sequences, tmp_path):
    make(kind, 1).save_pretrained(tmp_path / "teacher")
    ids, teacher = sequences.input_ids.long(), load_model(tmp_path / "teacher")
    batch = Batch(ids, ids != PAD, index=torch.arange(len(ids)), position_ids=sequences.position_ids())
    config = TeacherConfig("cached", batch_size=len(sequences))
    cached = cache_teacher(teacher, sequences, tmp_path / "cache", config, progress=False)
    cached.check(sequences)
    single = alone(sequences)
    wanted = ModelTeacher(teacher).targets(batch).hidden[batch.mask[:, 1:]]
    apart, exact = (
        ModelTeacher(m).targets(single).hidden[single.mask[:, 1:]] for m in (teacher, copy.deepcopy(teacher).double())
    )
    assert_same_function(wanted, apart, exact)
    for known in (cached, ModelTeacher.streamed(tmp_path / "teacher")):
        assert torch.equal(known.targets(batch).hidden[batch.mask[:, 1:]], wanted)
    with pytest.raises(ValueError, match="other sequences"):
        cached.check(dataclasses.replace(sequences, starts=None))
    weights = []
    for known in (teacher, cached, ModelTeacher.streamed(tmp_path / "teacher")):
        student = make(kind, 2)
        distill(student, known, sequences, TrainConfig(steps=2, batch_size=len(sequences), lr=1e-3), progress=False)
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_rmu_stops_at_its_layer_with_isolated_documents(model, sequences):
    ids = sequences.input_ids.long()
    trunk, positions = Trunk(model), sequences.position_ids()
    with torch.no_grad():
        entered = trunk.enter(ids, None, positions)
        hidden = entered.run(entered.hidden, 0, 1)
        wanted = model.base_model(input_ids=ids, position_ids=positions, use_cache=False, output_hidden_states=True)
        assert torch.equal(hidden, wanted.hidden_states[1])
        entered = trunk.enter(ids)
        assert not torch.allclose(entered.run(entered.hidden, 0, 1), hidden, atol=1e-3)
    config = UnlearnConfig("rmu", rmu=RMUConfig(target_layer=1), train=TrainConfig(steps=2, batch_size=4, lr=1e-2))
    unlearn(model, forget=sequences, retain=sequences, config=config, progress=False)


def test_an_iterable_brings_its_own_positions(model, sequences):
    ids = sequences.input_ids.long()
    item = {"input_ids": ids, "position_ids": sequences.position_ids()}
    labels = torch.where(ids == PAD, -100, ids)
    mine, wanted = as_batch({**item, "labels": labels}), Batch(ids, ids != PAD, position_ids=item["position_ids"])
    assert torch.equal(cross_entropy(model, mine, mine.counted), cross_entropy(model, wanted, wanted.counted))
    for changes, message in (
        ({"attention_mask": (ids != PAD).long()}, r"^position_ids: got them with an attention_mask"),
        ({"position_ids": item["position_ids"][:, :-1]}, r"^batch: got position_ids of shape \(\d+, 15\), wanted \(\d+, 16\)"),
        ({"position_ids": item["position_ids"].float()}, r"^batch: got position_ids of shape .* torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            as_batch({**item, **changes})


def test_what_cannot_isolate_is_refused_by_name(sequences):
    deaf = make("llama")
    forward = deaf.base_model.forward
    deaf.base_model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(
        ValueError, match=r"^position_ids: got sequences of isolated documents for LlamaForCausalLM with attention sdpa"
    ):
        evaluate(deaf, sequences)
    config = AutoConfig.for_model("bloom", vocab_size=50, hidden_size=32, n_layer=2, n_head=4)
    bloom = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match="for BloomForCausalLM"):
        evaluate(bloom, sequences)
    assert all(module.training == bloom.training for module in bloom.modules())
    half = make("llama").bfloat16()
    check_isolation(half)
    assert evaluate(bloom, dataclasses.replace(sequences, starts=None))["n"] == len(sequences)
