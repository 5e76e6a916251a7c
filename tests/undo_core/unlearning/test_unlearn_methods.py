"""NPO, SimNPO, UNDIAL, SAM and RepNoise against their formulas in float64 on logits, and within `unlearn`."""

import copy
import dataclasses
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import undo_kernels
from rounding import PATH, assert_as_exact_as, assert_same_function, assert_same_training, gamma
from stage_kinds import NOWHERE
from unlearning_inputs import changed, drawn

import undo_core
from undo_core import TrainConfig, UnlearnConfig, unlearn
from undo_core.cli.parser import run_config
from undo_core.data.sequences import Sequences
from undo_core.evaluation.metrics import evaluate
from undo_core.models import build_model
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.stages import Unlearn
from undo_core.training import sequence_source
from undo_core.training.loop import accumulate
from undo_core.training.precision import PRECISIONS, converted, seeded, weight_dtype
from undo_core.unlearning import METHODS, ROBUST, method_of, npo, referred, register, unlearn_flops
from undo_core.unlearning.jensun import JensUnConfig
from undo_core.unlearning.npo import NPOConfig
from undo_core.unlearning.repnoise import RepNoiseConfig, noise_distance
from undo_core.unlearning.sam import SAMConfig, moved
from undo_core.unlearning.simnpo import SimNPOConfig
from undo_core.unlearning.undial import UNDIALConfig

TOKEN_METHODS = [
    UnlearnConfig("npo", npo=NPOConfig(0.7), retain_weight=2.0),
    UnlearnConfig("npo", npo=NPOConfig(0.7, "token"), retain_weight=2.0),
    UnlearnConfig("simnpo", simnpo=SimNPOConfig(1.3, 0.4), retain_weight=2.0),
    UnlearnConfig("undial", undial=UNDIALConfig(3.0), retain_weight=2.0),
    UnlearnConfig("undial", undial=UNDIALConfig(10.0), retain_weight=0.0),
    UnlearnConfig("jensun", jensun=JensUnConfig([5, 3]), retain_weight=2.0),
]


def label(config):
    return f"{config.title}-{config.npo.unit}-{config.undial.gamma}"


def token_logprobs(model, batch):
    z = model(input_ids=batch.input_ids).logits[:, :-1]
    return z.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0], z


def oracle(config, model, original, data):
    """Returns the published loss with its sums written out."""
    forget, retain = data["forget"], data["retain"]
    logp, z = token_logprobs(model, forget)
    with torch.no_grad():
        logr, z_t = token_logprobs(original, forget)
    terms = []
    for sequence in range(len(logp)):
        keep = forget.mask[sequence, 1:]
        if not keep.any():
            continue
        if config.method == "npo":
            beta, ratio = config.npo.beta, (logp - logr)[sequence][keep]
            ratio = ratio.sum()[None] if config.npo.unit == "row" else ratio
            terms += [-2 / beta * torch.log(torch.sigmoid(-beta * value)) for value in ratio]
        elif config.method == "simnpo":
            beta, gamma = config.simnpo.beta, config.simnpo.gamma
            terms.append(-2 / beta * torch.log(torch.sigmoid(-beta / keep.sum() * logp[sequence][keep].sum() - gamma)))
        elif config.method == "jensun":
            labels = torch.tensor([5, 3] * len(keep))[: int(keep.sum())]
            p, one = z[sequence][keep].softmax(-1), F.one_hot(labels, z.shape[-1])
            m = (p + one) / 2
            terms += list(((p * (p / m).log()).sum(-1) - m.gather(-1, labels[:, None])[:, 0].log()) / 2)
        else:
            one = F.one_hot(forget.input_ids[sequence, 1:][keep], z.shape[-1])
            q = (z_t[sequence][keep] - config.undial.gamma * one).softmax(-1)
            terms += list((q * (q.log() - z[sequence][keep].log_softmax(-1))).sum(-1))
    keep = retain.mask[:, 1:]
    return sum(terms) / len(terms) - config.retain_weight * token_logprobs(model, retain)[0][keep].mean()


