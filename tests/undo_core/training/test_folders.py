"""A folder is resumed bit for bit by the run that it belongs to; another run gets an error that names the difference."""

import pytest
import torch

from undo_core import AttackConfig, TrainConfig, UnlearnConfig, cache_teacher, distill, relearn, unlearn
from undo_core.attacks.relearning import attack
from undo_core.data.sequences import Sequences
from undo_core.models import load_model
from undo_core.training import as_source, train
from undo_core.training.batches import as_batch
from undo_core.training.identity import function_identity, model_identity
from undo_core.training.losses import cross_entropy
from undo_core.unlearning import RMUConfig

CONFIG = TrainConfig(steps=3, batch_size=8, lr=1e-2, seed=1)
OPTIONS = {"progress": False, "checkpoint_seconds": 0.0}


def bits(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder, message, run, *models):
    before, weights = files_of(folder), [bits(model) for model in models]
    with pytest.raises(ValueError, match=f"folder: got .* with a checkpoint made with .*{message}"):
        run()
    assert files_of(folder) == before
    assert all(torch.equal(bits(model), w) for model, w in zip(models, weights, strict=True))


def test_distill(tiny, sequences, tmp_path):
    student = lambda: tiny(1)  # noqa: E731
    run = lambda student, teacher, text=sequences, config=CONFIG, **more: distill(  # noqa: E731
        student, teacher, text, config, folder=tmp_path, **OPTIONS, **more
    )
    first, again = student(), student()
    run(first, tiny(0))
    run(again, tiny(0))  # resumes at its last step
    assert torch.equal(bits(first), bits(again)) and not torch.equal(bits(first), bits(student()))
    other = student()
    refused(tmp_path, "teacher.weights", lambda: run(other, tiny(2)), other)
    other = tiny(2)
    refused(tmp_path, "model.weights .* as it was before its first step", lambda: run(other, tiny(0)), other)
    refused(tmp_path, "matched", lambda: run(student(), tiny(0), hidden_weight=0.5))
    capped = tiny(0)
    capped.config.rms_norm_eps *= 2
    refused(tmp_path, "teacher.config", lambda: run(student(), capped))
    half = tiny(0).bfloat16().float().bfloat16()
    refused(tmp_path, "teacher.weights", lambda: run(student(), half))
    cached = cache_teacher(tiny(0), sequences, tmp_path / "cache", progress=False)
    refused(tmp_path, "teacher.kind", lambda: run(student(), cached))
    frozen = student()
    frozen.model.embed_tokens.weight.requires_grad_(False)
    refused(tmp_path, "model.trained", lambda: run(frozen, tiny(0)))
    eager = student()
    eager.set_attn_implementation("flex_attention")
    refused(tmp_path, "model.attention", lambda: run(eager, tiny(0)))
    batches = [sequences.input_ids[:8].long(), sequences.input_ids[8:16].long()]
    refused(tmp_path, "sources.text", lambda: run(student(), tiny(0), batches))


def test_hidden_weight_and_layers(tiny, sequences, tmp_path):
    run = lambda **more: distill(tiny(1), tiny(0), sequences, CONFIG, folder=tmp_path, **OPTIONS, **more)  # noqa: E731
    run(hidden_weight=0.5)
    refused(tmp_path, "matched.weight 0.5; wanted matched.weight 1", lambda: run(hidden_weight=1.0))
    refused(tmp_path, "matched.layers", lambda: run(hidden_weight=0.5, hidden_layers=[2]))
    refused(tmp_path, "matched", lambda: run())


def test_unlearn(tiny, sequences, tmp_path):
    text = Sequences(sequences.input_ids, 0)
    run = lambda model, **more: unlearn(  # noqa: E731
        model, forget=text, retain=text, config=UnlearnConfig(train=CONFIG, **more), folder=tmp_path, **OPTIONS
    )
    first, again = tiny(0), tiny(0)
    run(first)
    run(again)
    assert torch.equal(bits(first), bits(again))
    other = tiny(1)
    refused(tmp_path, "model.weights", lambda: run(other), other)
    refused(tmp_path, "unlearn.method maxent", lambda: run(tiny(0), method="graddiff"))
    refused(tmp_path, "unlearn.retain_loss", lambda: run(tiny(0), retain_loss="kl"))
    rmu = RMUConfig(first_layer=0, target_layer=1)
    refused(tmp_path, "model.trained", lambda: run(tiny(0), method="rmu", rmu=rmu, retain_weight=1.0))


