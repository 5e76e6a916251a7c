"""Padding is given by positions: the token that fills a sequence changes neither text, labels nor document ends."""

import dataclasses

import pytest
import torch
from rounding import PATH, assert_same_training, gamma
from safetensors.torch import load_file, save_file
from tokenizer_kinds import EOS, PAD, tokenizer_of

from undo_core import TeacherConfig, TrainConfig, cache_teacher, distill, evaluate, few_shot
from undo_core.data.sequences import Sequences
from undo_core.data.text import pack, text_splits
from undo_core.distillation.gate import GateConfig, fit_classifier
from undo_core.models import build_model, load_model
from undo_core.training.batches import sequence_source
from undo_core.training.losses import cross_entropy

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
KINDS = ("gpt2", "qwen", "unpadded", "padded")  # the last one has a separate padding token


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    paths = {name: folder / f"{name}.txt" for name in ("retain", "forget")}
    for name, path in paths.items():
        path.write_text("".join(f"{name} {number} {'x' * (number % 9)}\n" for number in range(160)))
    return {name: [str(path)] for name, path in paths.items()}


@pytest.fixture(scope="module")
def splits(texts):
    how = {**texts, "length": 33, "valid_fraction": 0.2, "seed": 0}
    return {
        (kind, isolated): text_splits(tokenizer_of(kind), **how, isolated=isolated)
        for kind in KINDS
        for isolated in (False, True)
    }


@pytest.fixture(scope="module")
def model():
    return build_model({"model_type": "llama", **SHAPE, "vocab_size": 300}, tokenizer_of("padded"), 0).eval()


@torch.no_grad()
def transformers_loss(model, sequences):
    """Returns transformers' loss of sequences without isolation, with labels by hand up to the last end of a document."""
    ids = sequences.input_ids.long()
    labels, last = ids.clone(), ids[-1].tolist()
    end = len(last)
    while last[end - 2 : end] in ([PAD, PAD], [EOS, PAD], [EOS, EOS]):
        end -= 1
    labels[-1, end:] = -100
    assert last[end - 1] == EOS and len(last) - end > 1
    return float(model.double()(input_ids=ids, labels=labels).loss), labels


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_document_is_a_label_whatever_pads(splits, kind, isolated):
    got, wanted = splits[kind, isolated], splits["padded", isolated]
    ends = 0
    for name, sequences in got.items():
        assert torch.equal(sequences.lengths, wanted[name].lengths) and torch.equal(
            sequences.text_mask(), wanted[name].text_mask()
        )
        assert torch.equal(sequences.input_ids[sequences.text_mask()], wanted[name].input_ids[sequences.text_mask()])
        assert not isolated or torch.equal(sequences.position_ids(), wanted[name].position_ids())
        batch = sequence_source(sequences, len(sequences), 0)(0)
        _, labels, mask = batch.shifted()
        ends += int((labels[mask] == EOS).sum())
    lost = sum(
        int((sequences.input_ids[:, 0] == EOS).sum()) for sequences in got.values()
    )  # the first token of a sequence is not a label
    assert ends + lost == 320 + len(got), "one after each document, and one before the first of each split"
    assert ends > 240


@pytest.mark.parametrize("kind", ["gpt2", "padded"])
def test_losses_are_those_of_transformers(splits, model, kind):
    sequences = splits[kind, False]["valid_forget"]
    wanted, labels = transformers_loss(model, sequences)
    assert int((labels[:, 1:] == EOS).sum()) > 20
    batch = sequence_source(sequences, len(sequences), 0)(0)
    assert batch.counted == int((labels[:, 1:] != -100).sum())
    model.float()
    assert cross_entropy(model, batch, batch.counted).item() == pytest.approx(wanted, rel=2 * gamma(PATH))
    assert evaluate(model, sequences)["value"] == pytest.approx(wanted, rel=2 * gamma(PATH))