@pytest.mark.parametrize("config", TOKEN_METHODS, ids=label)
def test_loss_and_gradient_are_the_published_ones(tiny, sequences, config):
    data, counted = drawn(sequences)
    original = tiny()
    original.lm_head.weight.data.mul_(30)  # sure of some labels, unsure of others
    method, model = method_of(original, config), changed(copy.deepcopy(original))
    if method.reference is not None:
        data["forget"] = referred(original, data["forget"], method)
    same, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    plain = oracle(config, same, copy.deepcopy(original), data)
    wanted = oracle(config, wide, copy.deepcopy(original).double(), data)
    plain.backward(), wanted.backward()
    for micro in (None, 5):
        model.zero_grad()
        got = accumulate(model, method.loss, data, counted, micro)
        assert_same_function(got, plain, wanted)
        for (name, a), there, b in zip(model.named_parameters(), same.parameters(), wide.parameters(), strict=True):
            assert_same_function(a.grad, there.grad, b.grad, name)


def test_jensun_answers_with_the_end_of_a_text_unless_it_is_told(tiny, sequences):
    data, counted = drawn(sequences)
    model = tiny()
    model.config.eos_token_id = [4, 2]
    values = [
        float(
            method_of(model, UnlearnConfig("jensun", jensun=JensUnConfig(answer), retain_weight=0.0))
            .loss(model, data, counted)
            .detach()
        )
        for answer in ([], [4], [2])
    ]
    assert values[0] == values[1] != values[2] and 0 < max(values) < math.log(2)
    model.config.eos_token_id = None
    with pytest.raises(ValueError, match=r"^jensun\.answer: got none for a model whose configuration has no eos_token_id"):
        method_of(model, UnlearnConfig("jensun"))
    with pytest.raises(ValueError, match=r"^jensun\.answer: got token 100000, wanted tokens below the head's"):
        method_of(model, UnlearnConfig("jensun", jensun=JensUnConfig([1, 100000])))
    with pytest.raises(ValueError, match=r"^answer: got \[-1\]"):
        JensUnConfig([-1])


def test_npo_at_the_original_is_half_the_ascent(tiny, sequences):
    """As long as nothing has changed, the weight of every token is 1/2 of 2, and the gradient is that of -CE."""
    data, counted = drawn(sequences)
    gradients, ascent = [], UnlearnConfig("graddiff")
    runs = ((tiny(), UnlearnConfig("npo", npo=NPOConfig(0.1, "token"))), (tiny(), ascent), (tiny().double(), ascent))
    for model, config in runs:
        method = method_of(model, config)
        given = {**data, "forget": referred(model, data["forget"], method)} if method.reference else data
        accumulate(model, method.loss, given, counted, None)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_same_function(*gradients)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_npos_reference_is_of_the_model_as_it_is_trained(tiny, sequences, precision, monkeypatch):
    """The gap is 0 at the first step of a float32 checkpoint in every precision; the masters keep their bits."""
    gaps, own = [], npo.token_cross_entropy

    def kept(model, batch):
        value = own(model, batch)
        if batch.reference is not None:
            gaps.append((batch.reference - value).detach().abs().max())
        return value

    monkeypatch.setattr(npo, "token_cross_entropy", kept)
    train = TrainConfig(steps=1, batch_size=8, lr=0.0, micro_batch_size=5, precision=precision, attention="eager")
    model, source = tiny(), sequence_source(sequences, 8, 0)
    before = [p.detach().clone() for p in model.parameters()]
    seen = [p.data_ptr() for p in model.parameters()]
    config = UnlearnConfig("npo", train=train)
    with converted(model, precision):
        assert {p.dtype for p in model.parameters()} == {weight_dtype(precision)}
    assert [p.data_ptr() for p in model.parameters()] == seen
    unlearn(model, forget=source, retain=source, config=config, progress=False)
    assert [float(gap) for gap in gaps] == [0.0, 0.0]
    assert all(torch.equal(p, old.to(p.dtype)) for p, old in zip(model.parameters(), before, strict=True))


def test_other_sequences_to_forget_are_refused_with_a_reference_too(tiny, sequences, tmp_path):
    config = UnlearnConfig("npo", train=TrainConfig(steps=2, batch_size=8, lr=1e-3, eval_every=1))
    options = {"config": config, "folder": tmp_path, "progress": False, "checkpoint_seconds": 0.0}
    unlearn(tiny(), forget=sequences, retain=sequences, **options)
    with pytest.raises(ValueError, match=r"made with sources\.forget\.rows [0-9a-f]+; wanted sources\.forget\.rows"):
        unlearn(tiny(), forget=Sequences(sequences.input_ids.flip(0), sequences.pad_id), retain=sequences, **options)


