"""Training with less memory: a tied embedding's gradient in place, activation checkpointing, attention kernels."""

import contextlib
import copy

import pytest
import torch
from rounding import assert_same_function, assert_same_training, unit
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from undo_core import ops
from undo_core.models import head_of, hidden_states
from undo_core.training import Batch, TrainConfig, embedding, train
from undo_core.training.embedding import tied_gradient_in_place
from undo_core.training.losses import cross_entropy

SMALL = {"vocab_size": 700, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "gemma2": {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0},  # scales within the embedding
    "llama": {"tie_word_embeddings": True},
}


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(embedding, "LEAST_BYTES", 0)


def model_of(kind, **extra):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **MODELS[kind], **extra}))


def batches(number=2):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 700, (3, 9), generator=generator) for _ in range(number)]
    for part in ids:
        part[:, :3] = torch.tensor([5, 5, 0])  # repeated tokens, padding
    return [Batch(part, torch.ones_like(part).bool()) for part in ids]


def backward(model, number):
    loss = sum(cross_entropy(model, batch, batch.counted) for batch in batches(number))
    loss.backward()


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_the_gradient_is_the_same(kind, number):
    wanted, model, wide = model_of(kind), model_of(kind), model_of(kind).double()
    backward(wanted, number)
    backward(wide, number)
    with tied_gradient_in_place(model) as tied:
        assert tied is not None
        for _ in range(2):  # the second pass accumulates
            backward(model, number)
    for (name, p), q, exact in zip(wanted.named_parameters(), model.parameters(), wide.parameters(), strict=True):
        assert_same_function(q.grad, 2 * p.grad, 2 * exact.grad, name)
    assert type(model.get_input_embeddings()) is type(wanted.get_input_embeddings())
    backward(model, 1)  # as before the block


def test_no_second_gradient_is_made():
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            self.seen += function is torch.ops.aten.embedding_dense_backward.default and arguments[2] == 700
            return function(*arguments, **(keywords or {}))

    for in_place, dense in ((False, 1), (True, 0)):
        model = model_of("gemma2")
        with Watch() as watch:
            if in_place:
                with tied_gradient_in_place(model):
                    backward(model, 1)
            else:
                backward(model, 1)
        assert watch.seen == dense


@pytest.mark.parametrize("number", [1, 2])
def test_the_hook_sees_the_whole_gradient_once(number):
    wanted, model, wide = model_of("gemma2"), model_of("gemma2"), model_of("gemma2").double()
    backward(wanted, number)
    backward(wide, number)
    weight, seen = model.get_input_embeddings().weight, []
    with tied_gradient_in_place(model) as tied:
        handle = tied.on_gradient(lambda parameter: seen.append(parameter.grad.clone()))
        backward(model, number)
        assert len(seen) == 1
        assert_same_function(seen[0], *(m.get_input_embeddings().weight.grad for m in (wanted, wide)))
        handle.remove()
    assert weight.grad is not None


