"""Heads with more entries than the tokenizer: the padding of either head gets no probability and no gradient."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from rounding import assert_same_function

from undo_core import TeacherConfig, TrainConfig, UnlearnConfig, cache_teacher, distill, unlearn
from undo_core.data.sequences import Sequences
from undo_core.distillation.teacher import ModelTeacher
from undo_core.models import build_model, tokens_of
from undo_core.pipeline.stage import Work
from undo_core.pipeline.stages.distill import common_tokens
from undo_core.training.batches import as_batch
from undo_core.training.losses import HiddenTargets, distillation, uniform_kl

ONE = TrainConfig(steps=1, batch_size=100, lr=0.1, optimizer="sgd", beta1=0.0, clip=0.0)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}


@pytest.fixture
def padded(tokenizer):
    """Makes a model whose head has the given number of entries more than there are tokens."""
    return lambda extra, seed=0: build_model({**LLAMA, "vocab_size": tokens_of(tokenizer) + extra}, tokenizer, seed)


def logits(model, ids, size):
    return model.double()(input_ids=ids[:, :-1]).logits[..., :size].log_softmax(-1)


def text(sequences):
    return sequences.input_ids.long(), (sequences.input_ids != 0)[:, 1:]


def gradient_of(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(("student_extra", "teacher_extra"), [(0, 7), (7, 0), (5, 9), (4, 4)])
def test_the_kl_is_over_the_tokens(padded, tokenizer, sequences, student_extra, teacher_extra):
    size = tokens_of(tokenizer)
    student, teacher = padded(student_extra, 1), padded(teacher_extra, 2)
    ids, mask = text(sequences)
    batch = as_batch({"input_ids": ids, "attention_mask": (sequences.input_ids != 0).long()})
    targets = ModelTeacher(teacher).targets(batch)
    assert isinstance(targets, HiddenTargets)
    got = distillation(student, targets, batch, batch.counted, vocab_size=size)
    gradient = gradient_of(student, got)
    head = student.lm_head.weight.grad
    assert head[:size].abs().sum() > 0 and not head[size:].any()
    values, gradients = [got], [gradient]
    for dtype in (torch.float32, torch.float64):
        own, other = (copy.deepcopy(model).to(dtype) for model in (student, teacher))
        p, t = (model(input_ids=ids[:, :-1]).logits[..., :size].log_softmax(-1) for model in (own, other))
        values.append((F.kl_div(p, t, log_target=True, reduction="none").sum(-1) * mask).sum() / mask.sum())
        gradients.append(gradient_of(own, values[-1]))
    assert_same_function(*values, "loss")
    assert_same_function(*gradients, "gradient")


def test_maxent_is_uniform_over_the_tokens(padded, tokenizer, sequences):
    size, model = tokens_of(tokenizer), padded(40)
    ids, mask = text(sequences)
    batch = as_batch({"input_ids": ids, "attention_mask": (sequences.input_ids != 0).long()})
    got = uniform_kl(model, batch, batch.counted, vocab_size=size)
    written = []
    for one in (model, copy.deepcopy(model).double()):
        p = logits(one, ids, size)
        written.append(((-math.log(size) - p.mean(-1)) * mask).sum() / mask.sum())
    assert_same_function(got, *written)


def head_after(model, run):
    before = model.lm_head.weight.detach().clone()
    run(model)
    return (model.lm_head.weight.detach() - before).abs().sum(1)


def test_unlearn_and_distill_leave_the_padding_alone(padded, tokenizer, sequences):
    size, plain = tokens_of(tokenizer), Sequences(sequences.input_ids, 0)
    config = UnlearnConfig(retain_weight=0.0, vocab_size=size, train=ONE)
    moved = head_after(padded(6), lambda m: unlearn(m, forget=plain, retain=plain, config=config, progress=False))
    assert moved[:size].all() and not moved[size:].any()
    everything = UnlearnConfig(retain_weight=0.0, train=ONE)
    assert head_after(padded(6), lambda m: unlearn(m, forget=plain, retain=plain, config=everything, progress=False)).all()
    moved = head_after(padded(6), lambda m: distill(m, padded(6, 1), plain, ONE, vocab_size=size, progress=False))
    assert moved[:size].all() and not moved[size:].any()


def test_the_smaller_head_is_the_default_and_said_once(padded, tokenizer, sequences):
    size, plain = tokens_of(tokenizer), Sequences(sequences.input_ids, 0)
    with pytest.warns(
        UserWarning, match=f"student of {size + 6} vocabulary entries and a teacher of {size + 2}; taking {size + 2}"
    ) as said:
        moved = head_after(padded(6), lambda m: distill(m, padded(2, 1), plain, ONE, progress=False))
    assert len(said) == 1 and moved[: size + 2].all() and not moved[size + 2 :].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distill(padded(6), padded(2, 1), plain, ONE, vocab_size=size, progress=False)
    for student, teacher, name in ((6, 2, "teacher"), (2, 6, "student")):
        with pytest.raises(
            ValueError,
            match=f"vocab_size: got {size + 4}, wanted at most the {size + 2} vocabulary entries of the {name}'s head",
        ):
            distill(padded(student), padded(teacher), plain, ONE, vocab_size=size + 4, progress=False)
    with pytest.raises(
        ValueError, match=f"vocab_size: got {size + 4}, wanted at most the {size + 2} vocabulary entries of the model's head"
    ):
        unlearn(padded(2), forget=plain, retain=plain, config=UnlearnConfig(vocab_size=size + 4), progress=False)


@pytest.mark.parametrize("kind", ["cached", "topk"])
def test_caches_know_the_tokens(padded, tokenizer, sequences, tmp_path, kind):
    size, plain = tokens_of(tokenizer), Sequences(sequences.input_ids, 0)
    how = {"k": 5} if kind == "topk" else {}
    teacher = padded(6, 1)
    with torch.no_grad():
        teacher.lm_head.weight[size:] *= 20  # without vocab_size, padding would be among the likeliest
    make = lambda vocab_size: cache_teacher(  # noqa: E731
        teacher, plain, tmp_path / str(vocab_size), TeacherConfig(kind, vocab_size=vocab_size, **how), progress=False
    )
    known = make(size)
    moved = head_after(padded(3), lambda m: distill(m, known, plain, ONE, progress=False))
    assert moved[:size].all() and not moved[size:].any()
    if kind == "topk":
        batch = as_batch(plain.input_ids.long())
        known.check(plain)
        batch = type(batch)(batch.input_ids, plain.input_ids != 0, index=torch.arange(100))
        targets = known.targets(batch)
        mask = batch.mask[:, 1:]
        written = (logits(m, batch.input_ids, size).topk(5).values[mask] for m in (teacher, copy.deepcopy(teacher).double()))
        assert_same_function(targets.logprobs[mask], *written)
        assert int(targets.indices.max()) < size
        teacher.float()
        with pytest.raises(
            ValueError, match=rf"teacher: got a topk cache over {size + 6} tokens .* TeacherConfig\(vocab_size={size}\)"
        ):
            distill(padded(6), make(None), plain, ONE, vocab_size=size, progress=False)
    with pytest.raises(ValueError, match=f"vocab_size: got {size + 1} with a cache of vocab_size {size}"):
        distill(padded(6), known, plain, ONE, vocab_size=size + 1, progress=False)
    with pytest.raises(ValueError, match="wanted a new folder, vocab_size"):
        cache_teacher(teacher, plain, tmp_path / str(size), TeacherConfig(kind, vocab_size=size - 1, **how), progress=False)


def test_the_stage_compares_the_tokenizers(padded, tokenizer, tmp_path, capsys):
    size = tokens_of(tokenizer)
    for name, extra, own in (("teacher", 6, tokenizer), ("student", 2, tokenizer), ("other", 2, None)):
        padded(extra).save_pretrained(tmp_path / name)
        if own is not None:
            own.save_pretrained(tmp_path / name)
    work = lambda student: Work(  # noqa: E731
        {"teacher": tmp_path / "teacher", "student": tmp_path / student}, tmp_path, tmp_path, "distill"
    )
    assert common_tokens(work("student"), size + 6, size + 2) == size + 2
    assert f"the first {size + 2} count" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"student: got a vocabulary of .*teacher and .*other"):
        common_tokens(work("other"), size + 6, size + 2)
