"""Compares the peak memory that ``undo plan`` predicts with what the kernel measures, for whole stages in every training mode.

A stage runs as in the pipeline, from folders to a folder: with loading, training, evaluation and saving. Each stage runs in a
fork of one process that has imported everything and has run the same stage of a small model. The comparison is therefore of the
stage and not of the libraries: the high-water mark of the resident size less what was resident before, against the prediction
less its process part.

Prints a table, or records with ``--json``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness

# One arena, and large blocks are returned at once: the peak then counts only memory in use.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
LENGTH, SEQUENCES = 129, 8

SHAPES: dict[str, dict[str, Any]] = {
    # weights and optimizer states dominate; the batch is small
    "llama": {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False,
    },
    # a tied embedding that outweighs the layers, softcaps, eager attention
    "gemma2": {
        "model_type": "gemma2", "vocab_size": 40000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64,
    },
}  # fmt: skip
SMALL = {
    "num_hidden_layers": 2,
    "vocab_size": 4096,
}  # the same kernels and widths: what they load and keep belongs to the process


@dataclass(frozen=True)
class Case:
    """A measured stage: the settings of its training, teacher and method."""

    kind: str
    train: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    stored: str = "float32"


def _cases() -> dict[str, Case]:
    wide = {"batch_size": 8}  # activations as large as the weights
    cases = {
        "pretrain": Case("pretrain"),
        "pretrain, wide": Case("pretrain", wide),
        "pretrain, micro-batches": Case("pretrain", {**wide, "micro_batch_size": 4}),
        "pretrain, checkpointing": Case("pretrain", {**wide, "activation_checkpointing": True}),
        "pretrain, eager": Case("pretrain", {**wide, "attention": "eager"}),
        "step in backward": Case("pretrain", {"step_in_backward": True}),
        "lean": Case("pretrain", {**wide, "step_in_backward": True, "activation_checkpointing": True}),
    }
    for precision in ("bfloat16-master", "bfloat16-stochastic", "bfloat16"):
        cases[precision] = Case("pretrain", {"precision": precision})
        cases[f"{precision}, wide"] = Case("pretrain", {"precision": precision, **wide})
        cases[f"{precision}, step in backward"] = Case("pretrain", {"precision": precision, "step_in_backward": True})
    for bits in (8, 4):
        optimizer = {"optimizer": f"adamw-{bits}bit"}
        cases[f"{bits}-bit"] = Case("pretrain", optimizer)
        cases[f"{bits}-bit, step in backward"] = Case("pretrain", {**optimizer, "step_in_backward": True})
        cases[f"{bits}-bit, bfloat16-stochastic"] = Case("pretrain", {**optimizer, "precision": "bfloat16-stochastic"})
        cases[f"{bits}-bit, bfloat16-master"] = Case("pretrain", {**optimizer, "precision": "bfloat16-master"})
    for method in ("maxent", "graddiff"):
        cases[method] = Case("unlearn", settings={"method": method})
    cases["maxent, wide"] = Case("unlearn", wide, {"method": "maxent"})
    cases["rmu"] = Case("unlearn", settings={"method": "rmu"})
    cases["rmu, wide"] = Case("unlearn", wide, {"method": "rmu"})
    cases["rmu, bfloat16-master"] = Case("unlearn", {"precision": "bfloat16-master"}, {"method": "rmu"})
    for teacher in ("resident", "streamed", "cached", "topk"):
        cases[f"distill, {teacher}"] = Case("distill", settings={"teacher": {"kind": teacher}})
        cases[f"distill, {teacher}, lean"] = Case(
            "distill",
            {"step_in_backward": True, "activation_checkpointing": True, "precision": "bfloat16-stochastic", **wide},
            {"teacher": {"kind": teacher}},
        )
    cases["distill, bfloat16 folders"] = Case(
        "distill", {"precision": "bfloat16-stochastic"}, {"teacher": {"kind": "resident"}}, "bfloat16"
    )
    cases["cache"] = Case("cache", settings={"kind": "cached"})
    cases["cache, streamed"] = Case("cache", settings={"kind": "cached", "streamed": True})
    cases["cache, topk"] = Case("cache", settings={"kind": "topk"})
    cases["relearn"] = Case("relearn")
    cases["relearn, bfloat16"] = Case("relearn", {"precision": "bfloat16"})
    cases["noise"] = Case("noise")
    cases["noise, bfloat16"] = Case("noise", stored="bfloat16")
    return {f"{shape}: {name}": case for shape in SHAPES for name, case in cases.items()}


CASES = _cases()


# -- folders -------------------------------------------------------------------------------------------------------------------


def prepare(folder: Path, settings: dict[str, Any], dtype: str) -> Path:
    """Writes a prepared folder with sequences of random tokens and a model with random weights."""
    import torch

    from undo_core.data.sequences import Sequences
    from undo_core.data.splits import TRAIN_SPLITS
    from undo_core.data.tokenizers import character_tokenizer
    from undo_core.models import build_model

    if folder.exists():
        return folder
    settings = dict(settings)
    tokenizer = character_tokenizer("0123456789")
    model = build_model(settings, tokenizer, 0)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "data").mkdir()
    generator = torch.Generator().manual_seed(1)
    names = [*TRAIN_SPLITS.values(), *(f"{part}_{name}" for part in ("valid", "test") for name in ("retain", "forget"))]
    for name in names:
        sequences = (
            SEQUENCES if name in (*TRAIN_SPLITS.values(), "valid_retain") else 1
        )  # only the largest split decides the peak
        ids = torch.randint(3, settings["vocab_size"], (sequences, LENGTH), generator=generator)
        Sequences(ids.to(torch.int32), pad_id=0).save(folder / "data" / f"{name}.safetensors")
    return folder


def stage_of(case: Case, folder: Path) -> Any:
    """Returns the stage of a case with two steps; ``folder`` serves as the data and as every model."""
    from undo_core.attacks.relearning import AttackConfig
    from undo_core.distillation.teacher import TeacherConfig
    from undo_core.pipeline.stage import Folder
    from undo_core.pipeline.stages import Cache, Distill, Noise, Pretrain, Relearn, Unlearn
    from undo_core.training import TrainConfig
    from undo_core.unlearning import RMUConfig, UnlearnConfig

    train = TrainConfig(**{"steps": 2, "batch_size": 2, "lr": 1e-4, "seed": 0, **case.train})
    prepared = model = Folder(folder)
    if case.kind == "pretrain":
        return Pretrain(train=train, splits=("retain", "forget"), prepared=prepared)
    if case.kind == "unlearn":
        rmu = RMUConfig(first_layer=0, target_layer=2)
        return Unlearn(config=UnlearnConfig(train=train, rmu=rmu, **case.settings), prepared=prepared, model=model)
    if case.kind == "distill":
        config, cached = TeacherConfig(**case.settings["teacher"]), None
        if config.stored:
            cached = Folder(folder.parent / f"cache-{config.kind}-{case.stored}")
        return Distill(train=train, recover=None, config=config, prepared=prepared, teacher=model, student=model, cache=cached)
    if case.kind == "cache":
        settings = {name: value for name, value in case.settings.items() if name != "streamed"}
        config = TeacherConfig(**settings, batch_size=16)
        return Cache(config=config, streamed=case.settings.get("streamed", False), prepared=prepared, teacher=model)
    if case.kind == "relearn":
        grid = {"rates": [1e-4], "evaluate_at": [0, 2], "headline_step": 2, "extend": 0, "batch_size": 2}
        return Relearn(config=AttackConfig(**grid, **case.train), prepared=prepared, model=model)
    return Noise(alpha=0.5, beta=0.1, law="xavier_uniform", seed=0, model=model)


def run_stage(case: Case, root: Path, shape: dict[str, Any]) -> None:
    """Runs the stage of a case, after making the folders that are missing."""
    from undo_core.io.files import fresh

    stage = stage_of(case, prepare(root / case.stored, shape, case.stored))
    make_cache(stage)
    run_in(stage, fresh(root / "output"))


def make_cache(stage: Any) -> None:
    """Makes the cache that a distillation reads, if it is missing, with the manifest that a store would add."""
    from undo_core.io.files import fresh, write_json
    from undo_core.pipeline.stage import MANIFEST
    from undo_core.pipeline.stages import Cache

    folder = stage.inputs.get("cache")
    if folder is None or folder.path.exists():
        return
    config = dataclasses.replace(stage.config, batch_size=16)
    made = Cache(config=config, prepared=stage.prepared, teacher=stage.teacher)
    write_json(folder.path / MANIFEST, run_in(made, fresh(folder.path)))


def run_in(stage: Any, output: Path) -> dict[str, Any]:
    """Runs a stage whose inputs are folders and writes to ``output``; returns the stage's facts."""
    from undo_core.io.files import fresh
    from undo_core.pipeline.stage import Work

    inputs = {name: folder.path for name, folder in stage.inputs.items()}
    return stage.run(Work(inputs, fresh(output.parent / "scratch"), output, "measured"))


