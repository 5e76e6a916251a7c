"""ILU, CIR and Top-k against their formulas in float64 on the logits and layers of transformers, and within `unlearn`."""

import copy
import dataclasses
import functools

import pytest
import torch
from rounding import assert_same_function, assert_same_training, unit
from stage_kinds import NOWHERE
from torch.func import functional_call
from unlearning_inputs import changed, drawn

from undo_core import TrainConfig, UnlearnConfig, unlearn
from undo_core.data.sequences import Sequences
from undo_core.data.tokenizers import character_tokenizer
from undo_core.evaluation.metrics import evaluate
from undo_core.models import build_model, forward_flops
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.stages import Unlearn
from undo_core.pipeline.stages.pretrain import next_token_loss
from undo_core.training import sequence_source, train
from undo_core.training.loop import accumulate
from undo_core.unlearning import method_of, referred, unlearn_flops
from undo_core.unlearning.cir import CIRConfig, collapsing, principal
from undo_core.unlearning.ilu import ILUConfig
from undo_core.unlearning.topk import TopKConfig, suppressed


def ce(model, batch, parameters=None):
    """Mean cross-entropy from logits of transformers, with other parameters if they are given."""
    call = {"input_ids": batch.input_ids}
    z = (model(**call) if parameters is None else functional_call(model, parameters, (), call)).logits[:, :-1]
    nats = -z.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return nats[batch.mask[:, 1:]].mean()


# -- ILU -----------------------------------------------------------------------------------------------------------------------


def ilu(step, base="graddiff", **settings):
    return UnlearnConfig(base, robust="ilu", ilu=ILUConfig(0.7, step), retain_weight=2.0, **settings)


def gradients(model):
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()])


LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}  # its norms compute in float64


def test_ilu_adds_the_squared_quotient_and_its_exact_gradient(tokenizer, sequences):
    """In float64, both at any step; the weights keep their bits, and micro-batches change nothing."""
    data, counted = drawn(sequences)
    for micro in (None, 5):
        model = build_model(GPT2, tokenizer, 0).double().eval()
        other, before = copy.deepcopy(model), [p.detach().clone() for p in model.parameters()]
        method = method_of(model, ilu(0.05))
        value = method.gradient(model, method.loss, data, counted, micro)
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)), "the same bits"
        named = dict(other.named_parameters())
        up, down = (ce(other, data["retain"], {n: s * p for n, p in named.items()}) for s in (1.05, 0.95))
        wanted = -ce(other, data["forget"]) + 2 * ce(other, data["retain"]) + 0.7 * ((up - down) / 0.1) ** 2
        wanted.backward()
        assert abs(float(value - wanted.detach())) < 1e-12 * abs(float(wanted.detach()))
        assert float((gradients(model) - gradients(other)).norm()) < 1e-11 * float(gradients(other).norm())


def test_ilu_is_the_penalty_of_invariant_risk_minimisation_to_second_order(tokenizer, sequences):
    """``(theta . grad CE)**2`` and its gradient by a double backward pass; half the step leaves a quarter of the error."""
    data, counted = drawn(sequences)
    exact = build_model(GPT2, tokenizer, 0).double().eval()
    exact.set_attn_implementation("eager")  # sdpa has no second derivative
    parameters = list(exact.parameters())
    slopes = torch.autograd.grad(ce(exact, data["retain"]), parameters, create_graph=True)
    penalty = 0.7 * sum((p * g).sum() for p, g in zip(parameters, slopes, strict=True)) ** 2
    (penalty - ce(exact, data["forget"]) + 2 * ce(exact, data["retain"])).backward()
    errors = []
    for step in (0.02, 0.01):
        model = copy.deepcopy(exact)
        model.zero_grad()
        method = method_of(model, ilu(step))
        method.gradient(model, method.loss, data, counted, None)
        errors.append(float((gradients(model) - gradients(exact)).norm()))
    assert errors[1] < 1e-2 * float(gradients(exact).norm())
    assert 3.9 < errors[0] / errors[1] < 4.1