@pytest.mark.parametrize("seed", [2, 8])
def test_undial_holds_where_the_original_is_certain(seed, tiny, sequences):
    """There 1 / Z is large and amplifies rounding."""
    data, counted = drawn(sequences)
    data = {"forget": data["forget"]}
    original = tiny()
    original.lm_head.weight.data.mul_(20)
    z = token_logprobs(original, data["forget"])[1].detach()
    data["forget"].input_ids[:, 1:] = z.argmax(-1)  # not a fixed point; most labels are likely ones
    config = UnlearnConfig("undial", undial=UNDIALConfig(10.0), retain_weight=0.0)
    method, model = method_of(original, config), changed(copy.deepcopy(original), seed)
    same, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    oracle(config, same, copy.deepcopy(original), {**data, "retain": data["forget"]}).backward()
    oracle(config, wide, copy.deepcopy(original).double(), {**data, "retain": data["forget"]}).backward()
    accumulate(model, method.loss, data, counted, None)
    assert_same_function(*([p.grad for p in m.parameters()] for m in (model, same, wide)))


def published_distance(x, draws):
    """Returns MMD as the authors describe it: five kernels over pooled distances, with drawn noise."""
    pooled = torch.cat([x, draws])
    squares = torch.cdist(pooled, pooled, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    n = len(pooled)
    width = squares.sum() / (n * n - n) / 4
    k = sum(torch.exp(-squares / (width * 2**i)) for i in range(5))
    m = len(x)
    return k[:m, :m].mean() + k[m:, m:].mean() - 2 * k[:m, m:].mean()


def test_the_distance_from_noise_is_the_published_one_in_expectation():
    generator = torch.Generator().manual_seed(0)
    x = 0.7 * torch.randn(40, 6, generator=generator, dtype=torch.float64) + 0.3
    got = noise_distance(x, torch.ones(40, dtype=torch.bool), 64)
    values = []
    for _ in range(400):
        draws = torch.randn(40, 6, generator=generator, dtype=torch.float64)
        biased = published_distance(x, draws)
        values.append(biased)
    # The mean over pairs of draws counts each draw with itself, 1 instead of the expectation, in one pair of 40.
    d, total = 6, 0.0
    squares = (x[:, None] - x).square().sum(-1)
    width = (squares.sum() + 2 * 40 * (x.square().sum() + 40 * d) + (1600 - 40) * 2 * d) / (80 * 80 - 80)
    for factor in (0.25, 0.5, 1, 2, 4):
        total += (1 - (1 + 4 / (factor * width)) ** (-d / 2)) / 40
    values = torch.stack(values)
    # Six standard errors of the mean, which a right value exceeds for one seed in 500 million.
    assert abs(float(got) - float(values.mean() - total)) <= 6 * float(values.std()) / len(values) ** 0.5
    assert 6 * float(values.std()) / len(values) ** 0.5 < 0.1 * float(got), "enough draws to see a difference"


def test_the_distance_takes_what_counts_alone():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(20) % 3 > 0
    ones = torch.ones(int(mask.sum()), dtype=torch.bool)
    wanted, exact = (noise_distance(labels, ones, 64) for labels in (x[mask], x[mask].double()))
    x[~mask] = float("nan")
    x.requires_grad_()
    got = noise_distance(x, mask, 64)
    assert_same_function(got, wanted, exact)
    (gradient,) = torch.autograd.grad(got, x)
    assert gradient[mask].abs().sum() > 0 and not gradient[~mask].any()
    assert float(noise_distance(x.detach(), torch.zeros(20, dtype=torch.bool), 64)) == 0


@pytest.mark.parametrize("count", [3, 600])
def test_the_distance_looks_at_labels_however_sparse(count):
    generator = torch.Generator().manual_seed(2)
    x, mask = torch.randn(1000, 4, generator=generator), torch.zeros(1000, dtype=torch.bool)
    mask[torch.randperm(1000, generator=generator)[:count]] = True
    labels = x[mask]
    spread = [round(k * (count - 1) / 15) for k in range(16)] if count > 16 else list(range(count))
    ones = torch.ones(len(spread), dtype=torch.bool)
    wanted, exact = (noise_distance(chosen, ones, 16) for chosen in (labels[spread], labels[spread].double()))
    assert float(wanted) > 0
    assert_same_function(noise_distance(x, mask, 16), wanted, exact)


def repnoise(base="maxent", **settings):
    return UnlearnConfig(base, robust="repnoise", repnoise=RepNoiseConfig(**settings))


def test_repnoise_adds_the_layers_of_the_model(tiny, sequences):
    """Checks the ascent against hidden states and logits of transformers, and the distance on an mlp called by hand."""
    data, counted = drawn(sequences)
    model, batch = tiny(), data["forget"]
    keep, labels = batch.mask[:, 1:], batch.input_ids[:, 1:]
    base = method_of(model, UnlearnConfig()).loss(model, data, counted)
    ascent = method_of(model, repnoise(alpha=0.7, beta=0.0)).loss(model, data, counted) - base
    distance = method_of(model, repnoise(alpha=0.0, beta=1.0)).loss(model, data, counted) - base

    def by_hand(model):
        out = model(input_ids=batch.input_ids[:, :-1], output_hidden_states=True)
        first = model.lm_head(model.model.norm(out.hidden_states[1]))
        first = 30 * torch.tanh(first / 30)
        nats = [F.cross_entropy(z[keep], labels[keep]) for z in (first, out.logits)]
        inside = {}
        hooks = [
            layer.mlp.down_proj.register_forward_hook(lambda _, __, out, k=k: inside.update({k: out}))
            for k, layer in enumerate(model.model.layers)
        ]
        model(input_ids=batch.input_ids[:, :-1])
        for hook in hooks:
            hook.remove()
        away = sum(noise_distance(h.flatten(0, 1), keep.flatten(), 256) for h in inside.values()) / 2
        return -0.7 * torch.log(1 + sum(nats) / 2), away

    for got, plain, wanted in zip((ascent, distance), by_hand(model), by_hand(copy.deepcopy(model).double()), strict=True):
        assert_as_exact_as(got, plain, wanted, gamma(PATH), scale=float(base.detach()))  # a difference of two losses


def test_repnoise_leaves_no_hook(tiny, sequences):
    model = tiny()
    config = dataclasses.replace(repnoise(), train=TrainConfig(steps=3, batch_size=8, lr=1e-3, micro_batch_size=4))
    unlearn(model, forget=sequences, retain=sequences, config=config, progress=False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_activation_checkpointing_changes_nothing_with_repnoise(tiny, sequences):
    trained = []
    for checkpointing in (False, True):
        model = tiny()
        settings = TrainConfig(steps=2, batch_size=8, lr=1e-2, activation_checkpointing=checkpointing, optimizer="sgd")
        config = dataclasses.replace(repnoise(), train=settings)
        unlearn(model, forget=sequences, retain=sequences, config=config, progress=False)
        trained.append(list(model.parameters()))
    assert_same_training(*trained, tiny().parameters(), 2)


@pytest.mark.parametrize("base", ["maxent", "rmu"])
def test_sam_is_the_gradient_at_a_moved_copy(tiny, sequences, base):
    data, counted = drawn(sequences)
    model = tiny()
    plain = UnlearnConfig(base)
    method = method_of(model, dataclasses.replace(plain, robust="sam", sam=SAMConfig(0.3)))
    before = [p.detach().clone() for p in model.parameters()]
    with method.alone(model):
        value = method.gradient(model, method.loss, data, counted, 5)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)), "the same bits"

    def by_hand(other):
        reference = METHODS[base](other, plain)
        with reference.alone(other):
            wanted = accumulate(other, reference.loss, data, counted, 5)
            gradients = [None if p.grad is None else p.grad.clone() for p in other.parameters()]
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))
            for parameter, gradient in zip(other.parameters(), gradients, strict=True):
                if gradient is not None:
                    parameter.data = parameter.data + 0.3 / norm * gradient
                    parameter.grad = None
            accumulate(other, reference.loss, data, counted, 5)
        return wanted, gradients

    other = tiny()
    wide = tiny().double() if base == "maxent" else tiny()  # what RMU compares with is float32
    (wanted, gradients), (exact, _) = by_hand(other), by_hand(wide)
    assert_same_function(value, wanted, exact)
    for got, there, far, first in zip(model.parameters(), other.parameters(), wide.parameters(), gradients, strict=True):
        assert (got.grad is None) == (there.grad is None)
        if got.grad is not None:
            assert_same_function(got.grad, there.grad, far.grad)
            assert not torch.equal(got.grad, first), "not the gradient here"