# -- measuring -----------------------------------------------------------------------------------------------------------------


def measure(name: str, root: Path) -> dict[str, Any]:
    """Predicts and measures, in this process, the memory of a stage beyond that of the process."""
    import torch
    from transformers import AutoConfig
    from undo_kernels.cpu.workspace import release

    from undo_core.pipeline.memory.predictor import Predictor

    case, shape = CASES[name], SHAPES[name.split(":")[0]]
    folder = root / shape["model_type"]
    run_stage(case, root / f"{shape['model_type']}-small", {**shape, **SMALL})  # loads and compiles what the process keeps
    predict = Predictor(AutoConfig.from_pretrained(folder / case.stored), LENGTH, evaluated=SEQUENCES, device="cpu")
    memory = predict(stage_of(case, folder / case.stored), getattr(torch, case.stored))
    release()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = harness.status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run_stage(case, folder, shape)
    measured, predicted = harness.status("VmHWM") - before, memory.total - memory.process
    return {"case": name, "moment": memory.phase, "process": before, "measured": measured, "predicted": predicted}


def forked(name: str, root: Path) -> dict[str, Any]:
    """Runs :func:`measure` in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BrokenPipeError):
            try:
                result = json.dumps(measure(name, root))
                status = 0
            except BaseException as error:
                import traceback

                traceback.print_exc()
                result = json.dumps({"case": name, "error": f"{type(error).__name__}: {error}"})
            os.write(writing, result.encode())
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text or json.dumps({"case": name, "error": "killed"}))


def _prepare_all(names: list[str], root: Path) -> None:
    """Makes the folders and caches of the large shapes in a fork, so that this process stays as small as its imports."""
    child = os.fork()
    if not child:
        status = 1
        try:
            for name in names:
                case, shape = CASES[name], SHAPES[name.split(":")[0]]
                folder = root / shape["model_type"]
                prepared = prepare(folder / case.stored, shape, case.stored)
                make_cache(stage_of(case, prepared))
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the folders could not be made")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases",
        nargs="*",
        metavar="TEXT",
        default=[""],
        help="run only the cases whose name contains one of these texts (all)",
    )
    parser.add_argument("--exact", action="store_true", help="the texts are whole names")
    parser.add_argument("--json", action="store_true", help="print one record a line")
    options = parser.parse_args(arguments)
    found = [n for n in CASES if any(n == text if options.exact else text in n for text in options.cases)]
    import torch
    import torchao.optim  # noqa: F401
    import transformers
    from rich.console import Console

    import undo_core.pipeline.stages  # noqa: F401

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    console = Console(highlight=False, soft_wrap=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as root:
        _prepare_all(found, Path(root))
        if not options.json:
            console.print(f"{'case':52} {'during':>10} {'predicted':>10} {'measured':>10} {'ratio':>6}  MiB beyond the process")
        for name in found:
            record = forked(name, Path(root))
            failed += "error" in record
            if options.json:
                print(json.dumps(record), flush=True)
            elif "error" in record:
                console.print(f"{name:52} {record['error']}")
            else:
                predicted, measured = (record[key] / 2**20 for key in ("predicted", "measured"))
                console.print(
                    f"{name:52} {record['moment']:>10} {predicted:>10.1f} {measured:>10.1f} {predicted / measured:>6.2f}  "
                    f"({record['process'] / 2**20:.0f})"
                )
    return 1 if failed else 0


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in MALLOC.items()) and not os.environ.get("BENCH_DEFAULT_MALLOC"):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    sys.exit(main())