def test_relearn(tiny, sequences, tmp_path):
    text = Sequences(sequences.input_ids, 0)
    config = AttackConfig(rates=[1e-2], evaluate_at=[0, 2], headline_step=2, batch_size=8, extend=0)
    score = lambda model: {"forget": float(bits(model).sum())}  # noqa: E731
    run = lambda model, text=text, config=config: relearn(  # noqa: E731
        model, text, config, evaluate=score, folder=tmp_path, progress=False
    )
    first = run(tiny(0))
    trial = next(iter(first))
    assert (tmp_path / trial.name / "log.jsonl").exists()
    own = tmp_path / "one"
    attacked = lambda model, text=text, config=config: attack(  # noqa: E731
        model, text, 1e-2, config, evaluate=score, folder=own, **OPTIONS
    )
    result = attacked(tiny(0))
    assert attacked(tiny(0)).history == result.history == first[trial].history
    refused(own, "model.weights", lambda: attacked(tiny(1)))
    refused(own, "sources.forget.rows", lambda: attacked(tiny(0), Sequences(text.input_ids.flip(0), 0)))
    further = AttackConfig(rates=[1e-2], evaluate_at=[0, 1, 2], headline_step=2, batch_size=8, extend=0)
    refused(own, "evaluate_at", lambda: attacked(tiny(0), config=further))


def loss(model, batches, counted):
    return cross_entropy(model, batches["text"], counted["text"])


def test_sources_and_functions_count_by_their_contents(tiny, sequences, tmp_path):
    batches = [sequences.input_ids[i : i + 8].long() for i in range(0, 40, 8)]

    def run(data, folder, loss=loss, stop=None):
        model = tiny(0)
        distill(model, tiny(1), data, CONFIG, folder=tmp_path / folder, stop=stop, evaluate=lambda m: {"x": 0.0}, **OPTIONS)
        return bits(model)

    whole = run(batches, "a")
    assert torch.equal(whole, run([b.clone() for b in batches], "a"))
    refused(tmp_path / "a", "sources.text.batches", lambda: run([*batches[:4], batches[0]], "a"))
    refused(tmp_path / "a", "stop", lambda: run(batches, "a", stop=lambda metrics: metrics["x"] > 1))
    assert torch.equal(whole, run(lambda step: as_batch(batches[step % 5]), "b"))
    refused(tmp_path / "b", "sources.text.first", lambda: run(lambda step: as_batch(batches[4 - step % 5]), "b"))
    with pytest.warns(UserWarning, match="text: got an iterable, whose batches cannot be compared"):
        assert torch.equal(whole, run((b for b in batches), "c"))


@pytest.mark.filterwarnings("ignore:text. got an iterable")
@pytest.mark.parametrize("kind", ["list", "stream"])
def test_what_is_no_sequences_resumes_bit_for_bit(tiny, sequences, tmp_path, kind):
    batches = [sequences.input_ids[i : i + 8].long() for i in range(0, 40, 8)]

    class Stream:
        def __iter__(self):
            return iter(batches)

    data = batches if kind == "list" else Stream()
    config = TrainConfig(steps=7, batch_size=8, lr=1e-2, eval_every=1)

    def run(kill=None, loss=loss, **options):
        def evaluate(model):
            calls.append(1)
            if len(calls) == kill:
                raise KeyboardInterrupt
            return {}

        calls, model, source = [], tiny(0), as_source(data, size=8, seed=0, name="text")
        train(model, loss, {"text": source}, config, evaluate=evaluate, **options, **OPTIONS)
        return bits(model)

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(4, folder=tmp_path)
    if kind == "list":
        refused(tmp_path, "loss", lambda: run(loss=lambda *given: 2 * loss(*given), folder=tmp_path))
    assert torch.equal(run(folder=tmp_path), whole)


def test_a_function_is_its_code_and_its_numbers():
    def factor(weight):
        return lambda x: weight * x

    one, two = (lambda x: x + 1), (lambda x: x + 2)
    assert function_identity(factor(2.0)) == function_identity(factor(2.0)) != function_identity(factor(3.0))
    assert function_identity(factor(2.0), values=False) == function_identity(factor(3.0), values=False)
    assert function_identity(one) != function_identity(two)


def test_a_model_that_was_saved_and_loaded_is_the_same(tiny, tmp_path):
    model = tiny(0)
    model.save_pretrained(tmp_path)
    assert model_identity(load_model(tmp_path).cpu()) == model_identity(model)
    assert model_identity(tiny(1))["weights"] != model_identity(model)["weights"]
