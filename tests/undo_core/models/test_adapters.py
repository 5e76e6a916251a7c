"""Models with adapters of peft: only the adapters are trained, with the loss and gradients of peft's own forward pass."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from rounding import PATH, assert_rounded, assert_same_function, assert_same_training, gamma
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from undo_core import (
    AttackConfig,
    TrainConfig,
    UnlearnConfig,
    cache_teacher,
    damage_,
    distill,
    evaluate,
    noise_,
    relearn,
    unlearn,
)
from undo_core.data.sequences import Sequences
from undo_core.distillation.cache import CachedTeacher
from undo_core.distillation.teacher import ModelTeacher
from undo_core.models import UnsupportedHead, head_of, hidden_states, vocabulary_of
from undo_core.training.batches import as_batch
from undo_core.training.losses import cross_entropy, distillation
from undo_core.unlearning import RMUConfig

peft = pytest.importorskip("peft")

TRAIN = TrainConfig(steps=2, batch_size=8, lr=1e-2)
LAYERS = ["q_proj", "down_proj"]
KINDS = {
    "lora": {"target_modules": LAYERS},
    "lora on the head": {"target_modules": [*LAYERS, "lm_head"], "lora_alpha": 3},
    "lora on everything": {"target_modules": "all-linear"},
    "copy of the head": {"target_modules": LAYERS, "modules_to_save": ["lm_head"]},
    "dora": {"target_modules": LAYERS, "use_dora": True},
    "dropout": {"target_modules": LAYERS, "lora_dropout": 0.3},
}


def base(seed=0, dtype=torch.float32, **settings):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        **{
            "vocab_size": 24,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "initializer_range": 0.2,
            **settings,
        },
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def adapted(kind="lora", seed=0, model=None, **more):
    """Returns a model with adapters whose second factor is not 0, unlike at peft's initialisation."""
    model = base(seed) if model is None else model
    torch.manual_seed(seed + 10)
    made = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=3, **{**KINDS[kind], **more}))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.add_(0.1 * torch.randn_like(p))
    return made


@pytest.fixture
def text():
    return Sequences(torch.randint(1, 24, (16, 9), generator=torch.Generator().manual_seed(3)).int(), 0)


@pytest.fixture
def batch(text):
    return as_batch(text.input_ids.long())


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_pefts(kind, batch):
    model, teacher = adapted(kind).eval(), adapted("lora on the head", 5).eval()
    ids = batch.input_ids
    got = [
        (float(loss.detach()), gradients(model, loss))
        for loss in (
            cross_entropy(model, batch, batch.counted),
            distillation(model, ModelTeacher(teacher).targets(batch), batch, batch.counted),
        )
    ]

    def by_peft(model, teacher):
        z = model(input_ids=ids).logits[:, :-1]
        with torch.no_grad():
            t = teacher(input_ids=ids).logits[:, :-1].log_softmax(-1)
        kl = F.kl_div(z.log_softmax(-1), t, log_target=True, reduction="none").sum(-1).mean()
        z = model(input_ids=ids).logits[:, :-1]
        losses = F.cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten()), kl
        return [(float(loss.detach()), gradients(model, loss)) for loss in losses]

    plain, exact = by_peft(model, teacher), by_peft(model.double(), teacher.double())
    for (value, mine), (same, theirs), (wanted, wide) in zip(got, plain, exact, strict=True):
        assert_same_function(value, same, wanted)
        assert mine.keys() == wide.keys() and all("lora" in name or "modules_to_save" in name for name in mine)
        for name, gradient in wide.items():
            assert_same_function(mine[name], theirs[name], gradient, name)