@pytest.mark.parametrize("base", ["npo", "rmu", "cir"])
def test_ilu_goes_around_any_method(tiny, sequences, base):
    """It adds the same to each, to the parameters that the method trains."""
    data, counted = drawn(sequences)
    added = []
    for robust in ("none", "ilu"):
        model = tiny()
        method = method_of(model, dataclasses.replace(ilu(0.01, base), robust=robust))
        given = {**data, "forget": referred(model, data["forget"], method)} if method.reference else data
        with method.alone(model):
            method.gradient(model, method.loss, given, counted, 5)
        added.append([p.grad for p in model.parameters()])
    assert [g is None for g in added[0]] == [g is None for g in added[1]]
    assert any(not torch.equal(a, b) for a, b in zip(*added, strict=True) if a is not None)


# -- Top-k ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 64])
def test_topk_is_the_divergence_of_the_outcomes_written_out(tiny, sequences, k):
    """The original is sure of some labels, so that some are among the k tokens and some are not."""
    data, counted = drawn(sequences)
    original = tiny()
    original.lm_head.weight.data.mul_(30)
    config = UnlearnConfig("topk", topk=TopKConfig(k, 3.0), retain_weight=2.0)
    method, model = method_of(original, config), changed(copy.deepcopy(original))
    given = {**data, "forget": referred(original, data["forget"], method)}

    def by_hand(model, original):
        batch, terms = data["forget"], []
        r, p = (m(input_ids=batch.input_ids).logits[:, :-1].softmax(-1) for m in (original, model))
        for row, column in batch.mask[:, 1:].nonzero().tolist():
            one, label = r[row, column].detach(), int(batch.input_ids[row, column + 1])
            lowered = one.clone()
            lowered[label] *= torch.exp(torch.tensor(-3.0, dtype=one.dtype))
            lowered = lowered / lowered.sum()
            outcomes = one.sort(descending=True).indices[:k].tolist()
            if label not in outcomes:
                outcomes[-1] = label
            rest = [v for v in range(len(one)) if v not in outcomes]
            q, s = (torch.cat([d[outcomes], d[rest].sum()[None]][: 1 + bool(rest)]) for d in (lowered, p[row, column]))
            terms.append((q * (q / s).log()).sum())
        return sum(terms) / len(terms) + 2 * ce(model, data["retain"])

    same, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    plain, wanted = by_hand(same, copy.deepcopy(original)), by_hand(wide, copy.deepcopy(original).double())
    plain.backward(), wanted.backward()
    for micro in (None, 5):
        model.zero_grad()
        assert_same_function(accumulate(model, method.loss, given, counted, micro), plain, wanted)
        assert_same_function(*([p.grad for p in m.parameters()] for m in (model, same, wide)))


def test_a_certain_label_is_suppressed_without_cancellation():
    """Where the original gives the label all but 1e-12, the others have exp(gamma) times more than they had."""
    left = torch.tensor([0.75e-12, 0.25e-12], dtype=torch.float64)
    nats = -torch.log1p(-left.sum())
    indices, logprobs = suppressed(
        torch.tensor([[7, 2, 5]]), torch.cat([-nats[None], left.log()])[None], torch.tensor([7]), nats[None], 10.0
    )
    lowered = torch.exp(torch.tensor(-10.0, dtype=torch.float64))
    wanted = torch.stack([lowered * (1 - left.sum()), *left]) / (lowered * (1 - left.sum()) + left.sum())
    assert indices.tolist() == [[7, 2, 5]]
    assert torch.allclose(logprobs.exp()[0], wanted, rtol=1e-12, atol=0)


# -- CIR -----------------------------------------------------------------------------------------------------------------------

CIR = UnlearnConfig("cir", cir=CIRConfig(0, 2, inputs=3, gradients=2, samples=60), retain_weight=2.0)


def test_principal_directions_are_the_mean_and_the_eigenvectors_of_the_covariance():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator) * torch.tensor([9.0, 6, 4, 2.5, 1, 1, 1, 1]) + 3
    got = principal(x, 3)
    wide = x.double()
    values, vectors = torch.linalg.eigh(torch.cov(wide.T))
    wanted = torch.cat([wide.mean(0)[:, None], vectors[:, -3:]], 1)
    wanted = wanted @ torch.linalg.pinv(wanted)  # the projector on their span
    # Davis and Kahan: rounding of the matrix, relative to the gap to the next eigenvalue.
    allowed = 4 * len(x) * unit() * float(values[-1] / (values[-4] - values[-5]))
    assert float((got.double() @ got.double().T - wanted).norm()) <= allowed < 0.01
    assert float((got.T @ got - torch.eye(4)).norm()) < 100 * unit()


