"""The retain term as divergence from the original model, against its formula in float64 on logits."""

import copy
import dataclasses

import pytest
import torch
from rounding import PATH, assert_as_exact_as, gamma
from stage_kinds import NOWHERE
from unlearning_inputs import changed, drawn

from undo_core import TrainConfig, UnlearnConfig, unlearn
from undo_core.distillation.teacher import ModelTeacher
from undo_core.models import build_model
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.stages import Unlearn
from undo_core.training.loop import accumulate
from undo_core.training.precision import PRECISIONS, convert_
from undo_core.unlearning import method as base
from undo_core.unlearning import method_of, referred, unlearn_flops
from undo_core.unlearning.rmu import RMUConfig

TERMS = [
    *(("kl", name) for name in ("maxent", "graddiff", "npo", "simnpo", "undial", "jensun")),
    ("jsd", "jensun"),
    ("jsd", "maxent"),
]
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def divergence(original, model, batch, name):
    """Returns ``KL(p_original || p)`` or the Jensen-Shannon divergence as a mean over labels, with its sums written out."""
    ids, keep = batch.input_ids, batch.mask[:, 1:]
    with torch.no_grad():
        p = original(input_ids=ids).logits[:, :-1].softmax(-1)
    logq = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    if name == "jsd":
        q = logq.exp()
        m = (p + q) / 2
        return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1))[keep].sum() / 2 / keep.sum()
    return (p * (p.log() - logq)).sum(-1)[keep].sum() / keep.sum()


@pytest.mark.parametrize(("term", "name"), TERMS)
def test_the_retain_term_is_the_divergence_from_the_original(tiny, sequences, term, name):
    """For every method, loss and gradient less the forget term are those of the divergence, in any micro-batches."""
    data, counted = drawn(sequences, masked="retain")
    original = tiny()
    original.lm_head.weight.data.mul_(30)  # sure of some labels, unsure of others
    method = method_of(original, UnlearnConfig(name, retain_weight=0.25, retain_loss=term))
    plain, model = method_of(original, UnlearnConfig(name, retain_weight=0.0)), changed(copy.deepcopy(original))
    if method.reference is not None:
        data["forget"] = referred(original, data["forget"], method)
    wide = copy.deepcopy(model).double()
    same, exact = copy.deepcopy(model), []
    for one, other in ((same, original), (wide, copy.deepcopy(original).double())):
        exact.append(0.25 * divergence(other, one, data["retain"], term))
        exact[-1].backward()
    there, wanted = (float(value.detach()) for value in exact)
    same = [p.grad for p in same.parameters()]
    changed(original)  # it is trained in place, and the copy must not change
    for micro in (None, 5):
        values, gradients = [], []
        for one in (method, plain):
            model.zero_grad()
            values.append(float(accumulate(model, one.loss, data, counted, micro)))
            gradients.append([p.grad.clone() for p in model.parameters()])
        assert_as_exact_as(
            torch.tensor(values[0] - values[1]), torch.tensor(there), torch.tensor(wanted), gamma(PATH), scale=abs(values[0])
        )
        for (key, p), own, whole, part in zip(wide.named_parameters(), same, *gradients, strict=True):
            assert_as_exact_as(whole - part, own, p.grad, gamma(PATH), key, scale=float(whole.norm()))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_at_the_original_it_is_nothing(tokenizer, sequences, precision, monkeypatch):
    """In every precision, the copy has the weights, rotary frequencies and attention kernel of the trained model."""
    data, counted = drawn(sequences, masked="retain")
    model, copies = build_model(LLAMA, tokenizer, 0), []
    monkeypatch.setattr(base, "ModelTeacher", lambda copied: copies.append(copied) or ModelTeacher(copied))
    assert model.config._attn_implementation == "sdpa"
    train = TrainConfig(steps=1, precision=precision, attention="eager")
    method = method_of(model, UnlearnConfig(retain_loss="kl", train=train))
    convert_(model, precision)
    model.set_attn_implementation("eager")
    assert float(method.loss(model, {"retain": data["retain"]}, counted).detach()) == 0
    (copied,) = copies
    assert copied.config._attn_implementation == "eager" and not any(p.requires_grad for p in copied.parameters())
    own, its = ({**dict(one.named_parameters()), **dict(one.named_buffers())} for one in (model, copied))
    assert own.keys() == its.keys()
    assert all(own[name].dtype == its[name].dtype and torch.equal(own[name], its[name]) for name in own)


def test_a_resumed_run_keeps_to_the_original(tiny, sequences, tmp_path):
    """A run that ends after the third step and resumes gives the bits of the whole run."""
    train = TrainConfig(steps=5, batch_size=8, lr=1e-2, micro_batch_size=5, eval_every=1)
    config = UnlearnConfig(retain_loss="kl", train=train)
    options = {"forget": sequences, "retain": sequences, "config": config, "progress": False}
    kept = {**options, "folder": tmp_path, "checkpoint_seconds": 0.0}
    whole, resumed, seen = tiny(), tiny(), []
    unlearn(whole, **options)

    def fail(model):
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        unlearn(resumed, **kept, evaluate=fail)
    assert list((tmp_path / "checkpoint").glob("step-*"))
    resumed = tiny()
    unlearn(resumed, **kept, evaluate=lambda model: {})
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_keys_flops_and_memory_know_it(tiny):
    plain, config = UnlearnConfig(), UnlearnConfig(retain_loss="kl")
    assert "retain_loss" not in plain.settings(), "keys from before it was there"
    assert config.settings()["retain_loss"] == "kl"
    model = tiny()
    costs = [unlearn_flops(model, dataclasses.replace(config, retain_loss=name), 8) for name in ("cross-entropy", "kl")]
    assert costs[1]["forget"] == costs[0]["forget"]
    assert costs[1]["retain"] == pytest.approx(4 / 3 * costs[0]["retain"]), "a forward pass beside forward and backward"
    predict = Predictor(model.config, 64, device="cuda")
    train = TrainConfig(steps=5, batch_size=8, micro_batch_size=4)
    stages = [Unlearn(config=dataclasses.replace(one, train=train), prepared=NOWHERE, model=NOWHERE) for one in (plain, config)]
    weights = [predict(stage, torch.float32).weights for stage in stages]
    assert weights[1] == 2 * weights[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"retain_loss": "mse"},
        {"retain_loss": "kl", "retain_weight": 0.0},
        {"retain_loss": "kl", "method": "rmu", "rmu": RMUConfig()},
    ],
    ids=["unknown", "no weight", "rmu"],
)
def test_what_it_cannot_go_with_is_named(settings):
    with pytest.raises(ValueError, match=r"^retain_loss: got"):
        UnlearnConfig(**settings)
