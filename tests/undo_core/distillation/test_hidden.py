"""Distillation of hidden states and logits, against its formula on transformers' hidden states."""

import copy

import pytest
import torch
from rounding import assert_rounded, assert_same_function
from stage_kinds import NOWHERE

from undo_core import TrainConfig, distill
from undo_core.data.sequences import Sequences
from undo_core.distillation.cache import cache_teacher
from undo_core.distillation.streaming import stream_model
from undo_core.distillation.student import matching
from undo_core.distillation.teacher import ModelTeacher, TeacherConfig
from undo_core.models import build_model
from undo_core.pipeline.stages import Distill
from undo_core.planning.fit import cheapest_fit
from undo_core.training import sequence_source
from undo_core.training.loop import accumulate
from undo_core.training.losses import Match, distillation, relative_error


@pytest.fixture
def models(tiny):
    """Returns a teacher and a student with weights that are not small, both in float32."""
    made = tiny(1), tiny(2)
    with torch.no_grad():
        for model in made:
            for parameter in model.parameters():
                parameter.mul_(4) if parameter.ndim > 1 else parameter.normal_(generator=torch.Generator().manual_seed(3))
    return made


def _in(model, dtype):
    return model if model.dtype == dtype else copy.deepcopy(model).to(dtype)


def wanted_loss(student, teacher, batch, weight, layers, dtype=torch.float64):
    """Returns the loss, with all logits in ``dtype``, from models run without this project's code."""
    ids, keep = batch.input_ids, batch.input_ids[:, 1:] != 0
    outputs = [m(input_ids=ids, output_hidden_states=True) for m in (_in(student, dtype), _in(teacher, dtype))]
    s, t = (output.logits[:, :-1].log_softmax(-1) for output in outputs)
    loss = (t.exp() * (t - s)).sum(-1)[keep].mean()
    terms = []
    for layer in layers:
        h, g = (output.hidden_states[layer][:, :-1][keep] for output in outputs)
        terms.append(((h - g).square().sum(-1) / g.square().sum(-1)).mean())
    return loss + weight * sum(terms) / len(terms)


@pytest.mark.parametrize("layers", [(1, 2), (0,), (2,)])
def test_the_formula(models, sequences, layers):
    teacher, student = models
    batch = sequence_source(sequences, 12, 3)(0)
    got = distillation(student, ModelTeacher(teacher, layers).targets(batch), batch, batch.counted, Match(0.7, layers))
    wanted = wanted_loss(student, teacher, batch, 0.7, layers)
    assert_same_function(got, wanted_loss(student, teacher, batch, 0.7, layers, torch.float32), wanted)
    alone = distillation(student, ModelTeacher(teacher).targets(batch), batch, batch.counted)
    assert abs(float((wanted - alone).detach())) > 0.01, "the term is not lost in the tolerance"


def gradient(model):
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def test_the_gradient_of_micro_batches_is_the_whole_batch_s(models, sequences):
    teacher, student = models
    known, match = ModelTeacher(teacher, (1, 2)), Match(5.0, (1, 2))
    ids = sequences.input_ids.clone()
    ids[::3, 4:] = 0  # sequences of different numbers of labels
    batch = sequence_source(Sequences(ids, 0), 12, 3)(0)

    def loss(model, batches, counted):
        return distillation(model, known.targets(batches["text"]), batches["text"], counted["text"], match)

    gradients, values = [], []
    for size in (12, 5):
        student.zero_grad()
        values.append(accumulate(student, loss, {"text": batch}, {"text": batch.counted}, size))
        gradients.append(gradient(student))
    written = []
    for dtype in (torch.float32, torch.float64):
        model = copy.deepcopy(student).to(dtype)
        model.zero_grad()
        value = wanted_loss(model, teacher, batch, 5.0, (1, 2), dtype)
        written.append((value, torch.autograd.grad(value, list(model.parameters()))))
    (plain, plain_gradient), (exact, exact_gradient) = written
    for value, found in zip(values, gradients, strict=True):
        assert_same_function(value, plain, exact, "loss")
        assert_same_function(found, plain_gradient, exact_gradient, "gradient")