def test_both_passes_of_sam_draw_the_same_dropout(tokenizer, sequences):
    """The passes are so close that the two gradients differ only in what dropout draws."""
    data, counted = drawn(sequences)
    shape = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.3}
    plain, near = build_model(shape, tokenizer, 0).train(), build_model(shape, tokenizer, 0).train()
    method = method_of(near, UnlearnConfig("maxent", robust="sam", sam=SAMConfig(1e-6)))
    with seeded(torch.device("cpu"), 1):
        accumulate(plain, method.loss, data, counted, 5)
    with seeded(torch.device("cpu"), 1):
        method.gradient(near, method.loss, data, counted, 5)
    a, b = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (near, plain))
    assert (a - b).norm() <= 1e-3 * b.norm()


def test_sam_restores_after_a_failure(tiny):
    model = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    with pytest.raises(RuntimeError, match="in the middle"), moved(list(model.parameters()), 0.5):
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        raise RuntimeError("in the middle")
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


EVERY = [
    UnlearnConfig("npo"),
    UnlearnConfig("simnpo"),
    UnlearnConfig("undial"),
    UnlearnConfig("maxent", robust="sam"),
    UnlearnConfig("npo", robust="sam"),
    UnlearnConfig("rmu", robust="repnoise"),
    UnlearnConfig("graddiff", retain_weight=4.0, robust="repnoise"),
]


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.title)
def test_a_resumed_run_ends_with_the_same_bits(tiny, sequences, tmp_path, config):
    """The run ends after the third step by an exception, like a kill, and resumes from its checkpoint with a fresh original."""
    settings = TrainConfig(steps=5, batch_size=8, lr=1e-3, micro_batch_size=5, eval_every=1)
    config = dataclasses.replace(config, train=settings)
    whole, resumed = tiny(), tiny()
    result = unlearn(whole, forget=sequences, retain=sequences, config=config, progress=False)
    assert result.steps == 5

    seen = []

    def fail(model):
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return {}

    options = {"forget": sequences, "retain": sequences, "config": config, "folder": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        unlearn(resumed, **options, evaluate=fail, checkpoint_seconds=0.0)
    assert list((tmp_path / "checkpoint").glob("step-*"))
    resumed = tiny()
    unlearn(resumed, **options, evaluate=lambda model: {}, checkpoint_seconds=0.0)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("config", [
    UnlearnConfig("npo", npo=NPOConfig(0.5)),
    UnlearnConfig("simnpo", simnpo=SimNPOConfig(0.5)),
    UnlearnConfig("undial"),
    UnlearnConfig("maxent", robust="sam"),
    UnlearnConfig("maxent", robust="repnoise", repnoise=RepNoiseConfig(0.5, 0.1)),
], ids=lambda config: config.title)  # fmt: skip
def test_it_forgets_and_keeps(tiny, sequences, config):
    low = sequences.input_ids[:, 1] < 7
    forget, retain = Sequences(sequences.input_ids[low], 0), Sequences(sequences.input_ids[~low], 0)
    model = tiny()
    before = {"forget": evaluate(model, forget)["value"], "retain": evaluate(model, retain)["value"]}
    config = dataclasses.replace(config, train=TrainConfig(steps=100, batch_size=16, lr=5e-3))
    unlearn(model, forget=forget, retain=retain, config=config, progress=False)
    gap = evaluate(model, forget)["value"] - evaluate(model, retain)["value"]
    assert evaluate(model, retain)["value"] < before["retain"] - 0.3
    assert gap > before["forget"] - before["retain"] + 0.3


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: NPOConfig(0.0), "beta"),
        (lambda: NPOConfig(unit="batch"), "unit"),
        (lambda: SimNPOConfig(beta=-1.0), "beta"),
        (lambda: SimNPOConfig(gamma=-1.0), "gamma"),
        (lambda: UNDIALConfig(11.0), "gamma"),
        (lambda: SAMConfig(0.0), "rho"),
        (lambda: RepNoiseConfig(alpha=-1.0), "alpha"),
        (lambda: RepNoiseConfig(alpha=0.0, beta=0.0), "alpha"),
        (lambda: RepNoiseConfig(layers=0), "layers"),
        (lambda: UnlearnConfig(robust="steel"), "robust"),
        (lambda: UnlearnConfig(robust="sam", train=TrainConfig(precision="bfloat16-master")), "robust"),
        (lambda: UnlearnConfig(robust="sam", train=TrainConfig(step_in_backward=True)), "robust"),
        (lambda: UnlearnConfig(robust="sam", train=TrainConfig(optimizer="adamw-offload")), "robust"),
    ],
)
def test_bad_settings_are_named(make, key):
    with pytest.raises(ValueError, match=f"^{key}: got"):
        make()