@pytest.mark.parametrize(
    ("rank", "tokens", "shift"), [(3, 100, 2.0), (3, 100, 0.0), (3, 2, 2.0), (1, 100, 0.0), (0, 10, 2.0), (0, 10, 0.0)]
)
def test_directions_that_the_vectors_do_not_have_are_not_collapsed(rank, tokens, shift):
    """They would be LAPACK's choice, which means nothing and may differ among machines."""
    generator = torch.Generator().manual_seed(1)
    space = torch.linalg.qr(torch.randn(16, 4, generator=generator)).Q
    x = torch.randn(tokens, rank, generator=generator) @ space[:, :rank].T + shift * space[:, 3]
    got, wanted = principal(x, 6).double(), torch.linalg.matrix_rank(x.double(), rtol=1e-5) if x.any() else 0
    assert float(((got @ got.T) @ x.double().T - x.double().T).norm()) < 1e-4, "all that they have is collapsed"
    assert float((got @ got.T).trace()) == pytest.approx(float(wanted), abs=1e-4), "and nothing else"


def published(model, original, data, bases):
    """Gradients of the layers' matrices, as sums over tokens of their inputs and the gradients of their outputs."""
    batch, calls, outs = data["forget"], {}, {"own": [], "first": []}
    hooks = []
    for key, one in (("own", model), ("first", original)):
        hooks += [layer.mlp.register_forward_hook(lambda m, i, o, key=key: outs[key].append(o)) for layer in one.model.layers]
    names = {f"{k}.{n}": m for k, layer in enumerate(model.model.layers) for n, m in layer.mlp.named_children() if "proj" in n}
    hooks += [m.register_forward_hook(lambda m, i, o, n=n: calls.update({n: (i[0], o)})) for n, m in names.items()]
    for one in (model, original):
        one(input_ids=batch.input_ids[:, :-1])
    for hook in hooks:
        hook.remove()
    keep, terms = batch.mask[:, 1:], []
    for own, first in zip(outs["own"], outs["first"], strict=True):
        m, m0 = own[keep], first[keep].detach()
        terms.append((torch.relu((m * m0).sum(-1)) / (m0 * m0).sum(-1)).mean())
    value = sum(terms) / len(terms)
    slopes = torch.autograd.grad(value, [o for _, o in calls.values()], retain_graph=True)
    retained = ce(model, data["retain"])
    found = {}
    for (name, (a, _)), g in zip(calls.items(), slopes, strict=True):
        left, right = ((torch.eye(len(q), dtype=q.dtype) - q @ q.T) for q in (bases[name][1], bases[name][0]))
        sums = sum(torch.outer(left @ one, right @ other) for one, other in zip(g.flatten(0, 1), a.flatten(0, 1), strict=True))
        found[name] = sums + 2 * torch.autograd.grad(retained, names[name].weight, retain_graph=True)[0]
    return value + 2 * retained, found


def test_cir_collapses_the_directions_of_the_forget_gradient_alone(tiny, sequences):
    data, counted = drawn(sequences)
    original = tiny()
    method = method_of(original, CIR)
    source = sequence_source(sequences, 12, 3)
    with method.alone(original):
        method.prepare(original, source)
    cells = dict(zip(method.gradient.__code__.co_freevars, method.gradient.__closure__, strict=True))
    inside = {f"{k}.{n}": m for k, layer in enumerate(original.model.layers) for n, m in layer.mlp.named_children()}
    bases = {name: cells["bases"].cell_contents[m] for name, m in inside.items() if "proj" in name}
    assert {name: tuple(b.shape for b in both) for name, both in bases.items()} == {
        f"{k}.{n}_proj": ((d, 4), (o, 3)) for k in (0, 1) for n, d, o in (("gate", 16, 32), ("up", 16, 32), ("down", 32, 16))
    }
    first = copy.deepcopy(original)
    changed(torch.nn.ModuleList(layer.mlp for layer in original.model.layers))  # in place, as in training
    plain, exact = copy.deepcopy(original), copy.deepcopy(original).double()
    wide = {name: tuple(b.double() for b in both) for name, both in bases.items()}
    value, there = published(plain, first, data, bases)
    wanted, far = published(exact, copy.deepcopy(first).double(), data, wide)
    for micro in (None, 5):
        original.zero_grad()
        with method.alone(original):
            got = method.gradient(original, method.loss, data, counted, micro)
        assert_same_function(got, value, wanted)
        for name in there:
            assert_same_function(inside[name].weight.grad, there[name], far[name], name)
        trained = {id(m.weight) for name, m in inside.items() if "proj" in name}
        assert all((p.grad is not None) == (id(p) in trained) for p in original.parameters())
    assert not any("forward" in vars(m) for m in original.modules()), "the layers are as before"


