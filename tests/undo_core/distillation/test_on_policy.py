"""On-policy distillation: which steps it takes, what it draws, its loss and gradient in float64, resuming, keys and FLOPs."""

import copy
import dataclasses

import pytest
import torch
from rounding import assert_same_function
from stage_kinds import NOWHERE

from undo_core import TrainConfig, distill
from undo_core.data.sequences import Sequences
from undo_core.distillation import on_policy
from undo_core.distillation.config import DistillConfig
from undo_core.distillation.on_policy import OnPolicyConfig, Prompts, continued
from undo_core.distillation.teacher import TeacherConfig
from undo_core.distributed import head_ops
from undo_core.models import Head, build_model
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.needs import Scene
from undo_core.pipeline.stages import Distill
from undo_core.training import sequence_source
from undo_core.training.loop import Wanted

MODELS = {
    "gemma2": {"num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 3},
    "llama": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.3},
}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def sharp(kind, tokenizer, seed=0):
    """A model whose distributions are far from uniform."""
    model = build_model({"model_type": kind, **(SIZES if kind != "gpt2" else {}), **MODELS[kind]}, tokenizer, seed)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + number)))
    return model


@pytest.mark.parametrize(
    ("config", "steps", "wanted"),
    [
        (OnPolicyConfig(), 10, []),
        (OnPolicyConfig(1.0, 1.0), 4, [0, 1, 2, 3]),
        (OnPolicyConfig(0.5, 0.5), 6, [1, 3, 5]),
        (OnPolicyConfig(0.1, 0.1), 20, [9, 19]),
        (OnPolicyConfig(0.0, 1.0), 8, [3, 5, 6, 7]),
        (OnPolicyConfig(1.0, 0.0, over=4), 9, [1, 3]),
    ],
)
def test_the_share_of_steps_follows_the_schedule(config, steps, wanted):
    """A step is on-policy where the sum of the shares, an integral of a straight line, passes a whole number."""
    assert [step for step in range(steps) if config.takes(step, steps)] == wanted
    assert config.count(steps, steps) == len(wanted) and bool(config) == bool(wanted)


@pytest.mark.parametrize("kind", MODELS)
def test_the_student_draws_from_its_own_distributions(tokenizer, sequences, kind):
    """Each token is the one that the cumulative probabilities of transformers, without a cache, give for its number."""
    model, config = sharp(kind, tokenizer).train(), OnPolicyConfig(1.0, 1.0, prompt=3)
    given = Prompts(sequence_source(sequences, 12, 0), config, 4, seed=5)(2)
    assert not given.mask[:, :3].any() and given.reference.shape == (12, 7)
    got = continued(model, given, 3)
    assert torch.equal(got.input_ids[:, :3], given.input_ids[:, :3]) and got.reference is None and model.training
    ids, wide, clear = got.input_ids, copy.deepcopy(model).double().eval(), 0
    for at in range(3, 8):
        with torch.no_grad():
            sums = wide(input_ids=ids[:, :at]).logits[:, -1].softmax(-1).cumsum(-1)
        u, near = given.reference[:, at - 1], (sums - given.reference[:, at - 1, None]).abs().min(-1).values < 1e-4
        wanted = (sums <= u[:, None]).sum(-1)
        assert torch.equal(ids[~near, at], wanted[~near])
        clear += int((~near).sum())
    assert clear > 40, "nearly every number is clearly within one token's part"
    ends = torch.isin(ids[:, 3:], torch.tensor(model.config.eos_token_id))
    after = torch.cat([torch.zeros(12, 1), ends.cumsum(-1)[:, :-1]], -1) > 0
    assert torch.equal(got.mask[:, 3:], given.mask[:, 3:] & ~after)


def test_draws_have_the_frequencies_of_the_distribution():
    """A chi-squared test with 9 degrees of freedom; a right value exceeds the bound for one seed in ten million."""
    generator = torch.Generator().manual_seed(0)
    weight, count = torch.randn(12, 4, generator=generator), 20000
    hidden = torch.randn(1, 4, generator=generator).expand(count, 4)
    head = Head(weight, None, 1.5, 4.0)
    tokens = head_ops.sampler(head, vocab_size=10)(hidden, torch.rand(count, generator=generator, dtype=torch.float64))
    z = 1.5 * (hidden[0].double() @ weight.double().T)
    wanted = count * (4 * torch.tanh(z / 4))[:10].softmax(-1)
    found = torch.bincount(tokens, minlength=10)
    assert len(found) == 10 and float(wanted.min()) > 5
    assert float(((found - wanted) ** 2 / wanted).sum()) < 52


