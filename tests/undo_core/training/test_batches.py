"""Batches in transformers' convention, with its loss on the same batch as the oracle; other data is refused by name."""

import copy

import numpy as np
import pytest
import torch
from rounding import PATH, assert_same_function, gamma
from tokenizer_kinds import tokenizer_of

from undo_core import TrainConfig, UnlearnConfig, distill, relearn, unlearn
from undo_core.attacks.relearning import AttackConfig
from undo_core.data.sequences import Sequences
from undo_core.distillation.teacher import ModelTeacher
from undo_core.models import build_model
from undo_core.training.batches import as_batch, as_source, sequence_source
from undo_core.training.losses import cross_entropy, distillation, token_cross_entropy
from undo_core.unlearning import method_of

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
SHAPES = {
    "llama": {"model_type": "llama", **SHAPE},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 300}
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "opt": {"model_type": "opt", "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"vocab_size": 300, "max_position_embeddings": 32, "word_embed_proj_dim": 16, "dropout": 0.0},
}
generator = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 300, (4, 9), generator=generator)
OTHER = torch.randint(3, 300, (4, 9), generator=generator).masked_fill(torch.rand(4, 9, generator=generator) < 0.3, -100)
RIGHT = torch.tensor([[1] * 9, [1] * 7 + [0] * 2, [1] * 5 + [0] * 4, [1] * 9])
FORMS = {
    "tensor": lambda t: t,
    "array": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "rows": lambda t: list(t),
    "int32": lambda t: t.int(),
}


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request):
    made = build_model(SHAPES[request.param], tokenizer_of("padded"), 0).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return made


@torch.no_grad()
def loss(model, item):
    batch = as_batch(item)
    return cross_entropy(model, batch, batch.counted).item()


@pytest.mark.parametrize("form", list(FORMS))
def test_the_loss_is_transformers_own(model, form):
    """The labels differ from the ids, some are outside the attention mask, and padding is on either side."""
    masked, wide = torch.where(RIGHT.bool(), IDS, -100), copy.deepcopy(model).double()
    for columns in (
        {"labels": OTHER},
        {"labels": IDS},
        {"attention_mask": RIGHT, "labels": masked},
        {"attention_mask": RIGHT, "labels": OTHER},
        {"attention_mask": RIGHT.flip(1), "labels": OTHER},
        {"position_ids": torch.arange(9).expand(4, 9) + 3, "labels": OTHER},
    ):
        if "position_ids" in columns and model.config.model_type == "opt":
            continue  # refused: it would not isolate documents
        item = {"input_ids": IDS, **columns}
        with torch.no_grad():
            wanted, exact = (m(**item).loss.item() for m in (model, wide))
        assert_same_function(loss(model, {name: FORMS[form](c) for name, c in item.items()}), wanted, exact, str(columns))
    assert loss(model, {"input_ids": IDS, "labels": OTHER}) != pytest.approx(loss(model, {"input_ids": IDS}), rel=1e-3)


@pytest.mark.parametrize("form", list(FORMS))
def test_an_attention_mask_alone_says_what_is_text(model, form):
    """The labels are those of each sequence alone, with padding on either side; a first token is never a label."""
    ids, mask = (FORMS[form](t) for t in (IDS, RIGHT))
    got = as_batch({"input_ids": ids, "attention_mask": mask})
    labelled = {"input_ids": IDS, "attention_mask": RIGHT, "labels": torch.where(RIGHT.bool(), IDS, -100)}
    assert got.counted == int(RIGHT[:, 1:].sum()) and loss(model, got) == loss(model, labelled), "the same computation"
    truth = as_batch({"input_ids": ids, "attention_mask": RIGHT.bool()})
    assert torch.equal(truth.mask, got.mask) and torch.equal(truth.attention_mask, got.attention_mask)
    left = as_batch({"input_ids": IDS.flip(1), "attention_mask": RIGHT.flip(1)})
    assert left.counted == got.counted
    assert torch.equal(as_batch(ids).input_ids, IDS) and as_batch(ids).counted == 32


def each_alone(model, pieces):
    """Returns the mean over the labels of pieces that are separate batches."""
    return sum(loss(model, piece[None]) * (len(piece) - 1) for piece in pieces) / sum(len(piece) - 1 for piece in pieces)