def test_cirs_directions_are_of_the_first_tokens_of_the_original(tiny, sequences):
    """The spans are those of inputs and output gradients that hooks see in a model of transformers."""
    model, source, bases = tiny(), sequence_source(sequences, 12, 3), {}
    method = method_of(model, CIR)
    with method.alone(model):
        method.prepare(model, source)
    cells = dict(zip(method.gradient.__code__.co_freevars, method.gradient.__closure__, strict=True))
    bases, module = cells["bases"].cell_contents, model.model.layers[1].mlp.up_proj
    wide, seen, outs = copy.deepcopy(model).double(), [], []
    hooks = [layer.mlp.register_forward_hook(lambda m, i, o: outs.append(o)) for layer in wide.model.layers]
    hooks.append(wide.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, i, o: seen.append((i[0], o))))
    inputs, slopes = [], []
    for step in range(2):
        batch = source(step)
        wide(input_ids=batch.input_ids[:, :-1])
        value = sum(((o * o.detach()).sum(-1) / (o * o).sum(-1).detach()).sum() for o in outs)
        keep, (a, o) = batch.mask[:, 1:], seen.pop()
        slopes.append(torch.autograd.grad(value, o)[0][keep])
        inputs.append(a[keep].detach())
        outs.clear()
    for hook in hooks:
        hook.remove()
    for vectors, basis, count in zip((inputs, slopes), bases[module], (3, 2), strict=True):
        x = torch.cat(vectors)[:60]
        assert len(x) == 60, "two batches are enough"
        values, directions = torch.linalg.eigh(torch.cov(x.T))
        wanted = torch.cat([x.mean(0)[:, None], directions[:, -count:]], 1)
        wanted = wanted @ torch.linalg.pinv(wanted)
        gap = float(values[-1] / (values[-count] - values[-count - 1]))
        assert float((basis.double() @ basis.double().T - wanted).norm()) <= 512 * 8 * unit() * gap


def test_a_direction_of_all_tokens_leaves_no_update(tiny, sequences):
    """With a basis of the whole input space nothing is left of the forget gradient, and a retain gradient stays whole."""
    data, counted = drawn(sequences)
    model = tiny()
    method = method_of(model, dataclasses.replace(CIR, retain_weight=0.0))
    whole = {layer.mlp.up_proj: (torch.eye(16), torch.zeros(32, 1)) for layer in model.model.layers}
    with method.alone(model), collapsing(whole):
        accumulate(model, method.loss, {"forget": data["forget"]}, counted, None)
    assert all(not m.weight.grad.any() for m in whole) and model.model.layers[0].mlp.down_proj.weight.grad.any()


# -- all of them ---------------------------------------------------------------------------------------------------------------