def test_a_key_knows_what_is_used_alone():
    plain = UnlearnConfig()
    assert set(plain.settings()) == {"method", "retain_weight", "rmu", "train"}, "keys from before there were more methods"
    assert dataclasses.replace(plain, npo=NPOConfig(3.0)).settings() == plain.settings()
    used = UnlearnConfig("npo", npo=NPOConfig(3.0), robust="sam")
    assert used.settings()["npo"]["beta"] == 3.0 and used.settings()["sam"] and used.settings()["robust"] == "sam"


def test_flops_count_every_pass(tiny):
    model = tiny()
    costs = {
        name: unlearn_flops(model, UnlearnConfig(*name.split("+")[:1], robust=(name + "+none").split("+")[1]), 8)
        for name in ("maxent", "maxent+sam", "npo", "npo+sam", "undial", "rmu", "rmu+sam", "maxent+repnoise")
    }
    forward = costs["maxent"]["forget"] / 3
    assert costs["maxent+sam"]["forget"] == 2 * costs["maxent"]["forget"]
    assert costs["npo"]["forget"] == pytest.approx(4 * forward) and costs["npo"]["retain"] == pytest.approx(3 * forward)
    assert costs["npo+sam"]["forget"] == pytest.approx(7 * forward), "the reference is computed once"
    assert costs["undial"]["forget"] > 4 * forward
    assert costs["rmu+sam"] == {name: 2 * value for name, value in costs["rmu"].items()}
    assert costs["maxent+repnoise"]["forget"] > 6 * forward - 1e-6
    assert not set(METHODS) & set(ROBUST)