def test_no_more_logits_than_allowed_exist_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(50, 4, generator=generator), Head(torch.randn(12, 4, generator=generator), None, 1.0, None)
    uniform, seen, own = torch.rand(50, generator=generator), [], head_ops._logits
    whole = head_ops.sampler(head)(hidden, uniform)
    monkeypatch.setattr(head_ops, "LOGITS", 60)
    monkeypatch.setattr(head_ops, "_logits", lambda z, *others: seen.append(z.numel()) or own(z, *others))
    assert torch.equal(head_ops.sampler(head)(hidden, uniform), whole) and max(seen) == 60


def test_loss_and_gradient_are_the_reverse_kl_of_the_drawn_tokens(tokenizer, sequences):
    """In one step of SGD with rate 1, whatever the micro-batches; all else is computed in float64 on the drawn tokens."""
    teacher, student = sharp("gemma2", tokenizer, 1).eval(), sharp("gemma2", tokenizer, 2)
    config = TrainConfig(steps=1, batch_size=12, lr=1.0, optimizer="sgd", beta1=0.0, clip=0.0, seed=3)
    mix = OnPolicyConfig(1.0, 1.0, prompt=3)
    given = Prompts(sequence_source(sequences, 12, 3), mix, 1, 3)(0)
    drawn = continued(student, given, 3)
    assert not torch.equal(drawn.input_ids, given.input_ids) and drawn.mask.sum() < given.mask.sum()

    def by_hand(student, teacher):
        ids, keep = drawn.input_ids, drawn.mask[:, 1:]
        logp = student(input_ids=ids).logits[:, :-1].log_softmax(-1)
        with torch.no_grad():
            logt = teacher(input_ids=ids).logits[:, :-1].log_softmax(-1)
        value = (logp.exp() * (logp - logt)).sum(-1)[keep].sum() / given.mask[:, 1:].sum()
        value.backward()
        return value, [p.grad for p in student.parameters()]

    plain = by_hand(copy.deepcopy(student), teacher)
    exact = by_hand(copy.deepcopy(student).double(), copy.deepcopy(teacher).double())
    for micro in (None, 5):
        own = copy.deepcopy(student)
        kept = {}
        settings = dataclasses.replace(config, micro_batch_size=micro)
        with _gradients(kept):
            result = distill(own, teacher, sequences, settings, on_policy=mix, progress=False)
        assert result.tokens["text"] == given.counted
        assert_same_function(kept["value"], plain[0], exact[0])
        assert_same_function(kept["gradients"], plain[1], exact[1])


class _gradients:
    """Context that keeps loss and gradients of the last step."""

    def __init__(self, into):
        self.into, self.own = into, Wanted.compute

    def __enter__(self):
        def compute(wanted):
            value = self.own(wanted)
            self.into.update(value=value, gradients=[p.grad.clone() for p in wanted.model.parameters()])
            return value

        Wanted.compute = compute

    def __exit__(self, *_):
        Wanted.compute = self.own