EVERY = [
    UnlearnConfig("cir", cir=CIRConfig(inputs=1, gradients=1), retain_weight=0.3),
    UnlearnConfig("topk", topk=TopKConfig(4)),
    UnlearnConfig("maxent", robust="ilu", retain_weight=4.0),
]


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.title)
def test_a_resumed_run_ends_with_the_same_bits(tiny, sequences, tmp_path, config):
    """The run ends after the third step by an exception, like a kill, and resumes from its checkpoint with a fresh original."""
    config = dataclasses.replace(config, train=TrainConfig(steps=5, batch_size=8, lr=1e-3, micro_batch_size=5, eval_every=1))
    whole, seen = tiny(), []
    unlearn(whole, forget=sequences, retain=sequences, config=config, progress=False)

    def fail(model):
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return {}

    options = {"forget": sequences, "retain": sequences, "config": config, "folder": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        unlearn(tiny(), **options, evaluate=fail, checkpoint_seconds=0.0)
    assert list((tmp_path / "checkpoint").glob("step-*"))
    resumed = tiny()
    unlearn(resumed, **options, evaluate=lambda model: {}, checkpoint_seconds=0.0)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.title)
def test_a_step_applies_the_gradient_of_the_method(tiny, sequences, config):
    """Also to the embedding, which is tied to the head and trained by parts; SGD with rate 1 moves the weights by the gradient."""
    train = TrainConfig(steps=1, batch_size=12, micro_batch_size=5, lr=1.0, optimizer="sgd", beta1=0.0, clip=0.0)
    config, source = dataclasses.replace(config, train=train), sequence_source(sequences, 12, 3)
    model, other = tiny(), tiny()
    unlearn(model, forget=iter([source(0)]), retain=[source(1)], config=config, progress=False)
    method, data = method_of(other, config), {"forget": source(0), "retain": source(1)}
    if method.reference is not None:
        data["forget"] = referred(other, data["forget"], method)
    with method.alone(other):
        if method.prepare is not None:
            method.prepare(other, source)
        method.gradient(other, method.loss, data, {name: batch.counted for name, batch in data.items()}, None)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter -= 0 if parameter.grad is None else parameter.grad
    roundings = round(1 / config.ilu.step) if config.robust == "ilu" else 1  # of its difference quotient
    assert_same_training(model.parameters(), other.parameters(), tiny().parameters(), roundings)


@functools.cache
def learnt():
    """A model that has learnt the forget and the retain text, both texts, and its losses on them."""
    tokenizer = character_tokenizer("0123456789+-*/=")
    texts = [[1, *tokenizer.encode(f"{a}+{b}={a + b}", add_special_tokens=False), 1] for a in range(10) for b in range(10)]
    ids = torch.tensor([tokens + [0] * (8 - len(tokens)) for tokens in texts], dtype=torch.int32)
    low = ids[:, 1] < 7
    forget, retain = Sequences(ids[low], 0), Sequences(ids[~low], 0)
    model = build_model(LLAMA, tokenizer, 0)
    config = TrainConfig(steps=80, batch_size=32, lr=1e-2)
    train(model, next_token_loss, {"text": sequence_source(Sequences(ids, 0), 32, 0)}, config, progress=False)
    return model, {"forget": forget, "retain": retain}, losses(model, forget=forget, retain=retain)