OWN = '''
"""Ascent, scaled."""

from dataclasses import dataclass

from undo_core.training.losses import cross_entropy
from undo_core.unlearning.method import Method, forget_and_retain, register


@dataclass(frozen=True)
class ScaledConfig:
    """Settings of the scaled ascent alone.

    Attributes:
        scale: factor on the ascent.
    """

    scale: float = 1.0


@register("scaled", "Scaled ascent", settings=ScaledConfig)
def scaled(model, config):
    return Method(forget_and_retain(lambda *of: -config.scaled.scale * cross_entropy(*of), model, config))
'''


def test_a_method_is_one_file(tmp_path):
    """In a copy of the package with one more file, its name and settings are in the help, the configuration and the plan."""
    package = Path(undo_core.__file__).parent
    shutil.copytree(package, tmp_path / "undo_core", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "undo_core" / "unlearning" / "scaled.py").write_text(OWN)
    program = """
        import sys
        from undo_core.cli import main
        demo = ["plan", sys.argv[1], "--output=nowhere", "--unlearn.method=scaled"]
        assert main([*demo, "--unlearn.scaled.scale=0.5"]) == 0
        assert main([*demo, "--unlearn.scaled.scale=much"]) == 2
        main(["unlearn", "--help"])
    """
    kernels = str(Path(undo_kernels.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{kernels}", "COLUMNS": "200"}
    demo = str(Path(__file__).resolve().parents[3] / "configs" / "arithmetic-cpu.yaml")
    command = [sys.executable, "-c", textwrap.dedent(program), demo]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "unlearn scaled" in done.stdout and "scaled.scale" in done.stdout and "factor on the ascent" in done.stdout
    assert "undo: error:" in done.stderr and "scale" in done.stderr
    assert not (package / "unlearning" / "scaled.py").exists()


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).resolve().parents[3] / "configs" / "methods").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_overlay_is_read_over_the_demo(path):
    demo = str(path.parents[1] / "arithmetic-cpu.yaml")
    config = run_config(["--config", demo, "--config", str(path)]).unlearn
    assert config.title == path.stem.replace("-", "+")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match=r"^name: got 'npo'"):
        register("npo", "Another")(lambda model, config: None)


def test_the_memory_of_every_method_is_predicted(tiny):
    settings = TrainConfig(steps=5, batch_size=8, micro_batch_size=4)
    predict = Predictor(tiny().config, 64, device="cuda")

    def parts(config):
        stage = Unlearn(config=dataclasses.replace(config, train=settings), prepared=NOWHERE, model=NOWHERE)
        return predict(stage, torch.float32)

    plain, peaks = parts(UnlearnConfig()), {config.title: parts(config) for config in EVERY}
    assert peaks["undial"].weights == 2 * plain.weights, "a copy of the original"
    assert peaks["npo"].weights == plain.weights, "no copy"
    assert all(peak.total > 0 for peak in peaks.values())
