"""Every script of ``examples/`` runs, and its numbers agree with those that transformers and torch compute."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from gloo_processes import forked
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name; afterwards removes it and the methods that it registered."""
    from undo_core.unlearning.method import METHODS

    monkeypatch.syspath_prepend(str(EXAMPLES))
    modules, methods = set(sys.modules), dict(METHODS)
    yield importlib.import_module
    for name in {path.stem for path in EXAMPLES.glob("*.py")} & (set(sys.modules) - modules):
        del sys.modules[name]
    METHODS.clear()
    METHODS.update(methods)


def exact_divergence(student, teacher, batch):
    """Returns the divergence in float64, from the models' own logits."""
    labels = batch["labels"][:, 1:]
    inputs = {name: column for name, column in batch.items() if name != "labels"}
    s, t = (model.double()(**inputs).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    return (t.exp() * (t - s)).sum(-1)[labels != -100].mean().item()


def test_plain_loop(example):
    tiny, plain_loop = example("tiny"), example("plain_loop")
    losses = plain_loop.main(steps=10)
    assert losses[0] == pytest.approx(exact_divergence(tiny.model(0), tiny.model(1), tiny.batch(0)), rel=1e-4)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("name", ["hf_trainer", "trl_sft"])
def test_trainers(example, tmp_path, name):
    """The loss falls, and accumulating batches gives the loss of the whole batch at each step."""
    if name == "trl_sft":
        pytest.importorskip("trl")
    trainer = example(name)
    whole = trainer.main(str(tmp_path / "whole"), num_train_epochs=1)
    parts = trainer.main(
        str(tmp_path / "parts"), num_train_epochs=1, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    assert len(whole) == 8 and whole[-1] < (whole[0] / 2 if name == "hf_trainer" else whole[0])
    assert parts == pytest.approx(whole, rel=0.01)  # a logged loss has four digits; one that is divided twice would be half


def _train_on_rank(mesh, name, folder, settings):
    os.environ |= {"RANK": str(mesh.get_rank()), "LOCAL_RANK": str(mesh.get_rank()), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # the processes have joined already
    trained = _trained(importlib.import_module(name), folder, settings)
    torch.save(trained.state_dict(), folder / f"rank{mesh.get_rank()}.pt")


def _trained(module, folder, settings):
    """Returns the model that the trainer of an example has trained."""
    made, model = [], module.tiny.model
    module.tiny.model = lambda *seed, **options: made.append(model(*seed, **options)) or made[-1]
    try:
        module.main(str(folder), **settings)
    finally:
        module.tiny.model = model
    return made[0]


@pytest.mark.parametrize("name", ["hf_trainer", "trl_sft", "unlearning_trainer"])
def test_trainers_in_two_processes(example, tmp_path, name):
    """Under DDP every process ends with the model of one process that accumulates the batches of both."""
    if name == "trl_sft":
        pytest.importorskip("trl")
    module = example(name)
    settings = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": 4} | ({"method": "graddiff"} if name == "unlearning_trainer" else {})
    before = {key: value.clone() for key, value in module.tiny.model().state_dict().items()}
    assert not forked(2, _train_on_rank, name, tmp_path, {**settings, "ddp_backend": "gloo"})
    one = _trained(module, tmp_path, {**settings, "gradient_accumulation_steps": 2}).state_dict()
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        moved = (value - before[key]).norm()
        assert moved > 0 and (first[key] - value).norm() <= 1e-3 * moved, key


def test_packed_documents_stay_apart_in_trl(example, tmp_path):
    """TRL packs several documents into a sequence, and gives their positions instead of a mask."""
    pytest.importorskip("trl")
    from trl import SFTTrainer

    losses = []
    for of in (SFTTrainer, example("trl_sft").FusedSFTTrainer):
        losses.append(example("trl_sft").main(str(tmp_path), of, packing=True, num_train_epochs=1, learning_rate=3e-2))
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.parametrize("option", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_trl_losses_that_the_fused_one_is_not(example, tmp_path, option):
    pytest.importorskip("trl")
    with pytest.raises(ValueError, match="loss_type: got"):
        example("trl_sft").main(str(tmp_path), **option)


def test_trl_distillation(example, tmp_path):
    """The student learns on what it writes itself."""
    pytest.importorskip("trl")
    trainer = example("trl_distillation")
    losses = trainer.main(str(tmp_path), max_steps=6, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    assert len(losses) == 6 and losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["maxent", "graddiff", "npo"])
def test_unlearning_trainer(example, tmp_path, method):
    """The forget text becomes less likely than the retain text; accumulated batches train as whole ones."""
    (change, _), (parts, _) = _unlearn_whole_and_in_parts(example("unlearning_trainer"), tmp_path, method)
    assert change["forget"] > change["retain"] and change["retain"] < 1
    # Padding differs between batches, and with it the mean over a part's labels.
    assert all(abs(parts[part] - change[part]) < 0.2 * max(map(abs, change.values())) for part in change)


def test_unlearning_trainer_with_rmu(example, tmp_path):
    """The activations come nearer to their targets; those of an untrained model say nothing about its cross-entropy."""
    (_, losses), (_, parts) = _unlearn_whole_and_in_parts(example("unlearning_trainer"), tmp_path, "rmu")
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert parts == pytest.approx(losses, rel=0.01)


def _unlearn_whole_and_in_parts(trainer, folder, method):
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    return [trainer.main(str(folder), method, num_train_epochs=3, **options) for options in ({}, parts)]


def test_checkpoint(example, tmp_path):
    tiny, checkpoint = example("tiny"), example("checkpoint")
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    for seed, name in enumerate(("keep.txt", "forget.txt")):
        (tmp_path / name).write_text("\n".join(tiny.texts(17, seed)))
    files = [f"--retain={tmp_path / 'keep.txt'}", f"--forget={tmp_path / 'forget.txt'}"]
    result = checkpoint.main([str(tmp_path / "model"), str(tmp_path / "undone"), *files, "--steps=3"])
    assert set(result) == {"original", "unlearn only", "UNDO"} and all(0 < value < 20 for value in result.values())
    undone = AutoModelForCausalLM.from_pretrained(tmp_path / "undone").state_dict()
    assert any(not torch.equal(value, undone[name]) for name, value in tiny.model().state_dict().items())


def test_new_method(example):
    new_method = example("new_method")
    change = new_method.main(steps=30)
    assert change["forget"] > 1 and change["retain"] < 0


def test_noise_checkpoint(example, tmp_path):
    example("tiny").model().save_pretrained(tmp_path / "model")
    example("noise_checkpoint").main(str(tmp_path / "model"), str(tmp_path / "noised"))  # compares the bits itself


def test_notebook(tmp_path, capsys):
    """The cells run on a recorded result; the cell that computes it starts the demo."""
    matplotlib.use("Agg")
    shutil.copy(ROOT / "bench/results/sweep-alpha/runs/sweep-alpha/results-seed0.json", tmp_path)
    cells = [cell for cell in json.loads((EXAMPLES / "demo.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    names = {}
    for cell in cells:
        source = "".join(cell["source"])
        if source.startswith("!"):
            assert source.startswith("!undo run ../configs/arithmetic-cpu.yaml --output={OUTPUT} ")
            continue
        exec(source, names)
        names["OUTPUT"] = tmp_path
    printed = capsys.readouterr().out
    assert "undo-0.8" in printed and "filter" in printed
    drawn = {line.get_label(): line.get_ydata() for line in names["axes"].get_lines()}
    assert drawn["unlearn"][2] > drawn["undo-0.9"][2]
    names["plt"].close(names["figure"])