def losses(model, **texts):
    return {name: evaluate(model, text)["value"] for name, text in texts.items()}


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.title)
def test_it_forgets_and_keeps(config):
    """The forget loss rises, by more than where the same weights learn the retain text alone; the retain loss does not rise."""
    original, texts, before = learnt()
    settings, model, other = TrainConfig(steps=40, batch_size=16, lr=5e-3), copy.deepcopy(original), copy.deepcopy(original)
    unlearn(model, **texts, config=dataclasses.replace(config, train=settings), progress=False)
    method, source = method_of(other, config), sequence_source(texts["retain"], 16, 1)
    with method.alone(other):
        train(other, next_token_loss, {"text": source}, settings, parameters=method.parameters, progress=False)
    after, control = (losses(one, **texts) for one in (model, other))
    assert after["forget"] > max(before["forget"], control["forget"]), (before, after, control)
    assert after["retain"] <= before["retain"], (before, after, control)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ILUConfig(0.0), "weight: got"),
        (lambda: ILUConfig(step=0.0), "step: got"),
        (lambda: TopKConfig(0), "k: got"),
        (lambda: TopKConfig(gamma=float("inf")), "gamma: got"),
        (lambda: CIRConfig(2, 2), "target_layer: got"),
        (lambda: CIRConfig(inputs=-1), "inputs: got"),
        (lambda: CIRConfig(samples=1), "samples: got"),
        (lambda: UnlearnConfig(robust="ilu", retain_weight=0.0), "robust: got ilu with retain_weight 0"),
        (lambda: UnlearnConfig(robust="ilu", train=TrainConfig(precision="bfloat16")), "robust: got ilu with train.precision"),
        (lambda: UnlearnConfig(robust="ilu", train=TrainConfig(step_in_backward=True)), "robust: got ilu with train.step"),
        (
            lambda: UnlearnConfig("cir", train=TrainConfig(step_in_backward=True)),
            "train.step_in_backward: got true with method cir",
        ),
        (lambda: UnlearnConfig("cir", robust="repnoise"), "robust: got repnoise with method cir"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        make()
    assert "\n" not in str(error.value)


def test_what_cir_cannot_train_is_named(tiny, tokenizer):
    from peft import LoraConfig, get_peft_model

    for settings, message in (
        (CIRConfig(target_layer=3), r"cir\.target_layer: got 3, wanted at most the model's 2 layers"),
        (CIRConfig(trained="*norm.weight"), r"cir\.trained: got a pattern that input_layernorm\.weight matches"),
        (CIRConfig(trained="*none"), r"cir\.trained: got '\*none', which no parameter"),
        (CIRConfig(inputs=15), r"cir\.inputs: got 15 for a matrix with 16 inputs, wanted at most 14"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            method_of(tiny(), UnlearnConfig("cir", cir=settings))
    adapted = get_peft_model(tiny(), LoraConfig(target_modules=["up_proj"], r=2)).get_base_model()
    with pytest.raises(ValueError, match=r"^method: got cir for a model with adapters"):
        method_of(adapted, UnlearnConfig("cir"))


def test_cir_trains_a_gpt2_whose_matrices_are_transposed(tokenizer, sequences):
    data, counted = drawn(sequences)
    model = build_model(GPT2, tokenizer, 0).eval()
    method = method_of(model, dataclasses.replace(CIR, retain_weight=0.0))
    with method.alone(model):  # without directions it is plain backpropagation
        accumulate(model, method.loss, {"forget": data["forget"]}, counted, None)
        wanted = [p.grad.clone() for p in method.parameters]
        model.zero_grad()
        method.gradient(model, method.loss, {"forget": data["forget"]}, counted, None)
    assert_same_function([p.grad for p in method.parameters], wanted, [g.double() for g in wanted])


def test_flops_and_keys_know_them(tiny):
    model = tiny()
    forward = forward_flops(model, 8)
    plain, around = (unlearn_flops(model, UnlearnConfig(robust=name), 8) for name in ("none", "ilu"))
    assert around == {"forget": plain["forget"], "retain": pytest.approx(plain["retain"] + 6 * forward)}
    assert unlearn_flops(model, UnlearnConfig("topk"), 8)["forget"] > 4 * forward, "the original's pass, and its head again"
    cir = unlearn_flops(model, UnlearnConfig("cir"), 8)
    assert cir["forget"] > 0 and forward < cir["retain"] < 3 * forward, "only the layers' matrices have a gradient"
    keys = UnlearnConfig().settings().keys()
    assert not {"cir", "topk", "ilu"} & keys
    assert {"cir", "ilu"} < UnlearnConfig("cir", robust="ilu").settings().keys()


def test_their_memory_is_predicted(tiny):
    settings = TrainConfig(steps=5, batch_size=8, micro_batch_size=4)
    predict = Predictor(tiny().config, 64, device="cuda")

    def backward(config):
        stage = Unlearn(config=dataclasses.replace(config, train=settings), prepared=NOWHERE, model=NOWHERE)
        return next(m for m in predict.phases(stage, torch.float32) if m.phase == "backward")

    plain, cir = backward(UnlearnConfig()), backward(UnlearnConfig("cir"))
    assert backward(UnlearnConfig("topk")).weights == plain.weights, "no copy of the model"
    assert backward(UnlearnConfig(robust="ilu")).total >= plain.total, "its passes have half the activations here"
    matrices, directions = 4 * 2 * 3 * 16 * 32, 4 * 2 * 3 * (16 + 32) * 13
    assert cir.weights == plain.weights + matrices + directions and cir.gradients < plain.gradients
