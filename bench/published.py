"""Proves without a GPU what can be proved of the published runs, and writes the page about it.

Three parts, each for language, arithmetic and WMDP at their published settings, with generated data in the true formats
(``hub_replica.py``) and a tokenizer of 256,000 entries:

- **data**: streams the hub's files through ``datasets``, counts tokens per second, and parses as many questions as WMDP and MMLU have;
- **run**: runs every kind of stage on a model of two layers for two steps, in a process of its own, and compares the peak memory with
  the plan's prediction. Everything else is as published except what ``CUT`` and ``SEQUENCES`` name. The largest stage takes 9 GB;
- **plan**: asks the plan of the full configuration for FLOPs, memory on a GPU and bytes between several.

    python bench/published.py                       all parts, and the page; about half an hour on two idle cores
    python bench/published.py run --only language   one part of one experiment; the page keeps the results of the others
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hub_replica import QUESTIONS, large_tokenizer, write_replica
from transformers import AutoConfig

from undo_core.cli.parser import run_config
from undo_core.data.encoding import encoded
from undo_core.data.questions import read_questions
from undo_core.data.reading import read_documents
from undo_core.models import initialise, load_tokenizer
from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.described import model_config
from undo_core.pipeline.graph import attacked_models, graph_of
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.model_stage import TrainingStage
from undo_core.pipeline.stage import Stage
from undo_core.pipeline.store import Store
from undo_core.pipeline.workers import use_threads
from undo_core.planning.models import sequence_length
from undo_core.planning.table import plan_rows
from undo_core.training import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "published.json", ROOT / "docs" / "results" / "published.md"
CONFIGS = {"language": "language", "arithmetic": "arithmetic", "wmdp": "wmdp-gemma-2-2b"}
CHECKPOINT = "checkpoints/gemma-2-2b"
GEMMA = {"model_type": "gemma2", "vocab_size": 256_000, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
CUT = {
    "language": "2 of 14 layers; 2 steps; {tokens} tokens of each language",
    "arithmetic": "2 of 14 layers; 2 steps; {rows} problems; a tokenizer of 256,000 entries, as published (`--data.tokenizer`)",
    "wmdp": "2 of 26 layers, so RMU trains layer 0 and reads layer 1; 2 steps; {tokens} tokens of each corpus; 12 questions of WMDP and, "
    "with five examples each, 6 of MMLU score `unlearn`, `distill` and `relearn`",
}
STAGES = {
    "language": ("prepare", "pretrain", "unlearn", "noise", "distill", "relearn"),
    "arithmetic": ("prepare", "pretrain", "unlearn", "noise", "distill", "relearn"),
    "wmdp": ("prepare", "unlearn", "noise", "distill", "relearn"),
}
# Sequences in a step and in a micro-batch, of the stages that would otherwise take more than 9 GB or too long; the others are as published.
SEQUENCES: dict[str, dict[str, dict[str, int]]] = {
    "language": {stage: {"batch_size": 2, "micro_batch_size": 1} for stage in ("pretrain", "unlearn", "distill")}
    | {"relearn": {"micro_batch_size": 4}},
    "arithmetic": {stage: {"batch_size": 2, "micro_batch_size": 1} for stage in ("pretrain", "unlearn", "distill", "relearn")},
    "wmdp": {
        "unlearn": {"batch_size": 4},
        "distill": {"batch_size": 1, "micro_batch_size": 1},
        "relearn": {"micro_batch_size": 4},
    },
}
TOKENS, ROWS = 60_000, 2_000
# An H200 SXM by NVIDIA's data sheet: dense bfloat16 and float32 (not TF32) FLOP/s, and NVLink in one direction. The shares are assumed.
PEAK, NVLINK = {"bfloat16": 989e12, "float32": 67e12}, 450e9
COMPUTED, SENT = 0.4, 0.8
# GPUs that train one model together. The unlearning of language has 4 sequences in a step, and each rank takes at least one of every
# micro-batch; so 8 GPUs train two such runs. Its micro-batches are those of one GPU for each of the four.
RANKS = {"language": 4, "arithmetic": 8, "wmdp": 8}
TOGETHER = {
    "language": ["--pretrain.train.micro_batch_size=20", "--distill.train.micro_batch_size=16"],
    "arithmetic": [],
    "wmdp": [],
}


def configuration(name: str, *flags: str) -> RunConfig:
    """A shipped configuration with other settings."""
    return run_config([f"--config={ROOT / 'configs' / CONFIGS[name]}.yaml", *flags])


def overrides(name: str) -> list[str]:
    """The flags that cut a configuration down to what ``CUT`` and ``SEQUENCES`` say."""
    values: dict[str, Any] = {"output": "out", "noise.alphas": None, "controls": {"filter": False, "random": False}}
    values["noise.alphas"] = [0.25 if name == "wmdp" else 0.6]
    for stage in ("unlearn", "distill", *(() if name == "wmdp" else ("pretrain",))):
        values |= {f"{stage}.train.{key}": value for key, value in {"steps": 2, "warmup": 1, "eval_every": 2}.items()}
    for stage, sizes in SEQUENCES[name].items():
        values |= {f"{stage}{'' if stage == 'relearn' else '.train'}.{key}": value for key, value in sizes.items()}
    values |= {"distill.recover": None}
    values |= {"relearn.rates": [1e-5], "relearn.evaluate_at": [0, 2], "relearn.headline_step": 2}
    if name == "wmdp":
        values |= {"model.path": "checkpoints/two-layers", "data.tokens": TOKENS, "data.distill.tokens": 2 * TOKENS}
        values |= {"data.valid_fraction": 0.1, "unlearn.rmu.first_layer": 0, "unlearn.rmu.target_layer": 1}
        values |= {"data.questions.valid_fraction": 0.3}
    elif name == "language":
        values |= {"model.config.num_hidden_layers": 2, "data.tokens": TOKENS, "data.valid_fraction": 0.05}
    else:
        values |= {"model.config.num_hidden_layers": 2, "data.train_rows": ROWS, "data.eval_prompts": 16}
        values |= {"data.tokenizer": CHECKPOINT, "pretrain.stop_retain": None, "pretrain.stop_forget": None}
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def prepare(folder: Path, documents: int, questions: dict[str, int] | None, subjects: int) -> None:
    """Writes the replica of the hub and the checkpoint folder that the configurations name, without weights."""
    write_replica(folder, documents, questions, subjects)
    large_tokenizer().save_pretrained(folder / CHECKPOINT)
    AutoConfig.for_model(**GEMMA).save_pretrained(folder / CHECKPOINT)


# -- data --------------------------------------------------------------------------------------------------------------------------


def data(folder: Path) -> dict[str, Any]:
    """Streams and parses the replica; returns rates and counts."""
    prepare(folder, 400, None, 57)
    tokenizer, found = load_tokenizer(folder / CHECKPOINT), {}
    for source in ("hf://HuggingFaceFW/fineweb-edu:sample-10BT", "hf://HuggingFaceFW/fineweb-2:kor_Hang"):
        next(iter(read_documents([source])))  # the first call imports datasets
        began, tokens, size, count = time.perf_counter(), 0, 0, 0
        documents = read_documents([source])
        while texts := list(itertools.islice(documents, 256)):
            tokens += sum(map(len, encoded(tokenizer, texts)))
            size, count = size + sum(len(text.encode()) for text in texts), count + len(texts)
        seconds = time.perf_counter() - began
        found[source] = {"documents": count, "tokens": tokens, "bytes": size, "tokens_per_second": tokens / seconds}
    began = time.perf_counter()
    for source in ("hf://cais/wmdp:wmdp-cyber", "hf://cais/mmlu:all", "hf://cais/mmlu:all:dev"):
        found[source] = {"questions": len(read_questions([source]))}
    assert [found[s]["questions"] for s in found if "questions" in found[s]] == list(QUESTIONS.values())
    return {"streamed": found, "questions_seconds": time.perf_counter() - began}


# -- run ---------------------------------------------------------------------------------------------------------------------------


def run(folder: Path, name: str) -> dict[str, Any]:
    """Builds one stage of each kind and returns predicted and measured peaks."""
    prepare(folder, 120, {"wmdp-cyber": 12, "test": 12, "dev": 30}, 6)
    if name == "wmdp":
        small = folder / "checkpoints" / "two-layers"
        large_tokenizer().save_pretrained(small)
        initialise(AutoConfig.for_model(**GEMMA, num_hidden_layers=2), 0).bfloat16().save_pretrained(small)
    rows = []
    for kind in STAGES[name]:
        # A process of its own: what an earlier stage left in the allocator would count as this one's.
        command = [sys.executable, __file__, "stage", "--only", name, "--kind", kind]
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        )
        if done.returncode:
            raise RuntimeError(f"{name}, {kind}: {done.stderr[-2000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {rows[-1]}", flush=True)
    return {"cut": CUT[name].format(tokens=f"{TOKENS:,}", rows=f"{ROWS:,}"), "stages": rows}


def kinds(config: RunConfig) -> dict[str, Stage]:
    """One stage of each kind that the configuration needs."""
    graph = graph_of(config)
    attacked = attacked_models(config, graph)["relearn"]
    found: dict[str, Stage] = {}
    for stage in [*graph.stages(), attacked["unlearn"].stages()[0]]:
        found.setdefault(stage.kind, stage)
    return found


def stage(name: str, kind: str) -> None:
    """Builds one stage in the working directory and prints what it took."""
    config = configuration(name, *overrides(name))
    made, store = kinds(config)[kind], Store(Path("out/stages"))
    use_threads(1)
    store.ensure(made)
    facts, prepared = store.manifest(made), store.manifest(graph_of(config).prepared)
    tested = [part for split, part in prepared["splits"].items() if split.startswith(("test", "valid"))]
    scored = {"answers": config.data.metric == "accuracy", "choices": 4 if config.data.questions else 0}
    most, longest = max(part["rows"] for part in tested), max(part["length"] for part in tested)
    predict = Predictor(
        model_config(config), sequence_length(config, made), **scored, evaluated=most, evaluated_length=longest, device="cpu"
    )
    row = {"stage": kind, "predicted": predict(made).total, "measured": facts["peak_bytes"], "seconds": facts["seconds"]}
    if isinstance(made, TrainingStage):
        values = [value for entry in facts["history"] for value in entry.values() if isinstance(value, float)]
        row |= {"steps": facts["steps"], "finite": bool(values) and all(map(math.isfinite, values)), "length": predict.length}
        row |= {"step": parts(made.training), "published": parts(kinds(configuration(name))[kind].training)}
    print(json.dumps(row))


def parts(train: TrainConfig) -> list[int]:
    """Returns the numbers of sequences in a step and in a micro-batch."""
    return [train.batch_size, train.micro_batch_size or train.batch_size]


# -- plan --------------------------------------------------------------------------------------------------------------------------


def plan(folder: Path, name: str) -> list[dict[str, Any]]:
    """Plans the full configuration: FLOPs, memory of one GPU, and bytes between several, by stage."""
    prepare(folder, 3, {"wmdp-cyber": 5, "test": 5, "dev": 5}, 1)
    os.chdir(folder)
    flags = [f"--data.tokenizer={CHECKPOINT}"] if name == "arithmetic" else []
    config, store = configuration(name, "--output=out", *flags), Store(Path("nowhere"))
    graph = graph_of(config)
    trials = [
        stage for models in attacked_models(config, graph).values() for model in models.values() for stage in model.stages()
    ]
    precisions = {
        stage.name: stage.training.precision for stage in [*graph.stages(), *trials] if isinstance(stage, TrainingStage)
    }
    one, _ = plan_rows(config, store)
    ranks, rows = RANKS[name], []
    several, _ = plan_rows(configuration(name, "--output=out", *flags, *TOGETHER[name]), store, ranks)
    for row, shared in zip(one, several, strict=True):
        work = {}
        if row.steps:
            precision = precisions[row.folder]
            compute = row.flops / (PEAK[precision] * COMPUTED)
            wire = row.steps * shared.wire_bytes / (NVLINK * SENT)
            work = {"precision": precision, "one": compute / 3600, "several": (compute / ranks + wire) / 3600}
        memory = {
            "memory": row.memory.total - row.memory.process,
            "memory_of_several": shared.memory.total - shared.memory.process,
        }
        rows.append({"stage": row.title, "steps": row.steps, "flops": row.flops, **memory, **work})
    return rows


# -- page --------------------------------------------------------------------------------------------------------------------------


def page(results: dict[str, Any]) -> str:
    """The generated part of the page."""
    parts = ["## Proved and not proved", _proved(results)]
    if "data" in results:
        parts += ["## Data", _data(results["data"]["hub"])]
    measured = [name for name in CONFIGS if name in results.get("run", {})]
    if measured:
        said = (
            "Each stage ran in a process of its own, on a busy machine, which the seconds show. Sequence lengths, the vocabulary of 256,000 "
            "entries and precisions are the published ones. Sequences in a step: micro-batches × sequences in each. `prepare` is not "
            "predicted well: the plan leaves out the tokenizer, which takes 300 MB while one of 256,000 entries is loaded, and what "
            "`datasets` imports."
        )
        parts += [
            "## Two layers: predicted and measured peak memory",
            said,
            *(_measured(name, results["run"][name]) for name in measured),
        ]
    planned = [name for name in CONFIGS if name in results.get("plan", {})]
    if planned:
        parts += ["## A schedule on paper", _assumed(), *(_schedule(name, results["plan"][name]) for name in planned)]
    return "\n\n".join(parts)


def _proved(results: dict[str, Any]) -> str:
    lines = ["| published experiment | proved without a GPU | not proved |", "|---|---|---|"]
    proved = {
        "language": "English and Korean in the hub's files and columns, streamed through `datasets`; packing to 2,048; ",
        "arithmetic": "the published generator with a tokenizer of 256,000 entries; packing to 256; answers scored greedily; ",
        "wmdp": "the corpora, Wikipedia, FineWeb-Edu and seven Magpie sets with their shares, streamed; all 1,987 questions of WMDP and "
        "14,042 + 285 of MMLU parsed, five examples before a question; ",
    }
    missing = {
        "language": "the hub itself and Gemma's tokenizer; 2 billion tokens; any loss, robustness or time; the Triton kernels",
        "arithmetic": "Gemma's tokenizer, which splits digits; the pretraining's accuracies; any time; the Triton kernels",
        "wmdp": "the hub itself, Gemma 2 2B's weights and tokenizer; the question-answer texts that were not published; accuracies; "
        "any time; the Triton kernels in bfloat16",
    }
    for name in CONFIGS:
        ran = results.get("run", {}).get(name)
        stages = "its stages were not run on two layers yet"
        if ran:
            trained = [row for row in ran["stages"] if "step" in row]
            finite = all(row["finite"] for row in trained)
            done = [row["stage"] for row in ran["stages"]]
            left = [kind for kind in STAGES[name] if kind not in done]
            stages = f"{', '.join(done)} on two layers{', all values finite' * finite}"
            stages += f"; not run yet: {', '.join(left)}" if left else ""
            whole = [row["stage"] for row in trained if row["step"][0] == row["published"][0]]
            stages += f"; as many sequences in a step as published in {' and '.join(whole)}" if whole else ""
            worst = max(abs(row["predicted"] / row["measured"] - 1) for row in trained)
            stages += f"; peak memory of training within {worst:.0%} of the prediction"
        lines.append(f"| {name} | {proved[name]}{stages} | {missing[name]} |")
    return "\n".join(lines)


def _data(found: dict[str, Any]) -> str:
    lines = ["| source | read | rate |", "|---|---:|---:|"]
    for source, entry in found["streamed"].items():
        if "questions" in entry:
            lines.append(f"| `{source}` | {entry['questions']:,} questions | |")
        else:
            rate = entry["tokens_per_second"]
            lines.append(
                f"| `{source}` | {entry['documents']:,} documents, {entry['tokens']:,} tokens | {rate / 1e3:,.0f} k tokens/s |"
            )
    slowest = min(entry["tokens_per_second"] for entry in found["streamed"].values() if "tokens_per_second" in entry)
    lines.append(
        f"\nStreaming and tokenising the 2.002 billion tokens of the language run would take {2.002e9 / slowest / 3600:.1f} hours at the "
        f"slower rate, in one process, and 16 GB while they are packed (4 bytes a token, twice). The tokenizer is generated; Gemma's has "
        "longer merges."
    )
    return "\n".join(lines)


def _measured(name: str, ran: dict[str, Any]) -> str:
    lines = [
        f"**{name}**. Cut: {ran['cut']}.",
        "",
        "| stage | tokens in a sequence | sequences in a step | published | predicted, MiB | measured, MiB | ratio | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in ran["stages"]:
        work = ["–"] * 3
        if "step" in row:
            work = [f"{row['length']:,}", *(f"{whole // part} × {part}" for whole, part in (row["step"], row["published"]))]
        sizes = [f"{row[key] / 2**20:,.0f}" for key in ("predicted", "measured")]
        ratio = f"{row['predicted'] / row['measured']:.2f}"
        lines.append(f"| {row['stage']} | {' | '.join([*work, *sizes])} | {ratio} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def _assumed() -> str:
    return (
        f"Nothing here was measured. Compute is the plan's FLOPs over {COMPUTED:.0%} of an H200's peak in the precision that the "
        f"configuration gives the stage ({PEAK['bfloat16'] / 1e12:.0f} TFLOP/s in bfloat16, {PEAK['float32'] / 1e12:.0f} in float32); on "
        f"several GPUs their share of it, plus the plan's bytes over {SENT:.0%} of NVLink, not overlapped. The unlearning of language has 4 "
        "sequences in a step, so 4 GPUs can train it together, with `--pretrain.train.micro_batch_size=20 "
        "--distill.train.micro_batch_size=16`; 8 GPUs run two seeds at a time. Arithmetic is planned with a tokenizer of 256,000 entries, "
        "as published. Memory leaves out the process and the data, and takes the workspace of the losses from the plan of the CPU's kernels. "
        "Evaluation, data and stop rules are left out, so a distillation may end much earlier. `undo plan` prints the same rows with this "
        "machine's rate."
    )


def _schedule(name: str, rows: list[dict[str, Any]]) -> str:
    n = RANKS[name]
    lines = [
        f"**{name}**",
        "",
        f"| stage | precision | steps | PFLOP | hours, one H200 | hours, {n} | GiB on one | GiB on each of {n} |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        memory = [f"{row[key] / 2**30:.1f}" for key in ("memory", "memory_of_several")]
        work = ["–"] * 5
        if row["steps"]:
            amounts = [f"{row['steps']:,}", f"{row['flops'] / 1e15:,.1f}", f"{row['one']:.2f}", f"{row['several']:.2f}"]
            work = [row["precision"], *amounts]
        lines.append(f"| {row['stage']} | {' | '.join([*work, *memory])} |")
    total = [sum(row.get(key, 0.0) for row in rows) for key in ("one", "several")]
    work = f"{sum(row['flops'] for row in rows) / 1e15:,.0f}"
    lines.append(f"| **all** | | | {work} | **{total[0]:.1f}** | **{total[1]:.1f}** | | |")
    return "\n".join(lines)


def write_page(results: dict[str, Any]) -> None:
    """Writes the generated part of the page between its markers."""
    before, after = re.split(r"(?s)(?<=<!-- published -->\n\n).*(?=\n\n<!-- /published -->)", PAGE.read_text())
    PAGE.write_text(before + page(results) + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("data", "run", "plan", "page", "stage"), help="default: all")
    parser.add_argument("--only", choices=tuple(CONFIGS), help="one experiment")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part == "stage":
        stage(asked.only, asked.kind)
        return
    parts = {
        "data": lambda folder, name: data(folder),
        "run": run,
        "plan": plan,
    }
    home = Path.cwd()
    for part in parts if asked.part is None else {asked.part} & set(parts):
        for name in ["hub"] if part == "data" else [asked.only] if asked.only else CONFIGS:
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                found = parts[part](Path(folder), name)
                os.chdir(home)
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            results.setdefault(part, {})[name] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