def test_sequences_padded_on_the_left_have_the_loss_of_each_alone():
    """The model has only relative positions; to one with a table, transformers gives the positions of the batch."""
    made = build_model(SHAPES["llama"], tokenizer_of("padded"), 0).eval()
    pieces = [IDS[sequence, : int(RIGHT[sequence].sum())] for sequence in range(4)]
    ids = torch.stack([torch.cat([torch.full((9 - len(piece),), 7), piece]) for piece in pieces])
    got = loss(made, {"input_ids": ids, "attention_mask": RIGHT.flip(1)})
    assert_same_function(got, *(each_alone(m, pieces) for m in (made, copy.deepcopy(made).double())))


def test_a_table_of_positions_is_read_where_the_batch_says():
    """GPT-2 gets left-padded sequences with the positions of each alone, and is compared with transformers' loss."""
    made = build_model(SHAPES["gpt2"], tokenizer_of("padded"), 0).eval()
    attention = RIGHT.flip(1)
    item = {"input_ids": IDS, "attention_mask": attention, "position_ids": (attention.cumsum(1) - 1).clamp_min(0)}
    pieces = [IDS[sequence][attention[sequence].bool()] for sequence in range(4)]
    wide = copy.deepcopy(made).double()
    assert_same_function(loss(made, item), *(each_alone(m, pieces) for m in (made, wide)))
    with torch.no_grad():
        own, exact = (m(**item, labels=OTHER).loss.item() for m in (made, wide))
    assert_same_function(loss(made, {**item, "labels": OTHER}), own, exact)
    with pytest.raises(ValueError, match=r"^position_ids: got them with an attention_mask and starting again within its text"):
        as_batch({**item, "position_ids": torch.arange(9).remainder(5).expand(4, 9)})


def test_micro_batches_keep_their_labels():
    batch = as_batch({"input_ids": IDS, "labels": OTHER, "attention_mask": RIGHT})
    parts = batch.to(torch.device("cpu")).split(3)
    assert torch.equal(torch.cat([part.labels for part in parts]), OTHER) and len(parts) == 2
    assert sum(part.counted for part in parts) == batch.counted == int((OTHER[:, 1:] != -100).sum())


def test_every_loss_takes_the_labels(model):
    """Compares with transformers' logits and the labels by hand; each method that reads labels depends on them."""
    batch = as_batch({"input_ids": IDS, "labels": OTHER})
    with torch.no_grad():
        written = []
        for m in (model, copy.deepcopy(model).double()):
            logits = m(input_ids=IDS).logits[:, :-1].transpose(1, 2)
            written.append(torch.nn.functional.cross_entropy(logits, OTHER[:, 1:], reduction="none", ignore_index=-100))
        assert_same_function(token_cross_entropy(model, batch), *written)
    plain = as_batch({"input_ids": IDS, "labels": torch.where(OTHER == -100, -100, IDS)})
    for name in ("graddiff", "npo", "simnpo", "undial"):
        method, values = method_of(model, UnlearnConfig(name, retain_weight=0.0)), []
        for part in (batch, plain):
            if method.reference is not None:
                reference = method.reference(model, part) * 0.9
                part = as_batch({"input_ids": IDS, "labels": part.labels})
                object.__setattr__(part, "reference", reference)
            values.append(method.loss(model, {"forget": part}, {"forget": part.counted}).item())
        assert values[0] != pytest.approx(values[1], rel=1e-4), name
        if name == "graddiff":
            assert -values[0] == pytest.approx(model(input_ids=IDS, labels=OTHER).loss.item(), rel=2 * gamma(PATH))
    targets = ModelTeacher(build_model(SHAPES["llama"], tokenizer_of("padded"), 3)).targets(batch)
    assert (
        distillation(model, targets, batch, batch.counted).item() == distillation(model, targets, plain, plain.counted).item()
    )


SHORT = {"steps": 1, "batch_size": 4, "lr": 1e-3}