def test_a_resumed_run_ends_with_the_same_bits_and_a_mix_of_0_is_no_mix(tokenizer, sequences, tmp_path):
    teacher, settings = sharp("gpt2", tokenizer, 1), TrainConfig(steps=6, batch_size=8, lr=1e-3, eval_every=1, seed=1)
    mix, seen = OnPolicyConfig(0.0, 1.0, prompt=3), []

    def run(chosen, **more):
        student = sharp("gpt2", tokenizer, 2)
        distill(student, teacher, sequences, settings, on_policy=chosen, progress=False, **more)
        return list(student.parameters())

    def fail(model):
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return {}

    whole = run(mix)
    with pytest.raises(KeyboardInterrupt):
        run(mix, folder=tmp_path, evaluate=fail, checkpoint_seconds=0.0)
    with pytest.raises(ValueError, match=r"on_policy\.last 1\.0; wanted on_policy\.last 0\.5"):
        run(dataclasses.replace(mix, last=0.5), folder=tmp_path)
    again = run(mix, folder=tmp_path, evaluate=lambda model: {}, checkpoint_seconds=0.0)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    none, zero = run(None), run(OnPolicyConfig(prompt=2))
    assert all(torch.equal(a, b) for a, b in zip(none, zero, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(none, whole, strict=True))


def test_what_it_cannot_go_with_is_named(tokenizer, sequences):
    class Stored:
        kind, vocabulary = "cached", 17

        def check(self, text):
            pass

    mix, student = OnPolicyConfig(0.5, 0.5), sharp("llama", tokenizer)
    with pytest.raises(ValueError, match=r"^on_policy: got shares 0\.5 to 0\.5 with a cached teacher, which cannot score"):
        distill(student, Stored(), sequences, on_policy=mix)
    for kind in ("cached", "topk"):
        with pytest.raises(ValueError, match=rf"^on_policy: got shares 0\.5 to 0\.5 with a {kind} teacher") as error:
            DistillConfig(teacher=TeacherConfig(kind), on_policy=mix)
        assert "\n" not in str(error.value)
        DistillConfig(teacher=TeacherConfig(kind), on_policy=OnPolicyConfig(prompt=3))
    for settings in ({"first": 1.5}, {"last": -0.1}, {"first": float("nan")}, {"over": 0}, {"prompt": 0}):
        with pytest.raises(ValueError, match=rf"^on_policy\.{next(iter(settings))}: got"):
            OnPolicyConfig(**settings)
    packed = Sequences(sequences.input_ids, 0, starts=torch.zeros(100, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^on_policy: got text with position_ids"):
        Prompts(sequence_source(packed, 4, 0), OnPolicyConfig(1.0, 1.0), 1, 0)(0)


def test_a_prompt_that_leaves_nothing_to_draw_is_refused(tokenizer, sequences):
    """Such a step would train on nothing, and say nothing."""
    longest = int(sequences.lengths.max())
    student, mix = sharp("llama", tokenizer), OnPolicyConfig(last=1.0, prompt=longest)
    wanted = rf"^on_policy\.prompt: got {longest} for text of at most {longest} tokens, wanted fewer"
    with pytest.raises(ValueError, match=wanted):
        distill(student, copy.deepcopy(student), sequences, TrainConfig(steps=4, batch_size=4), on_policy=mix, progress=False)
    wide = OnPolicyConfig(1.0, 1.0, prompt=sequences.length)
    with pytest.raises(ValueError, match=r"^on_policy\.prompt: got"):  # a function of the step shows its text only then
        Prompts(sequence_source(sequences, 4, 0), wide, 1, 0)(0)


def test_a_step_of_texts_that_the_prompt_holds_whole_leaves_the_student(tokenizer, sequences):
    """Some texts are longer; a batch of short ones has a loss of 0 and no gradient."""
    short = Sequences(sequences.input_ids, 0, lengths=torch.tensor([3] * (len(sequences) - 1) + [sequences.length]))
    student, teacher = sharp("llama", tokenizer), sharp("llama", tokenizer, seed=7)
    before = copy.deepcopy(student.state_dict())
    config = TrainConfig(steps=1, batch_size=4, lr=1e-2, weight_decay=0.0)
    result = distill(student, teacher, short, config, on_policy=OnPolicyConfig(1.0, 1.0, prompt=3), progress=False)
    assert result.tokens == {"text": 0}
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_student_without_keys_and_values_is_refused_before_the_first_step(tokenizer, sequences):
    """Its first on-policy step may come after hours."""
    student = build_model({"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, tokenizer, 0)
    mix, steps = OnPolicyConfig(last=1.0, prompt=3), TrainConfig(steps=4, batch_size=4)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=r"^on_policy: got MambaForCausalLM, wanted a model that keeps the keys and values"):
        distill(student, sharp("llama", tokenizer), sequences, steps, on_policy=mix, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_keys_flops_memory_and_advice_know_it(tokenizer):
    """A mix of 0 leaves the key as it was; drawing costs one more forward pass in its share of the steps."""
    settings = {"train": TrainConfig(steps=10, batch_size=8), "recover": None}
    settings |= {name: NOWHERE for name in ("prepared", "teacher", "student")}
    plain, zero, mixed = (
        Distill(**settings, **({} if mix is None else {"on_policy": mix}))
        for mix in (None, OnPolicyConfig(prompt=2, over=3), OnPolicyConfig(0.0, 1.0))
    )
    assert plain.settings == zero.settings and "on_policy" not in plain.settings
    assert mixed.settings == {**plain.settings, "on_policy": {"first": 0.0, "last": 1.0, "over": None, "prompt": 8}}
    model = sharp("llama", tokenizer)
    scene = Scene(model, 16, 100)
    assert [stage.passes(scene) for stage in (plain, zero, mixed)] == [4, 4, 4.5]
    phases = {
        name: Predictor(model.config, 16, device="cuda").phases(stage, torch.float32)
        for name, stage in [("plain", plain), ("mixed", mixed)]
    }
    assert "drawing" in {m.phase for m in phases["mixed"]} and "drawing" not in {m.phase for m in phases["plain"]}
    assert mixed.possible("teacher.kind", "cached") is False and plain.possible("teacher.kind", "cached")


def test_the_predicted_bytes_of_drawing_bound_the_real_ones(tokenizer, sequences):
    model = sharp("llama", tokenizer)
    given = Prompts(sequence_source(sequences, 50, 0), OnPolicyConfig(1.0, 1.0, prompt=1), 1, 0)(0)
    caches, own = [], on_policy.continued_states

    def kept(model, ids, cache):
        caches.append(cache)
        return own(model, ids, cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_policy, "continued_states", kept)
        continued(model, given, 1)
    held = sum(t.nbytes for layer in caches[-1].layers for t in (layer.keys, layer.values))
    assert 0.8 * on_policy.drawing_bytes(model, 50, 8) < held + 16 * 50 * 17 <= on_policy.drawing_bytes(model, 50, 8)