def test_a_token_that_ends_texts_is_learned_though_it_pads(tmp_path):
    for kind, frozen in (("gpt2", None), ("qwen", None), ("unpadded", None), ("padded", PAD)):
        made = build_model({"model_type": "llama", **SHAPE, "vocab_size": 300}, tokenizer_of(kind), 0)
        made.save_pretrained(tmp_path / kind)
        for model in (made, load_model(tmp_path / kind)):
            assert model.get_input_embeddings().padding_idx == frozen and model.get_input_embeddings().weight[EOS].any()
            assert model.config.pad_token_id == tokenizer_of(kind).pad_token_id


@pytest.mark.parametrize("isolated", [False, True])
def test_nothing_knows_what_pads(splits, model, tmp_path, isolated):
    """Both teachers, the gate and the few-shot attack give the same for sequences that differ only in their padding."""
    results, trained = [], []
    for kind in ("gpt2", "padded"):
        sequences, other = (splits[kind, isolated][name] for name in ("valid_forget", "valid_retain"))
        cached = cache_teacher(model.float(), sequences, tmp_path / kind, TeacherConfig("cached"), progress=False)
        assert cached.facts["positions"] == int((sequences.lengths - 1).sum())
        weights = []
        for teacher in (model, cached):
            student = build_model({"model_type": "llama", **SHAPE, "vocab_size": 300}, tokenizer_of("padded"), 1)
            start = [p.detach().clone() for p in student.parameters()]
            distill(
                student, teacher, sequences, TrainConfig(1, batch_size=len(sequences), lr=1e-2, optimizer="sgd"), progress=False
            )
            weights.append([p.detach() for p in student.parameters()])
        assert_same_training(*weights, start, 1)
        gate = fit_classifier(sequences, other, GateConfig(buckets=64))
        prompted, counted = few_shot(sequences, other, 1, seed=0, positions=None)
        results.append([gate.weight, prompted.lengths, prompted.input_ids[prompted.text_mask()], counted])
        trained.append(weights[0])
    assert_same_training(*trained, start, 1)
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


def test_where_a_text_ends_survives_the_disk_and_decides_the_digest(tmp_path):
    sequences = pack([[5, EOS, 6], [7, PAD, 8]], 12, EOS, EOS, isolated=True)
    assert sequences.lengths.tolist() == [9] and sequences.tokens() == 9
    sequences.save(tmp_path / "sequences.safetensors")
    back = Sequences.load(tmp_path / "sequences.safetensors")
    assert (
        torch.equal(back.lengths, sequences.lengths)
        and torch.equal(back.starts, sequences.starts)
        and back.digest() == sequences.digest()
    )
    assert back.position_ids()[0, :9].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    shorter = dataclasses.replace(sequences, lengths=sequences.lengths - 1)
    moved = dataclasses.replace(sequences, starts=sequences.starts.roll(1, 1))
    assert len({part.digest() for part in (sequences, shorter, moved, dataclasses.replace(sequences, starts=None))}) == 4
    some = Sequences.joined([sequences, shorter]).take(torch.tensor([1]))
    assert some.digest() == shorter.digest()
    old = load_file(tmp_path / "sequences.safetensors")
    del old["lengths"]
    save_file(old, tmp_path / "old.safetensors", metadata={"rows": '{"pad_id": 2, "group_names": [], "separator_id": null}'})
    with pytest.raises(ValueError, match=r"old\.safetensors: got token sequences without 'lengths'"):
        Sequences.load(tmp_path / "old.safetensors")


def test_what_is_no_length_is_named():
    assert Sequences(torch.tensor([[4, 5, 0, 0], [4, 5, 6, 7], [0, 0, 0, 0]]), 0).lengths.tolist() == [2, 4, 0]
    with pytest.raises(ValueError, match=r"^lengths: got none and a sequence 1 with the padding token 2 within its text"):
        Sequences(torch.tensor([[4, 5, 2, 2], [4, 2, 5, 2]]), 2)
    for lengths in ([1], [1, 5], [-1, 2]):
        with pytest.raises(ValueError, match=r"^lengths: got \(\d,\) numbers from"):
            Sequences(torch.zeros(2, 4, dtype=torch.int32), 0, lengths=torch.tensor(lengths))