def test_the_error_is_relative_and_what_is_masked_has_none():
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, 6, generator=draw, requires_grad=True)
    target = torch.randn(3, 4, 6, generator=draw) * torch.tensor([1.0, 100.0, 1e4, 1e-2]).view(1, 4, 1)
    mask = torch.rand(3, 4, generator=draw) < 0.6
    target[0, 0], mask[0, 0] = float("nan"), False
    value = relative_error(hidden, target, mask, 9)
    value.backward()
    h, t = hidden.detach().double()[mask], target.double()[mask]
    parts = (h - t).square().sum(-1) / t.square().sum(-1)  # of 6 entries each, all of them positive
    assert_rounded(value, parts.sum() / 9, parts.sum() / 9, terms=2 * 12 + 12 + 4)
    wanted = torch.zeros_like(hidden, dtype=torch.float64)
    wanted[mask] = 2 * (h - t) / t.square().sum(-1, keepdim=True) / 9
    magnitude = torch.zeros_like(wanted)
    magnitude[mask] = 2 * (h.abs() + t.abs()) / t.square().sum(-1, keepdim=True) / 9
    assert_rounded(hidden.grad, wanted, magnitude, terms=2 * 12 + 8)


def learn(teacher, student, sequences, checkpointing=False, **options):
    train = TrainConfig(steps=6, batch_size=16, micro_batch_size=8, lr=3e-3, activation_checkpointing=checkpointing)
    distill(student, teacher, sequences, train, progress=False, **options)
    return torch.cat([p.detach().flatten() for p in student.parameters()])


def test_hidden_states_come_closer_and_a_streamed_teacher_gives_the_same_bits(models, sequences, tmp_path):
    teacher, student = models
    teacher.save_pretrained(tmp_path / "teacher")
    matched, plain = copy.deepcopy(student), copy.deepcopy(student)
    wanted = learn(teacher, matched, sequences, hidden_weight=10.0)
    learn(teacher, plain, sequences)
    batch = sequence_source(sequences, 32, 5)(0)
    errors = []
    for model in (student, matched, plain):
        states = [m(input_ids=batch.input_ids, output_hidden_states=True).hidden_states[1] for m in (model, teacher)]
        errors.append(float(relative_error(*(s.detach() for s in states), batch.mask, batch.counted)))
    assert errors[1] < 0.9 * errors[0] and errors[1] < errors[2]
    streamed = ModelTeacher(stream_model(tmp_path / "teacher"))
    assert torch.equal(learn(streamed, copy.deepcopy(student), sequences, hidden_weight=10.0), wanted)
    assert torch.equal(learn(teacher, copy.deepcopy(student), sequences, checkpointing=True, hidden_weight=10.0), wanted)


def test_a_teacher_without_layers_is_refused(models, sequences, tmp_path):
    teacher, student = models
    cached = cache_teacher(teacher, sequences, tmp_path / "cache", TeacherConfig("cached"), progress=False)
    with pytest.raises(ValueError, match=r"^hidden_weight: got 1.0 with CachedTeacher.*wanted a resident or streamed"):
        distill(student, cached, sequences, hidden_weight=1.0)


def test_no_cache_is_advised_for_less_memory():
    tried = []

    def need(changes):
        tried.append(changes)
        return 1

    stage = {"train": TrainConfig(steps=1, batch_size=4), "recover": None}
    stage |= {"prepared": NOWHERE, "teacher": NOWHERE, "student": NOWHERE}
    for weight, wanted in ((0.0, True), (1.0, False)):
        tried.clear()
        cheapest_fit(Distill(**stage, hidden_weight=weight), 0, need)
        assert any("teacher.kind" in changes for changes in tried) == wanted


def test_bad_settings_are_refused(models, tokenizer):
    teacher, student = models
    shape = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    other = build_model(shape, tokenizer, 0)
    known = ModelTeacher(teacher)
    for arguments, name in [
        ((student, known, -1.0, None), "hidden_weight"),
        ((student, known, float("nan"), None), "hidden_weight"),
        ((student, known, 1.0, [3]), "hidden_layers"),
        ((student, known, 1.0, [1, 1]), "hidden_layers"),
        ((student, known, 1.0, []), "hidden_layers"),
        ((other, known, 1.0, None), "student"),
    ]:
        with pytest.raises(ValueError, match=rf"^{name}: got .*wanted"):
            matching(*arguments)
