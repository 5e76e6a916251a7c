"""Precision and optimizer of a stage: the same curve, the same bits after a kill, and the promised bytes."""

import importlib.util
import itertools
import math

import pytest
import torch
from rounding import PATH, assert_as_exact_as, gamma, unit
from safetensors.torch import load_file, save_file
from torch import nn

from undo_core.checkpoints.files import stored_dtype
from undo_core.data.arithmetic import compact_splits
from undo_core.distillation.student import distill
from undo_core.models import build_model, load_model
from undo_core.training import TrainConfig, bytes_per_parameter, optimizers, sequence_source, train
from undo_core.training.batches import SequenceSource
from undo_core.training.loop import accumulate
from undo_core.training.losses import cross_entropy
from undo_core.training.optimizers import Updater
from undo_core.training.precision import PRECISIONS, convert_, round_stochastically_, seeded
from undo_core.unlearning import RMUConfig, UnlearnConfig, unlearn

torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
OPTIMIZERS = ["adamw", pytest.param("adamw-8bit", marks=torchao), pytest.param("adamw-4bit", marks=torchao)]
SMALL = {
    "model_type": "gemma2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "max_position_embeddings": 64,
    "sliding_window": 64,
}  # its matrices are large enough to be quantised


@pytest.fixture(scope="module")
def arithmetic():
    tokenizer, splits = compact_splits(0, 2000, 10)
    return tokenizer, splits["train_retain"]


def loss(model, batches, counted):
    return cross_entropy(model, batches["text"], counted["text"])


def run(arithmetic, folder=None, source=None, **changes):
    tokenizer, sequences = arithmetic
    model = build_model(SMALL, tokenizer, 0)
    config = TrainConfig(**{"steps": 24, "batch_size": 32, "lr": 3e-3, "warmup": 4, "eval_every": 6, "seed": 5, **changes})
    source = {"text": source or sequence_source(sequences, 32, 0)}
    result = train(model, loss, source, config, folder=folder, checkpoint_seconds=0.0, progress=False)
    return model, [entry["loss"] for entry in result.history[1:]]


def weights(model):
    return torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def curve(arithmetic):
    return run(arithmetic)[1]


def assert_keeps_to(losses, curve):
    """Asserts that the curve is everywhere within a tenth of what float32 learns; this checks learning, not rounding."""
    fall = curve[0] - curve[-1]
    assert fall > 0.2 * curve[0]
    assert max(abs(a - b) for a, b in zip(losses, curve, strict=True)) < 0.1 * fall


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_mode_keeps_to_the_float32_curve(arithmetic, curve, precision, optimizer):
    model, losses = run(arithmetic, precision=precision, optimizer=optimizer)
    assert_keeps_to(losses, curve)
    assert {p.dtype for p in model.parameters()} == {torch.float32 if precision == "float32" else torch.bfloat16}