class Large(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts new tensors of at least so many bytes."""

    def __init__(self, least):
        super().__init__()
        self.least, self.seen = least, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        held = {t.untyped_storage().data_ptr() for t in arguments if isinstance(t, torch.Tensor)}
        results = function(*arguments, **(keywords or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            large = isinstance(result, torch.Tensor) and result.nbytes >= self.least
            if large and result.untyped_storage().data_ptr() not in held:
                self.seen.append(str(function))
        return results


def test_a_plain_loop_holds_one_gradient_of_the_weight():
    """Somebody else's loop with gradient accumulation: the first micro-batch makes the gradient, the others add to it."""

    def micro_batches(model, into):
        for part in batches(3):
            hidden, head = hidden_states(model, part.input_ids)[:, :-1], head_of(model)
            given = {"accumulate_into": head.weight} if into else {}
            with Large(head.weight.nbytes) as large:
                ops.linear_cross_entropy(
                    hidden, head.weight, part.input_ids[:, 1:], plan="recompute", **head.options(), **given
                ).backward()
            yield len(large.seen)

    wanted, model, wide = (model_of("gemma2", hidden_size=64) for _ in range(3))
    head_of(model), head_of(wanted)  # their check allocates
    with tied_gradient_in_place(model):
        assert list(micro_batches(model, True)) == [1, 0, 0]
    assert min(micro_batches(wanted, False)) >= 2  # the head's and the embedding's
    list(micro_batches(wide.double(), False))
    for (name, p), q, exact in zip(wanted.named_parameters(), model.parameters(), wide.parameters(), strict=True):
        assert_same_function(q.grad, p.grad, exact.grad, name)


def test_it_works_around_a_trainer(tmp_path):
    """Hugging Face's Trainer with gradient accumulation and clipping, as it is."""
    rows = [{"input_ids": row, "labels": row} for batch in batches(2) for row in batch.input_ids]
    settings = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, optim="sgd", learning_rate=1e-2,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip

    def trained(in_place):
        model = model_of("llama")
        with tied_gradient_in_place(model) if in_place else contextlib.nullcontext() as tied:
            assert (tied is not None) == in_place
            Trainer(model, settings, train_dataset=rows).train()
        return [parameter.detach() for parameter in model.parameters()]

    assert_same_training(trained(True), trained(False), model_of("llama").parameters(), 3)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_uses_that_would_miss_a_part_are_refused(monkeypatch):
    model = model_of("gemma2")
    weight = model.get_input_embeddings().weight
    with tied_gradient_in_place(model):
        with pytest.raises(
            RuntimeError, match=r"^tied_gradient_in_place: got torch.autograd.grad with respect to the parameter"
        ):
            torch.autograd.grad(cross_entropy(model, batches(1)[0], 1), weight)
        with pytest.raises(RuntimeError, match=r"^tied_gradient_in_place: got create_graph=True"):
            (model.get_input_embeddings()(batches(1)[0].input_ids).square().sum()).backward(create_graph=True)
        assert weight.grad is None
        weight.register_hook(lambda gradient: None)
        with pytest.raises(ValueError, match=r"^tied_gradient_in_place: got a parameter with 1 gradient hooks"):
            cross_entropy(model, batches(1)[0], 1)
    with (
        pytest.raises(ValueError, match=r"^tied_gradient_in_place: got a parameter with 1 gradient hooks"),
        tied_gradient_in_place(model),
    ):
        pass
    assert type(model.get_input_embeddings()) is type(model_of("gemma2").get_input_embeddings())
    model = model_of("gemma2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"^tied_gradient_in_place: got a process group of 2"), tied_gradient_in_place(model):
        pass


def test_many_tokens_of_a_bfloat16_weight_are_summed_before_they_are_rounded():
    model = model_of("llama").to(torch.bfloat16)
    weight = model.get_input_embeddings().weight
    with tied_gradient_in_place(model):
        weight.grad = torch.ones_like(weight)
        ids = torch.full((1, 512), 7)
        (model.get_input_embeddings()(ids) * 0.002).sum().backward()
    # The gradient of each token and the result are bfloat16; the sum between them is not.
    got, wanted = weight.grad[7].double(), 1 + 512 * 0.002
    assert ((got - wanted).abs() <= 4 * unit(torch.bfloat16) * wanted).all()
    assert torch.equal(weight.grad[8], torch.ones(16, dtype=torch.bfloat16))


def test_training_repeats_bit_for_bit_on_many_tokens():
    """Sums over repeated tokens have a fixed order for any number of threads."""

    def gradient():
        model = model_of("gemma2", hidden_size=256, head_dim=128)
        ids = torch.randint(0, 700, (16, 65), generator=torch.Generator().manual_seed(3))
        with tied_gradient_in_place(model):
            cross_entropy(model, Batch(ids, torch.ones_like(ids).bool()), 1024).backward()
        return model.get_input_embeddings().weight.grad

    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(5))


@pytest.mark.parametrize("mode", [{"step_in_backward": True}, {"precision": "bfloat16-master"}])
def test_an_evaluation_with_gradients_stops_no_update(mode):
    def run(evaluate):
        model = model_of("gemma2")
        source = {"text": lambda step: batches(1)[0]}
        config = TrainConfig(steps=3, batch_size=3, lr=1e-2, eval_every=1, **mode)
        loss = lambda m, b, counted: cross_entropy(m, b["text"], counted["text"])  # noqa: E731
        train(model, loss, source, config, evaluate=evaluate, progress=False)
        return model.get_input_embeddings().weight.detach()

    def with_gradients(model):
        with torch.enable_grad():
            return {"loss": float(cross_entropy(model, batches(1)[0], 1).detach())}

    assert torch.equal(run(with_gradients), run(None))


def test_hooks_of_the_embedding_run_once():
    """NEFTune, for example, adds noise to the output of the embedding in a forward hook."""
    model = model_of("gemma3_text")
    embedding_of, ids, seen = model.get_input_embeddings(), batches(1)[0].input_ids, []
    embedding_of.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    embedding_of.register_forward_hook(lambda module, given, output: output + 1)
    wanted = embedding_of(ids)
    with tied_gradient_in_place(model):
        assert torch.equal(embedding_of(ids), wanted)
    assert len(seen) == 2 and all(torch.equal(given, ids) for given in seen)


def test_a_copy_looks_up_its_own_weight():
    """A reference model or a teacher is often a deep copy."""
    model, ids = model_of("gemma3_text"), batches(1)[0].input_ids
    with tied_gradient_in_place(model):
        copied = copy.deepcopy(model)
        copied.get_input_embeddings().weight.data.mul_(2)
        backward(copied, 1)
        assert torch.equal(copied.get_input_embeddings()(ids), 2 * model.get_input_embeddings()(ids))
    assert torch.equal(copied.get_input_embeddings()(ids), 2 * model.get_input_embeddings()(ids))
    assert model.get_input_embeddings().weight.grad is None
    wanted = model_of("gemma3_text")
    wanted.get_input_embeddings().weight.data.mul_(2)
    backward(wanted, 1)
    gradients = (m.get_input_embeddings().weight.grad for m in (copied, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    with tied_gradient_in_place(copied) as tied:
        assert tied is not None


@pytest.mark.parametrize("since", ["the beginning of the context", "the forward"])
def test_a_weight_frozen_within_the_context_gets_no_gradient(since):
    """The norm of all gradients, by which a trainer clips, would contain it."""
    model = model_of("llama")
    with tied_gradient_in_place(model) as tied:
        loss = cross_entropy(model, batches(1)[0], 1) if since == "the forward" else None
        tied.weight.requires_grad_(False)
        loss = cross_entropy(model, batches(1)[0], 1) if loss is None else loss
        loss.backward()
    assert tied.weight.grad is None and model.model.norm.weight.grad.any()


def test_a_weight_that_is_replaced_and_a_later_hook_are_refused():
    model = model_of("llama")
    with tied_gradient_in_place(model) as tied:
        loss = cross_entropy(model, batches(1)[0], 1)
        tied.weight.register_hook(lambda gradient: None)
        with pytest.raises(ValueError, match=r"^tied_gradient_in_place: got a parameter with 1 gradient hooks"):
            loss.backward()
        embedding_of = model.get_input_embeddings()
        embedding_of.weight = model.lm_head.weight = torch.nn.Parameter(2 * tied.weight.detach())
        with pytest.raises(ValueError, match=r"^tied_gradient_in_place: got a model whose embedding has another weight"):
            embedding_of(batches(1)[0].input_ids)


def test_untied_and_frozen_weights_are_left_alone():
    untied, frozen = model_of("llama", tie_word_embeddings=False), model_of("llama").requires_grad_(False)
    for model in (untied, frozen):
        with tied_gradient_in_place(model) as tied:
            assert tied is None and type(model.get_input_embeddings()) is torch.nn.Embedding


def test_evaluation_within_the_block_leaves_nothing_waiting():
    model = model_of("gemma2")
    with tied_gradient_in_place(model) as tied:
        with torch.no_grad():
            cross_entropy(model, batches(1)[0], 1)
        assert tied._lookups == 0


def test_a_small_weight_is_left_alone(monkeypatch):
    monkeypatch.undo()
    with tied_gradient_in_place(model_of("gemma2")) as tied:
        assert tied is None


def steps(model, **settings):
    source = {"text": lambda step: batches(1)[0]}
    config = TrainConfig(
        steps=3, batch_size=3, lr=1e-2, optimizer="sgd", **settings
    )  # Adam turns any rounding into a whole step
    train(model, lambda m, b, counted: cross_entropy(m, b["text"], counted["text"]), source, config, progress=False)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("kind", MODELS)
def test_activation_checkpointing_changes_only_what_is_kept(kind):
    model, calls = model_of(kind), []
    head_of(model)  # its check runs the layers
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    wanted = steps(model_of(kind))
    assert_same_training(steps(model, activation_checkpointing=True), wanted, model_of(kind).parameters(), 3)
    assert len(calls) == 6, "every layer runs twice a step"
    steps(model)
    assert len(calls) == 9, "and once without it"


def test_the_model_has_its_kernels_again_also_after_an_error():
    def failing(batch):
        raise KeyboardInterrupt

    for kind, before, other in (("llama", "sdpa", "eager"), ("gemma2", "eager", "flex_attention")):
        model = model_of(kind)
        model.set_attn_implementation(before)
        steps(model, attention="eager", activation_checkpointing=True)
        assert model.config._attn_implementation == before and not any(
            layer.gradient_checkpointing for layer in model.model.layers
        )
        embedding_of = model.get_input_embeddings()
        embedding_of.weight.requires_grad_(False)
        assert not embedding_of(torch.tensor([1])).requires_grad, "no hook is left behind"
        embedding_of.weight.requires_grad_(True)

        own = lambda function, *arguments, **options: function(*arguments, **options)  # noqa: E731
        model._set_gradient_checkpointing(True, own)  # the caller's way
        with pytest.raises(KeyboardInterrupt):
            config = TrainConfig(steps=1, attention=other, activation_checkpointing=True)
            train(model, lambda m, b, c: failing(b), {"text": lambda step: batches(1)[0]}, config, progress=False)
        assert model.config._attn_implementation == before
        assert all(layer.gradient_checkpointing and layer._gradient_checkpointing_func is own for layer in model.model.layers)


def test_attention_kernels_and_the_softcap():
    got, wanted = (steps(model_of("llama"), attention=kernel) for kernel in ("eager", "sdpa"))
    assert_same_training(got, wanted, model_of("llama").parameters(), 3)
    with pytest.raises(ValueError, match=r"^attention: got sdpa for Gemma2ForCausalLM, .*softcap.* wanted eager"):
        steps(model_of("gemma2"), attention="sdpa")
    model = model_of("llama")
    with pytest.raises(ValueError, match=r"^attention: got flash_attention_2, wanted a kernel that can be used here"):
        steps(model, attention="flash_attention_2", precision="bfloat16")
    assert model.dtype == torch.float32, "nothing was changed"
    with pytest.raises(ValueError, match=r"^attention: got 'flash', wanted auto, eager"):
        TrainConfig(attention="flash")


@pytest.mark.parametrize(
    "mode",
    [{"step_in_backward": True}, {"precision": "bfloat16-master"}, {"precision": "bfloat16-master", "step_in_backward": True}],
)
def test_steps_take_the_whole_gradient_of_a_tied_weight(mode, monkeypatch):
    """An optimizer that acts in the backward pass waits for the embedding's part."""
    in_place = steps(model_of("gemma2"), **mode)
    monkeypatch.setattr(embedding, "LEAST_BYTES", 1 << 60)
    dtype = torch.bfloat16 if "precision" in mode else torch.float32
    assert_same_training(in_place, steps(model_of("gemma2"), **mode), model_of("gemma2").parameters(), 3, dtype)