def test_the_head_in_16_bits_keeps_a_small_adapter(batch):
    model = adapted("lora on the head", model=base(dtype=torch.bfloat16)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(1e-3)  # far below half a step of the bfloat16 weight
    head = head_of(model)
    assert head.weight.dtype == torch.float32
    layer = model.get_base_model().lm_head
    wanted = layer.weight.double() + layer.scaling["default"] * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    low, up = (part["default"].weight.double().abs() for part in (layer.lora_A, layer.lora_B))
    magnitude = layer.weight.double().abs() + abs(layer.scaling["default"]) * (up @ low)
    assert_rounded(head.weight, wanted, magnitude, terms=len(low) + 4)  # inner products of the rank, scaled and added
    assert not torch.equal(head.weight, layer.weight.float())
    assert torch.isfinite(cross_entropy(model, batch, batch.counted))


def frozen_bits(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def only_adapters_move(model, run):
    frozen, trained = frozen_bits(model), {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    run(model)
    now = dict(model.named_parameters())
    assert frozen_bits(model).keys() == frozen.keys()
    for name, before in frozen.items():
        assert now[name].dtype == before.dtype and torch.equal(now[name], before), name
    return [name for name, before in trained.items() if not torch.equal(now[name].to(before.dtype), before)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_distill_moves_the_adapters_alone(kind, precision, text):
    config = TrainConfig(steps=2, batch_size=8, lr=1e-2, precision=precision, activation_checkpointing=True)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = adapted(kind, model=base(dtype=dtype))
    seen = []
    run = lambda m: distill(m, base(1), text, config, evaluate=lambda m: seen.append(m) or {}, progress=False)  # noqa: E731
    moved = only_adapters_move(model, run)
    assert len(moved) == sum(p.requires_grad for p in model.parameters())
    assert all(m is model for m in seen) and not any(m.training for m in model.modules())


def test_a_16_bit_base_under_float32_adapters_stays(text):
    model = adapted("lora on the head", model=base(dtype=torch.bfloat16))
    assert only_adapters_move(model, lambda m: distill(m, base(1), text, TRAIN, progress=False))
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    copied = adapted("copy of the head", model=base(dtype=torch.bfloat16))
    with pytest.raises(
        ValueError, match=r"precision: got weights of float32 for lm_head, a trained copy .* frozen model of bfloat16"
    ):
        distill(copied, base(1), text, TRAIN, progress=False)


METHODS = [
    {"method": "maxent"},
    {"method": "graddiff"},
    {"method": "npo"},
    {"method": "simnpo"},
    {"method": "undial"},
    {"method": "maxent", "retain_loss": "kl"},
    {"method": "maxent", "robust": "sam"},
    {"method": "maxent", "robust": "repnoise"},
    {"method": "rmu", "rmu": RMUConfig(first_layer=0, target_layer=2)},
]


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: "-".join(str(v) for v in s.values() if isinstance(v, str)))
def test_every_method_moves_the_adapters_alone(settings, text):
    model = adapted("lora on the head")
    config = UnlearnConfig(train=TRAIN, **settings)
    moved = only_adapters_move(model, lambda m: unlearn(m, forget=text, retain=text, config=config, progress=False))
    if settings["method"] == "rmu":
        assert moved and all("down_proj.lora" in name for name in moved)
    else:
        assert len(moved) == sum(p.requires_grad for p in model.parameters())


def test_unlearning_is_that_of_the_merged_model_at_first(text):
    """The losses before the first step do not depend on whether adapters are merged."""
    model = adapted("lora on the head")
    merged = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    for method in ("npo", "undial", "maxent"):
        config = UnlearnConfig(method=method, train=TrainConfig(steps=1, batch_size=8, lr=0.0))
        values = [
            unlearn(copy.deepcopy(m), forget=text, retain=text, config=config, progress=False).history[-1]["loss"]
            for m in (model, merged)
        ]
        assert values[0] == pytest.approx(values[1], rel=2 * gamma(PATH))  # each has the roundings of its own path


def test_relearn_evaluate_cache_and_resume(text, tmp_path):
    model, merged = adapted("lora on the head"), adapted("lora on the head").merge_and_unload()
    assert evaluate(model, text)["value"] == pytest.approx(evaluate(merged, text)["value"], rel=2 * gamma(PATH))
    assert vocabulary_of(model) == 24
    ids = text.input_ids.long()
    exact = hidden_states(copy.deepcopy(merged).double().eval(), ids)
    assert_same_function(hidden_states(model.eval(), ids), hidden_states(merged.eval(), ids), exact)
    attack = AttackConfig(rates=[1e-2], evaluate_at=[0, 2], headline_step=2, batch_size=8, extend=0)
    before = frozen_bits(model)
    scored = lambda m: {"forget": evaluate(m, text)["value"]}  # noqa: E731
    (result,) = relearn(model, text, attack, evaluate=scored, higher_is_better=False, progress=False).values()
    assert result.history[-1]["forget"] < result.history[0]["forget"]
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    lora = AttackConfig(kind="lora", rates=[1e-2], evaluate_at=[0, 2], headline_step=2, batch_size=8, extend=0)
    with pytest.raises(ValueError, match="kind: got lora for a model that has adapters already"):
        relearn(model, text, lora, evaluate=scored, progress=False)
    known = cache_teacher(model, text, tmp_path / "cache", progress=False)
    students = [base(2), base(2)]
    linear = dataclasses.replace(TRAIN, optimizer="sgd")
    distill(students[0], known, text, linear, progress=False)
    distill(students[1], model, text, linear, progress=False)
    assert_same_training(*(s.parameters() for s in students), base(2).parameters(), linear.steps)
    options = {"folder": tmp_path / "run", "checkpoint_seconds": 0.0, "progress": False}
    a, b = adapted(), adapted()
    distill(a, base(1), text, TRAIN, **options)
    distill(b, base(1), text, TRAIN, **options)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"model.weights"):
        distill(adapted(seed=1), base(1), text, TRAIN, **options)


def test_a_folder_is_of_the_adapters_settings_too(text, tmp_path):
    """The weights are equal, but scale, dropout and the active adapter decide what they compute."""

    def disabled(model):
        model.base_model.disable_adapter_layers()
        return model

    run = lambda student, teacher: distill(  # noqa: E731
        student, teacher, text, TRAIN, folder=tmp_path / "run", checkpoint_seconds=0.0, progress=False
    )
    run(adapted(), adapted(seed=5))
    run(adapted(), adapted(seed=5))
    for more in ({"lora_alpha": 99}, {"lora_dropout": 0.3}, {"use_rslora": True}):
        with pytest.raises(ValueError, match=r"with a checkpoint made with model.adapters \w+; wanted model.adapters"):
            run(adapted(**more), adapted(seed=5))
    for teacher in (adapted(seed=5, lora_alpha=99), disabled(adapted(seed=5))):
        with pytest.raises(ValueError, match=r"with a checkpoint made with teacher.adapters \w+; wanted teacher.adapters"):
            run(adapted(), teacher)
    cache_teacher(adapted(), text, tmp_path / "cache", progress=False)
    assert CachedTeacher.open(tmp_path / "cache", adapted())
    with pytest.raises(ValueError, match="other settings of the adapters"):
        CachedTeacher.open(tmp_path / "cache", adapted(lora_alpha=99))
    cache_teacher(base(), text, tmp_path / "plain", progress=False)
    base().save_pretrained(tmp_path / "saved")
    base(rope_parameters={"rope_type": "default", "rope_theta": 3.0}).save_pretrained(tmp_path / "other")
    assert CachedTeacher.open(tmp_path / "plain", tmp_path / "saved")
    with pytest.raises(ValueError, match="another model configuration"):
        CachedTeacher.open(tmp_path / "plain", tmp_path / "other")


def test_other_adapters_of_layers_work(text):
    kinds = [
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=LAYERS, r=2),
        peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
    ]
    for config in kinds:
        model = peft.get_peft_model(base(), config)
        assert only_adapters_move(model, lambda m: distill(m, base(1), text, TRAIN, progress=False))


def test_damage_is_of_one_model_not_of_adapters_beside_a_frozen_one(text):
    for model in (adapted(), nn.DataParallel(adapted("lora on the head"))):
        before = [p.detach().clone() for p in model.parameters()]
        for change in (lambda m: noise_(m, alpha=0.5, seed=1), lambda m: damage_(m, "prune", strength=0.5, seed=1)):
            with pytest.raises(
                ValueError, match=r"^model: got \w+ with adapters, .*wanted them merged \(model.merge_and_unload"
            ):
                change(model)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    merged = adapted().merge_and_unload()
    for change in (lambda m: noise_(m, alpha=0.5, seed=1), lambda m: distill(m, base(1), text, TRAIN)):
        with pytest.raises(ValueError, match=r"got none .*requires_grad_\(\)"):
            change(merged)
    plain = base()
    plain.load_state_dict(merged.state_dict())
    assert noise_(merged.requires_grad_(), alpha=0.5, seed=1) == noise_(plain, alpha=0.5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), plain.parameters(), strict=True))


def test_what_cannot_be_is_refused_by_name(text):
    def refused(model, message, error=ValueError, teacher=None):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with pytest.raises(error, match=message):
            distill(model, teacher or base(1), text, TrainConfig(steps=1, batch_size=8, precision="bfloat16"), progress=False)
        for name, p in model.named_parameters():
            assert p.dtype == before[name].dtype and torch.equal(p, before[name])

    prompts = peft.get_peft_model(base(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    refused(prompts, "PeftModelForCausalLM of kind PROMPT_TUNING, whose wrapper computes something else")
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        evaluate(prompts, text)
    head = {"target_modules": ["lm_head"]}
    for config in (
        peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, **head),
        peft.IA3Config(task_type="CAUSAL_LM", feedforward_modules=[], **head),
    ):
        refused(
            peft.get_peft_model(base(), config),
            r"output layer has an adapter, a \w+, that is not plain LoRA; wanted a merged adapter",
            UnsupportedHead,
        )
    refused(adapted("lora on the head", lora_dropout=0.2), "lora_dropout 0.2 in the adapter default of the output layer")
    model = base()
    refused(adapted(model=model), "teacher: got a model whose .*lora_A.* is also the student's", teacher=model)