def test_float32_adamw_is_torch_adamw_with_clipping(arithmetic):
    trained, _ = run(arithmetic, steps=3, warmup=0)
    tokenizer, sequences = arithmetic
    model = build_model(SMALL, tokenizer, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
    for step in range(3):
        batch = sequence_source(sequences, 32, 0)(step)
        loss(model.train(), {"text": batch}, {"text": batch.counted}).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(weights(trained), weights(model))


def test_on_a_cpu_offload_is_adamw(arithmetic):
    runs = [run(arithmetic, steps=4, precision="bfloat16-master", optimizer=name)[0] for name in ("adamw", "adamw-offload")]
    assert torch.equal(*map(weights, runs))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_copy_on_the_host_makes_the_same_steps(arithmetic, monkeypatch, precision, inside):
    settings = {"steps": 4, "precision": precision, "step_in_backward": inside}
    plain = run(arithmetic, **settings)[0]
    monkeypatch.setattr(optimizers, "_is_remote", lambda parameter: True)  # as on a GPU
    model = build_model(SMALL, arithmetic[0], 0)
    updater = Updater(model, list(model.parameters()), TrainConfig(optimizer="adamw-offload", precision=precision))
    assert all(t.data_ptr() != p.data_ptr() for t, p in zip(updater.targets, model.parameters(), strict=True))
    copied = run(arithmetic, optimizer="adamw-offload", **settings)[0]
    assert torch.equal(weights(plain), weights(copied))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_in_the_backward_pass_is_the_same_step(arithmetic, precision, optimizer):
    steps = 24 if precision == "bfloat16-stochastic" else 8
    kept, freed = (
        run(arithmetic, steps=steps, clip=0.0, precision=precision, optimizer=optimizer, step_in_backward=inside)
        for inside in (False, True)
    )
    if precision == "bfloat16-stochastic":  # other draws
        assert_keeps_to(kept[1], freed[1])
    else:
        assert torch.equal(weights(kept[0]), weights(freed[0]))
    assert all(parameter.grad is None for parameter in freed[0].parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in freed[0].parameters())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_clipping_in_the_backward_pass_stays_near_the_curve(arithmetic, curve, precision):
    losses = run(arithmetic, precision=precision, step_in_backward=True)[1]
    assert_keeps_to(losses, curve)
    assert losses != curve


class Pair(nn.Module):
    """A model and loss whose gradients are given."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))


def backward(model, updater, index, a, b):
    updater.begin(index, 1e-3)
    with updater.attached():
        ((model.a * torch.tensor(a)).sum() + (model.b * torch.tensor(b)).sum()).backward()
    updater.step()


def test_a_step_in_the_backward_pass_clips_by_the_larger_norm_of_before_and_so_far():
    model = Pair()
    updater = Updater(model, list(model.parameters()), TrainConfig(clip=1.0, step_in_backward=True, beta1=0.0))
    moments = lambda: [updater.parts[i].state[t]["exp_avg"].tolist() for i, t in enumerate(updater.targets)]  # noqa: E731
    backward(model, updater, 0, [3.0, 4.0], [0.0, 12.0, 0.0])  # the first: by the norm so far, 5 and 13, or 12 and 13
    of_a, of_b = (moment[1] / gradient for moment, gradient in zip(moments(), (4.0, 12.0), strict=True))
    close = lambda value: pytest.approx(value, rel=1e-6 + gamma(16))  # noqa: E731  # clipping divides by the norm and 1e-6 more
    assert (of_a, of_b) in [close((1 / 5, 1 / 13)), close((1 / 13, 1 / 12))]
    assert float(updater.tensors()["norm"]) == pytest.approx(13.0)
    backward(model, updater, 1, [0.3, 0.0], [0.0, 0.0, 0.4])  # by 1 / 13
    assert moments() == [close([0.3 / 13, 0.0]), close([0.0, 0.0, 0.4 / 13])]
    backward(model, updater, 2, [9.0, 0.0], [0.0, 0.0, 0.0])  # the norm before was 0.5: a spike
    assert moments()[0] == [close(1.0), 0.0]


def test_tied_weights_are_stepped_once(arithmetic):
    model = build_model(SMALL, arithmetic[0], 0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    updater = Updater(model, list(model.parameters()), TrainConfig(precision="bfloat16-master", step_in_backward=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.bfloat16
    batch = sequence_source(arithmetic[1], 8, 0)(0)
    updater.begin(0, 1e-3)
    with updater.attached():
        loss(model, {"text": batch}, {"text": batch.counted}).backward()
    index = next(i for i, p in enumerate(updater.parameters) if p is model.lm_head.weight)
    assert float(updater.parts[index].state[updater.targets[index]]["step"]) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_micro_batches_do_not_change_the_gradient(arithmetic, precision):
    def gradient(size):
        model = build_model(SMALL, arithmetic[0], 0)
        updater = Updater(model, list(model.parameters()), TrainConfig(precision=precision))
        batch = sequence_source(arithmetic[1], 32, 0)(0)
        with updater.attached():
            accumulate(model, loss, {"text": batch}, {"text": batch.counted}, size)
        return torch.cat([target.grad.double().flatten() for target in updater.targets])

    whole, exact, batch = (
        gradient(None),
        build_model(SMALL, arithmetic[0], 0).double(),
        sequence_source(arithmetic[1], 32, 0)(0),
    )
    loss(exact, {"text": batch}, {"text": batch.counted}).backward()
    exact = torch.cat([p.grad.flatten() for p in exact.parameters()])
    summed = torch.float32 if precision in ("float32", "bfloat16-master") else torch.bfloat16
    for size in (1, 5):
        additions = -(-32 // size)
        assert_as_exact_as(gradient(size), whole, exact, gamma(PATH) if summed == torch.float32 else gamma(additions, summed))


def test_masters_accumulate_micro_batches_in_float32(arithmetic):
    model = build_model(SMALL, arithmetic[0], 0)
    updater = Updater(model, list(model.parameters()), TrainConfig(precision="bfloat16-master"))
    batch = sequence_source(arithmetic[1], 32, 0)(0)
    with updater.attached():
        accumulate(model, loss, {"text": batch}, {"text": batch.counted}, 4)
    assert all(parameter.grad is None for parameter in model.parameters())
    wanted = [torch.zeros_like(target) for target in updater.targets]
    for part in batch.split(4):
        loss(model, {"text": part}, {"text": batch.counted}).backward()
        for total, parameter in zip(wanted, model.parameters(), strict=True):
            total += parameter.grad.float()
            parameter.grad = None
    for total, target in zip(wanted, updater.targets, strict=True):
        assert torch.equal(total, target.grad)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_killed_it_ends_with_the_same_bits(arithmetic, tmp_path, precision, optimizer, inside):
    settings = {"steps": 5, "warmup": 0, "precision": precision, "optimizer": optimizer, "step_in_backward": inside}
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    whole, losses = run(arithmetic, **settings)
    fresh = torch.random.get_rng_state()
    assert torch.equal(before, fresh), "training left the global generator elsewhere"

    class Dying(SequenceSource):
        def __call__(self, step):
            if step == 3:
                raise KeyboardInterrupt
            return super().__call__(step)

    with pytest.raises(KeyboardInterrupt):
        run(arithmetic, folder=tmp_path, source=Dying(arithmetic[1], 32, 0), **settings)
    torch.manual_seed(2)  # another past
    resumed, again = run(arithmetic, folder=tmp_path, **settings)
    assert torch.equal(weights(resumed), weights(whole)) and again == losses


def test_a_checkpoint_of_another_mode_is_refused(arithmetic, tmp_path):
    run(arithmetic, folder=tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"^folder: got .*precision float32; wanted .*precision bfloat16"):
        run(arithmetic, folder=tmp_path, steps=4, precision="bfloat16")


def test_stochastic_rounding_has_no_bias():
    value = torch.tensor([1.0 + 2**-10, -3.0 - 2**-9, 1e-3, 1e-40, -7.7e30, 0.0, 2.0])
    many, rounded = value.repeat(40_000, 1), torch.empty(40_000, 7, dtype=torch.bfloat16)
    with seeded(torch.device("cpu"), 0):
        round_stochastically_(rounded, many.clone())
    spacing = (rounded.double().amax(0) - rounded.double().amin(0)).clamp_min(1e-300)
    assert ((rounded.double().mean(0) - value.double()).abs() < 5 * 0.5 / 200 * spacing).all()
    neighbours = [len(column.unique()) for column in rounded.float().T]
    assert neighbours == [2, 2, 2, 2, 2, 1, 1]  # its two neighbours; values on the grid stay


def test_stochastic_rounding_keeps_what_is_not_finite():
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000], dtype=torch.int32)
    rounded = torch.empty(1000, 5, dtype=torch.bfloat16)
    round_stochastically_(rounded, bits.view(torch.float32).repeat(1000, 1))
    assert rounded[:, :3].isnan().all() and (rounded[:, 3] == torch.inf).all() and (rounded[:, 4] == -torch.inf).all()


@torchao
@pytest.mark.parametrize(("name", "whole"), [("adamw-8bit", "AdamW8bit"), ("adamw-4bit", "AdamW4bit")])
def test_a_quantised_step_in_slices_has_the_bits_of_the_whole_one(monkeypatch, name, whole):
    from torchao import optim

    monkeypatch.setattr(optimizers, "BLOCK_CPU", 1024)
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 256), (100,), (3, 128 * 41)]  # the second is not quantised, the third not at 8 bits
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    steps = [optimizers._torchao(name)(ours, **settings), getattr(optim, whole)(theirs, **settings)]
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        with torch.compiler.set_stance("force_eager"):
            for optimizer in steps:
                optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        for key in ("exp_avg", "exp_avg_sq"):
            parts = [optimizers._plain(optimizer.state[p][key]) for optimizer, p in zip(steps, (one, other), strict=True)]
            assert parts[0].keys() == parts[1].keys()
            assert all(torch.equal(value, parts[1][part]) for part, value in parts[0].items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_small_updates_are_lost_by_plain_bfloat16_alone(optimizer):
    def moved(precision):
        model = nn.ParameterList([nn.Parameter(torch.ones(128, 64))])
        config = TrainConfig(precision=precision, optimizer=optimizer, clip=0.0)
        updater = Updater(model, list(model.parameters()), config)
        for step in range(40):
            updater.begin(step, 1e-4)
            with updater.attached():
                model[0].sum().backward()
            updater.step()
        return 1 - float(updater.targets[0].detach().double().mean())

    assert moved("bfloat16") == 0.0
    # 40 steps of 128 x 64 weights below 1, each rounded up or down: six standard deviations, which one seed in 500 million
    # leaves.
    up = 1e-4 / 2**-8
    deviation = 2**-8 * math.sqrt(40 * up * (1 - up) / (128 * 64))
    assert moved("bfloat16-stochastic") == pytest.approx(40e-4, abs=6 * deviation)
    assert moved("bfloat16-master") == pytest.approx(40e-4, abs=40 * unit())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw-offload", *OPTIMIZERS])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_allocates_what_was_promised(precision, optimizer, inside):
    model = nn.ParameterList([nn.Parameter(torch.ones(512, 1024))])
    config = TrainConfig(precision=precision, optimizer=optimizer, step_in_backward=inside)
    updater = Updater(model, list(model.parameters()), config)
    updater.begin(0, 1e-3)
    with updater.attached():
        model[0].square().sum().backward()
    held = lambda tensors: sum(tensor.nbytes for tensor in tensors if tensor is not None) / model[0].numel()  # noqa: E731
    gradients = held([model[0].grad, *(target.grad for target in updater.targets if target is not model[0])])
    updater.step()
    assert model[0].grad is None and updater.targets[0].grad is None
    promised = bytes_per_parameter(config, "cpu")
    assert held(model.parameters()) == promised["weights"]
    assert gradients == promised["gradient"]
    assert held(updater.tensors().values()) == pytest.approx(promised["optimizer"], rel=0.01)
    assert promised["host"] == 0


def test_offload_moves_everything_but_the_weights_to_the_host():
    config = TrainConfig(precision="bfloat16-master", optimizer="adamw-offload")
    assert bytes_per_parameter(config, "cuda") == {"weights": 2, "gradient": 0, "optimizer": 0, "host": 16}


def test_conversion_copies_nothing_it_need_not(arithmetic):
    model = build_model(SMALL, arithmetic[0], 0)
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    convert_(model, "float32")
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    before = weights(model)
    updater = Updater(model, list(model.parameters()), TrainConfig(precision="bfloat16-master"))
    assert [target.data_ptr() for target in updater.targets] == pointers
    assert torch.equal(torch.cat([target.flatten() for target in updater.targets]), before)
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == buffers


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rmu_trains_its_part_alone(arithmetic, precision):
    tokenizer, sequences = arithmetic
    model = build_model({**SMALL, "num_hidden_layers": 2}, tokenizer, 0)
    settings = TrainConfig(steps=2, batch_size=8, lr=1e-2, precision=precision, step_in_backward=True)
    config = UnlearnConfig(method="rmu", rmu=RMUConfig(target_layer=1), train=settings)
    before = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    unlearn(model, forget=sequences, retain=sequences, config=config, progress=False)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p.bfloat16(), before[name])}
    assert changed == {"model.layers.0.mlp.down_proj.weight"}


def test_a_model_is_saved_in_its_dtype_and_loaded_in_float32(arithmetic, tmp_path):
    model, _ = run(arithmetic, steps=1, precision="bfloat16")
    model.save_pretrained(tmp_path)
    same, wide = load_model(tmp_path, torch.bfloat16), load_model(tmp_path)
    assert same.dtype == torch.bfloat16 and same.config.dtype == torch.bfloat16 and wide.dtype == torch.float32
    assert torch.equal(weights(same), weights(model)) and torch.equal(weights(wide), weights(model))
    train(same, loss, {"text": sequence_source(arithmetic[1], 8, 0)}, TrainConfig(steps=1), progress=False)
    assert same.dtype == torch.float32  # the next stage's precision


def test_a_stage_loads_what_it_trains_in(arithmetic, tmp_path):
    """The weights have the same bits as float32 weights converted after loading, which are never in memory."""
    from undo_core.pipeline.model_stage import load_to_train

    wide, _ = run(arithmetic, steps=1)
    wide.save_pretrained(tmp_path / "wide")
    half, _ = run(arithmetic, steps=1, precision="bfloat16")
    half.save_pretrained(tmp_path / "half")
    assert (stored_dtype(tmp_path / "wide"), stored_dtype(tmp_path / "half")) == (torch.float32, torch.bfloat16)
    for name in ("wide", "half"):
        for precision in PRECISIONS:
            model, other = load_to_train(tmp_path / name, precision), load_model(tmp_path / name)
            short = precision in ("bfloat16", "bfloat16-stochastic") or (name, precision) == ("half", "bfloat16-master")
            assert model.dtype == (torch.bfloat16 if short else torch.float32)
            both = [Updater(m, list(m.parameters()), TrainConfig(precision=precision)) for m in (model, other)]
            assert torch.equal(weights(model), weights(other))
            ids = torch.arange(2, 14).view(1, -1)
            assert torch.equal(model(ids).logits, other(ids).logits), "its buffers are those of float32"
            for a, b in zip(both[0].targets, both[1].targets, strict=True):
                assert torch.equal(a, b) and a.dtype == b.dtype
    mixed = load_file(tmp_path / "half" / "model.safetensors")
    name = next(iter(mixed))
    save_file({**mixed, name: mixed[name].float()}, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    assert stored_dtype(tmp_path / "half") == torch.float32, "nothing may be rounded"


def test_student_and_teacher_may_differ(arithmetic):
    tokenizer, sequences = arithmetic
    student, teacher = (build_model(SMALL, tokenizer, seed) for seed in (0, 1))
    settings = TrainConfig(steps=12, batch_size=32, lr=3e-3, precision="bfloat16-stochastic", eval_every=6)
    history = distill(student, teacher, sequences, settings, progress=False).history
    assert history[-1]["loss"] < history[1]["loss"]
    assert (student.dtype, teacher.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("bad", "wanted"),
    [
        ({"precision": "float16"}, "^precision: got 'float16', wanted one of float32, "),
        ({"optimizer": "lion"}, "^optimizer: got 'lion', wanted one of adamw, "),
        ({"step_in_backward": True, "micro_batch_size": 4}, "^step_in_backward: got true with micro_batch_size 4, wanted"),
    ],
)
def test_bad_settings(bad, wanted):
    with pytest.raises(ValueError, match=wanted):
        TrainConfig(**bad)


def test_without_torchao_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = Pair()
    with pytest.raises(ModuleNotFoundError, match=r"^optimizer: got adamw-4bit, which needs torchao; pip install"):
        Updater(model, list(model.parameters()), TrainConfig(precision="bfloat16", optimizer="adamw-4bit"))
    assert model.a.dtype == torch.float32


def test_draws_differ_by_seed_step_and_parameter():
    keys = list(itertools.product((0, 1), (0, 1), (0, 1)))
    drawn = set()
    for key in keys:
        with seeded(torch.device("cpu"), *key):
            drawn.add(tuple(torch.randint(0, 1 << 16, (4,)).tolist()))
    assert len(drawn) == len(keys)