def runs(data):
    """Returns calls of each function that takes text, with ``data`` as one argument, by that argument's name."""
    make = lambda seed: build_model(SHAPES["gpt2"], tokenizer_of("padded"), seed)  # noqa: E731
    config, good = UnlearnConfig("graddiff", train=TrainConfig(**SHORT)), [IDS]
    attack = AttackConfig(rates=[1e-3], batch_size=4, evaluate_at=[0, 1], headline_step=1, extend=0)
    return {
        "text": lambda: distill(make(0), make(1), data, TrainConfig(**SHORT), progress=False),
        "forget": lambda: unlearn(make(0), forget=data, retain=good, config=config, progress=False),
        "retain": lambda: unlearn(make(0), forget=good, retain=data, config=config, progress=False),
        "forget ": lambda: relearn(make(0), data, attack, evaluate=lambda _: {"forget": 0.0}, progress=False),
    }


@pytest.mark.parametrize("name", ["text", "forget", "retain", "forget "])
def test_what_a_model_cannot_read_is_named(name):
    for data, message in (
        (
            [torch.zeros(2, 34, dtype=torch.int64)],
            "got sequences of 34 tokens, of which the last is a label alone, wanted sequences that take at most",
        ),
        ([IDS + 200], "got token id 4.., wanted ids below the model's vocabulary of 300"),
        (
            lambda step: {"input_ids": IDS, "labels": OTHER.clamp_min(-100) + 300 * (OTHER > 290)},
            "got token id 5.., wanted ids",
        ),
        ([{"input_ids": IDS, "position_ids": torch.arange(9).expand(4, 9) + 30}], "got position 38, wanted positions below"),
    ):
        with pytest.raises(ValueError, match=f"^{name.strip()}: {message}"):
            runs(data)[name]()
    with pytest.raises(ValueError, match=f"^{name.strip()}: got sequences of 34 tokens"):
        runs(sequence_source(Sequences(torch.zeros(2, 34, dtype=torch.int32), 1), 2, 0))[name]()
    runs([torch.full((2, 33), 299)])[name]()  # fits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": IDS[:, 1:]},
            r"got labels of shape \(4, 8\), wanted \(4, 9\) like input_ids; they are not shifted beforehand",
        ),
        ({"labels": IDS[:1]}, r"got labels of shape \(1, 9\), wanted \(4, 9\)"),
        ({"labels": IDS.float()}, r"got labels of shape \(4, 9\) and torch.float32, wanted integers"),
        ({"labels": IDS > 9}, r"got labels of shape \(4, 9\) and torch.bool, wanted integers"),
        ({"labels": IDS.masked_fill(IDS > 150, -1)}, r"got labels with -1, wanted token ids, from 0, or -100 for none"),
        ({"attention_mask": RIGHT[:, :-1].tolist()}, r"got attention_mask of shape \(4, 8\), wanted \(4, 9\)"),
        ({"attention_mask": RIGHT.numpy().astype(np.float32)}, r"got attention_mask of shape .* and torch.float32"),
        ({"attention_mask": RIGHT * 2}, r"got attention_mask with 2, wanted 1 for text and 0 for padding"),
        ({"attention_mask": RIGHT[:, None, None, :]}, r"got attention_mask of shape \(4, 1, 1, 9\), wanted \(4, 9\)"),
        ({"attention_mask": [[1] * 9, [1] * 8]}, r"got attention_mask that cannot become a tensor"),
        ({"position_ids": torch.arange(9)[None]}, r"got position_ids of shape \(1, 9\), wanted \(4, 9\)"),
        ({"position_ids": IDS - 200}, r"got position_ids with -\d+, wanted positions, from 0"),
        ({"input_ids": IDS.float()}, r"got input_ids of shape \(4, 9\) and torch.float32, wanted integers"),
        ({"input_ids": IDS > 9}, r"got input_ids of shape \(4, 9\) and torch.bool, wanted integers"),
        ({"input_ids": IDS[0]}, r"got input_ids of shape \(9,\)"),
        ({"input_ids": -IDS}, r"got input_ids with -\d+, wanted token ids, from 0"),
        ({"input_ids": [["a", "b"]]}, r"got input_ids that cannot become a tensor"),
        ({"input_ids": None}, r"got dict, wanted token ids"),
    ],
)
def test_what_is_no_batch_is_named(changes, message):
    with pytest.raises(ValueError, match=f"^retain: {message}"):
        as_source([{"input_ids": IDS, **changes}], size=4, seed=0, name="retain")(0)
