"""The stages run as ``undo plan`` says, and its flags make every stage fit."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from stage_kinds import NOWHERE
from transformers import AutoConfig

from undo_core.attacks.relearning import AttackConfig
from undo_core.cli import main
from undo_core.data.config import DataConfig
from undo_core.distillation.config import DistillConfig
from undo_core.distillation.gate import GateConfig
from undo_core.distillation.teacher import TeacherConfig
from undo_core.models import initialise
from undo_core.models.config import ModelConfig
from undo_core.noise.config import NoiseConfig
from undo_core.pipeline.config import ControlsConfig, PretrainConfig, RunConfig
from undo_core.pipeline.graph import graph_of
from undo_core.pipeline.needs import Memory, Scene
from undo_core.pipeline.run import run
from undo_core.pipeline.stages import Cache, Pretrain
from undo_core.pipeline.store import Store
from undo_core.planning.fit import bytes_of
from undo_core.planning.table import SHORT_ATTACK, SHORT_RUN, Row, _alike, _tables, plan_rows, plan_table, stages_table
from undo_core.planning.timing import Measure
from undo_core.training import Batch, TrainConfig, train
from undo_core.unlearning import UnlearnConfig

SHAPE = {"model_type": "gemma2", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


ROOT = Path(__file__).resolve().parents[3]


def config(output, teacher=None) -> RunConfig:
    train = TrainConfig(steps=3, batch_size=8)
    return RunConfig(
        name="planned",
        output=str(output),
        data=DataConfig(train_rows=100, eval_prompts=20),
        model=ModelConfig(config={**SHAPE, "num_key_value_heads": 1, "head_dim": 8}),
        pretrain=PretrainConfig(train=train),
        unlearn=UnlearnConfig(train=train),
        noise=NoiseConfig(alphas=[0.5]),
        distill=DistillConfig(recover=None, train=train, teacher=teacher or TeacherConfig()),
        relearn=AttackConfig(rates=[1e-3, 2e-3], evaluate_at=[0, 2], headline_step=2, extend=0, batch_size=8),
        controls=ControlsConfig(filter=False),
    )


def show(settings) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(plan_table(settings))
    return capture.get()


@pytest.mark.parametrize("teacher", [TeacherConfig(), TeacherConfig("cached")], ids=lambda teacher: teacher.kind)
def test_the_plan_is_what_then_runs(tmp_path, teacher):
    settings = config(tmp_path, teacher)
    store = Store(tmp_path / "stages")
    rows, disk = plan_rows(settings, store)
    assert not list(tmp_path.iterdir()), "planning writes nothing"
    assert [row.title for row in rows][:3] == ["prepare", "pretrain", "unlearn maxent"] and not any(row.done for row in rows)
    assert disk > 0 and all(row.title != "cache teacher" for row in rows) == (teacher.kind == "resident")
    assert all(row.seconds > 0 and row.flops > 0 for row in rows if row.steps)
    assert "relearn undo-0.5, 2 rates" in show(settings)

    run(settings, "test")
    by_folder = {row.folder: row for row in plan_rows(settings, store)[0]}
    assert all(row.done for row in by_folder.values()) and show(settings).count("done") == len(by_folder)
    for stage in graph_of(settings).stages():
        facts, row = store.manifest(stage), by_folder[stage.name]
        assert 0.5 < row.memory.total / facts["peak_bytes"] < 2
        if "steps" in facts:
            assert row.steps == facts["steps"] and row.positions == sum(facts["positions_by_source"].values())
            assert row.flops == pytest.approx(facts["flops"], rel=1e-12)
        if isinstance(stage, Cache):
            assert row.flops == facts["flops"] and row.positions == 200 * 11
            stored = sum(path.stat().st_size for path in store.folder(stage).glob("*.safetensors"))
            assert 0.9 < stored / facts["bytes"] <= 1


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("measured", [None, 7999 << 20])
def test_no_number_is_cut_whatever_the_titles(tmp_path, width, measured):
    parts = {"weights": 1111, "gradients": 1222, "optimizer": 1333, "activations": 1444, "teacher": 1555, "process": 666}
    memory = Memory("evaluation", **{name: number << 20 for name, number in parts.items()})
    title = "relearn only-embedding-redrawn, 3 rates"
    folder = "initialise-0123456789ab"
    row = Row(title, 3000, True, 4_224_000, 11.47e12, 6300.0, memory, measured, 4321 << 20, 0, 0.0, folder, False)
    other = replace(row, title="relearn only-both-redrawn-equal-in-distance, 3 rates", folder="relearn-0123456789ab")
    smaller = replace(row, title="relearn a", memory=replace(memory, weights=7 << 20))
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(_tables(config(tmp_path), [row, other, smaller], 0, 1))
    work, _, needs = capture.get().partition("Peak memory")
    assert "…" not in capture.get() and max(map(len, capture.get().splitlines())) <= width
    for text in ("<= 3,000", "4.22M", "11.5T", "<= 105 min", "4,321", "initialise-0123456789ab", "relearn-0123456789ab"):
        assert text in work, text
    (line,) = (line for line in needs.splitlines() if "1,111" in line)
    wanted = ["7,331", *(["7,999"] if measured else []), "evaluation", "1,111", "1,222", "1,333", "1,444", "0", "1,555", "666"]
    assert line.split()[-len(wanted) :] == wanted
    assert [title for title, _ in _alike([row, other, smaller])] == ["relearn, 2 lines", "relearn a"]


@pytest.mark.parametrize("done", [False, True])
def test_a_plan_warns_of_a_busy_machine_while_there_is_work(tmp_path, monkeypatch, done):
    monkeypatch.setattr("undo_core.planning.table.load_warning", lambda workers: f"BUSY with {workers} worker(s).")
    row = Row("noise", 0, False, 0, 0.0, 0.0, Memory("step", weights=1), None, 0, 0, 0.0, "noise-0", done)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(_tables(config(tmp_path), [row], 0, 1))
    assert ("BUSY with 1 worker(s). The times above are longer for it." in capture.get()) == (not done)


@pytest.mark.parametrize(("process", "said"), [(550 << 20, True), (0, False)], ids=["cpu", "gpu"])
def test_a_plan_for_a_cpu_says_how_much_more_was_measured(tmp_path, process, said):
    memory = Memory("step", weights=1, process=process)
    row = Row("noise", 0, False, 0, 0.0, 0.0, memory, None, 0, 0, 0.0, "noise-0", False)
    console = Console(width=400)
    with console.capture() as capture:
        console.print(_tables(config(tmp_path), [row], 0, 1))
    assert ("On a CPU, leave room for a fifth more" in capture.get() and "9 to 17 % more" in capture.get()) == said


@pytest.mark.parametrize(("seconds", "long"), [(2e4, True), (0.01, False)])
def test_a_plan_of_more_than_a_day_says_what_to_cut(tmp_path, monkeypatch, seconds, long):
    monkeypatch.setattr(Measure, "seconds", lambda *arguments: seconds)
    printed = " ".join(show(config(tmp_path)).split())
    assert ("This takes longer than a day on this machine." in printed) == long
    # Three models of three steps each are trained, and three attacked with two rates for two steps each.
    assert ("Most of it: relearn 50% (the number of relearn.rates" in printed and "distill 25%" in printed) == long
    assert ('docs/guides/checkpoint.md, "A small model, or a first trial"' in printed) == long
    graph = graph_of(config(tmp_path))
    lines = [(stage.title, [stage]) for stage in graph.stages() if stage.kind == "distill"]
    console = Console(width=140, highlight=False)
    with console.capture() as capture:
        console.print(stages_table(config(tmp_path), lines, graph.prepared))
    assert ('docs/guides/attack.md, "A short attack on a CPU"' in " ".join(capture.get().split())) == long
    for guide in (SHORT_RUN, SHORT_ATTACK):
        page, title = re.fullmatch(r'(\S+), "(.*)"', guide).groups()
        assert f"\n## {title}\n" in (ROOT / page).read_text()


def test_the_cached_teacher_and_the_gate_have_a_time_before_the_data_are_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(Measure, "_step", lambda self, sequences, length: 1.0)
    for name in ("retain", "forget"):
        text = "".join(f"{name} {i} and {i * 7} more\n" for i in range(1000))
        (tmp_path / f"{name}.txt").write_text(text)
    data = DataConfig(
        kind="text", retain=[str(tmp_path / "retain.txt")], forget=[str(tmp_path / "forget.txt")], tokens=4000, length=32
    )
    data = replace(data, vocab_size=400)
    teacher, gate = TeacherConfig("cached"), GateConfig(share=0.1)
    settings = replace(config(tmp_path / "run", teacher), data=data)
    settings = replace(settings, controls=replace(settings.controls, gate=gate))
    store, graph = Store(tmp_path / "run" / "stages"), graph_of(settings)
    before = {row.title: row for row in plan_rows(settings, store)[0]}
    assert before["cache teacher"].seconds > 0 and before["gate"].seconds > 0
    assert {row.title for row in before.values() if not row.seconds} == {"prepare", "noise 0.5", "random student"}
    store.ensure(graph.prepared)
    after = {row.title: row for row in plan_rows(settings, store)[0]}
    assert before["cache teacher"].positions == pytest.approx(after["cache teacher"].positions, rel=0.1)


@pytest.mark.parametrize(("precision", "optimizer"), [("float32", "adamw"), ("bfloat16-master", "adamw"), ("bfloat16", "sgd")])
def test_the_plan_knows_the_size_of_a_checkpoint_within_a_stage(tmp_path, precision, optimizer):
    shape = {**SHAPE, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 5000}
    model = initialise(AutoConfig.for_model(shape.pop("model_type"), **shape), 0)
    settings = TrainConfig(steps=1, batch_size=2, precision=precision, optimizer=optimizer)
    cost = Pretrain(train=settings, splits=("retain",), prepared=NOWHERE).cost(Scene(model, 8, 0))
    source = {"text": lambda step: Batch(torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.bool))}
    loss = lambda model, batches, counted: model(input_ids=batches["text"].input_ids).logits.square().mean()  # noqa: E731
    train(model, loss, source, settings, folder=tmp_path, checkpoint_seconds=-1)
    (checkpoint,) = (tmp_path / "checkpoint").iterdir()
    written = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert cost.checkpoint == pytest.approx(written, rel=0.05)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_planned_disk_has_room_for_the_checkpoints_of_the_stages_that_run_together(tmp_path, workers):
    """A published checkpoint is kept until the next is complete; a model in float32 has 4 bytes a parameter, with moments 12."""
    settings = replace(config(tmp_path), workers=workers)
    rows, disk = plan_rows(settings, Store(tmp_path / "stages"))
    model = next(row.disk_bytes for row in rows if row.title == "pretrain")
    folders = sum(row.disk_bytes for row in rows)
    assert disk == folders + workers * (2 * 3 * model - model)
    printed = " ".join(show(settings).split())
    assert f"up to {disk / 2**20:,.0f} MiB of disk, {(disk - folders) / 2**20:,.0f} of them for checkpoints of" in printed


def test_a_large_model_is_planned_without_being_built(tmp_path):
    large = {**SHAPE, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8}
    settings = replace(config(tmp_path), model=ModelConfig(config={**large, "vocab_size": 256000}))
    rows, disk = plan_rows(settings, Store(tmp_path))
    assert disk > 8e9 and rows[1].memory.total > 16 * 2.4e9 and rows[1].seconds > 0


@pytest.mark.parametrize(("text", "wanted"), [("24GB", 24 * 10**9), ("1.5GiB", 3 << 29), ("500 MB", 5 * 10**8)])
def test_sizes_of_memory(text, wanted):
    assert bytes_of(text) == wanted


@pytest.mark.parametrize("text", ["lots", "-1GB", "0GB", "GB"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=rf"^memory: got {text!r}|^memory: got {text}"):
        bytes_of(text)


def test_what_makes_every_stage_fit(tmp_path, capsys, monkeypatch):
    """The vocabulary is so large that the workspace and the gradient of the logits matter, so that changes save memory."""
    monkeypatch.setattr(Measure, "_step", lambda self, sequences, length: 1.0)  # this test needs memory, not time
    Path(tmp_path / "a.jsonl").write_text("".join(f'{{"text": "word {i} and {i * 7} more"}}\n' for i in range(300)))
    sources = [f"--data.{name}=[{tmp_path / 'a.jsonl'}]" for name in ("retain", "forget")]
    shape = {**SHAPE, "num_key_value_heads": 1, "head_dim": 8, "hidden_size": 64, "vocab_size": 60000}
    arguments = ["plan", str(ROOT / "configs" / "language-cpu.yaml"), *sources, f"--model.config={json.dumps(shape)}"]
    arguments += [f"--output={tmp_path / 'run'}", "--data.length=128"]
    assert main([*arguments, "--memory", "760MB"]) == 0
    suggested = {
        line.split(":")[0]: line.split(" with ")[1].split()
        for line in capsys.readouterr().out.splitlines()
        if " with --" in line
    }
    assert suggested and len(suggested) == len({flag.split(".")[0] for flags in suggested.values() for flag in flags}), (
        "each kind once"
    )
    flags = [flag for flags in suggested.values() for flag in flags]
    assert main([*arguments, *flags, "--memory", "760MB"]) == 0, "the flags are real ones"
    assert "Every stage fits in 760MB" in " ".join(capsys.readouterr().out.split())
    assert main([*arguments, "--memory", "1MB"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("undo: error: memory: got 1MB, which is too little: ")
    assert "needs at least" in error and not (tmp_path / "run").exists()
