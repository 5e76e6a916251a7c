"""Compares the losses of ``examples/`` with those of the trainers that they stand in: seconds and peak memory of a step on a CPU.

    python bench/trainers.py docs/results/trainers.md

A step is ``compute_loss`` and its backward pass, without the optimizer, which is the same for both. Each trainer runs its own loss
and that of the example in turns, on the same model and batch, in one process with one thread; seconds are the processor's. Peak
memory is the high-water mark over a step less what was resident before it, gradients included; memory that undo-core keeps is given
back first. The examples' losses run within ``tied_gradient_in_place``. Losses and gradients of both are compared, and the command
fails if they differ by more than float32 rounds. OpenUnlearning is no package: its losses are written out in
``open_unlearning.py``. A trainer whose package is not installed is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import open_unlearning
from summaries import markdown

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
VOCABULARIES = (32_000, 256_000)
WIDTH, LAYERS, ROWS, LENGTH, ROUNDS = 128, 2, 4, 64, 2
TOLERANCE = 1e-4  # relative; sums over 256,000 entries in float32, of losses that the originals compute with cancellation


@dataclass(frozen=True)
class Contest:
    """A trainer's own loss and an example's, as functions of the same batch.

    Attributes:
        model: the model, whose gradients they compute.
        own: the trainer's loss.
        ours: the example's.
        inputs: the batch.
        trained: context in which the parameters that the method freezes are frozen.
    """

    model: Any
    own: Callable[[Any], Any]
    ours: Callable[[Any], Any]
    inputs: Any
    trained: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def model_of(vocabulary: int, seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **tokens, **sizes))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(5)  # logits of some size
    return model


def batch_of(vocabulary: int, seed: int = 0) -> dict[str, Any]:
    import torch

    ids = torch.randint(3, vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : LENGTH // 8] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


# -- the contests --------------------------------------------------------------------------------------------------------------


def hf_distillation(vocabulary: int, folder: str) -> Contest:
    import hf_trainer
    import torch
    import torch.nn.functional as F
    from transformers import TrainingArguments

    model, teacher = model_of(vocabulary, 0), model_of(vocabulary, 1).eval()
    trainer = hf_trainer.DistillationTrainer(model, TrainingArguments(folder, report_to=[], use_cpu=True), teacher=teacher)

    def own(inputs: Any) -> Any:
        """Distillation as it is usually written in a Trainer."""
        columns = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            target = teacher(**columns).logits[:, :-1].log_softmax(-1)
        logits = model(**columns).logits[:, :-1].log_softmax(-1)
        mask = inputs["labels"][:, 1:] != -100
        return F.kl_div(logits[mask], target[mask], log_target=True, reduction="batchmean")

    return Contest(model, own, lambda inputs: trainer.compute_loss(model, inputs), batch_of(vocabulary))


def trl_sft(vocabulary: int, folder: str) -> Contest:
    import tiny
    import trl_sft as example
    from datasets import Dataset
    from trl import SFTTrainer

    model = model_of(vocabulary, 0)
    trainer = example.FusedSFTTrainer(
        model,
        args=example.settings(folder),
        train_dataset=Dataset.from_dict({"text": tiny.texts(8)}),
        processing_class=tiny.tokenizer(),
    )
    return Contest(
        model,
        lambda inputs: SFTTrainer.compute_loss(trainer, model, dict(inputs)),
        lambda inputs: trainer.compute_loss(model, dict(inputs)),
        batch_of(vocabulary),
    )


def trl_distillation(vocabulary: int, folder: str, beta: float) -> Contest:
    import tiny
    import torch
    import trl_distillation as example
    from trl import DistillationTrainer

    model, teacher = model_of(vocabulary, 0), model_of(vocabulary, 1)
    trainer = example.FusedDistillationTrainer(
        model,
        teacher,
        args=example.settings(folder, beta=beta),
        train_dataset=example.prompts(8),
        processing_class=tiny.tokenizer(),
    )
    ids = batch_of(vocabulary)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0  # a completion that ended early
    first = LENGTH // 8
    tools = torch.ones_like(mask)
    tools[0, first + 3 : first + 6] = 0  # the answer of a tool, which the student did not write
    inputs = {
        "prompt_ids": ids[:, :first],
        "completion_ids": ids[:, first:],
        "prompt_mask": mask[:, :first],
        "completion_mask": mask[:, first:],
        "tool_mask": tools[:, first:],
        "num_items_in_batch": (mask * tools)[:, first:].sum().float(),
    }
    return Contest(
        model,
        lambda inputs: DistillationTrainer.compute_loss(trainer, model, inputs),
        lambda inputs: trainer.compute_loss(model, inputs),
        inputs,
    )


def unlearning(vocabulary: int, folder: str, method: str) -> Contest:
    import unlearning_trainer as example
    from transformers import TrainingArguments

    model, original = model_of(vocabulary, 0), model_of(vocabulary, 0).eval().requires_grad_(False)
    inputs = {"forget": batch_of(vocabulary, 0), "retain": batch_of(vocabulary, 1)}
    rows = [{part: {name: value[i] for name, value in inputs[part].items()} for part in inputs} for i in range(ROWS)]
    trainer = example.UnlearningTrainer(
        model,
        TrainingArguments(folder, report_to=[], use_cpu=True, remove_unused_columns=False),
        train_dataset=rows,
        unlearn=example.CONFIGS[method],
    )
    with_reference = example.collate(rows)
    own = open_unlearning.LOSSES[method]
    return Contest(
        model,
        lambda _: own(model, original, inputs, example.CONFIGS[method]),
        lambda _: trainer.compute_loss(model, with_reference),
        inputs,
        lambda: trainer.method.alone(model),
    )


CONTESTS: dict[str, tuple[str | None, Callable[[int, str], Contest]]] = {  # name: package it needs, and how it is built
    "Trainer, distillation": (None, hf_distillation),
    "SFTTrainer, cross-entropy": ("trl", trl_sft),
    "DistillationTrainer, reverse KL": ("trl", lambda vocabulary, folder: trl_distillation(vocabulary, folder, 1.0)),
    "DistillationTrainer, forward KL": ("trl", lambda vocabulary, folder: trl_distillation(vocabulary, folder, 0.0)),
    "DistillationTrainer, JSD": ("trl", lambda vocabulary, folder: trl_distillation(vocabulary, folder, 0.3)),
    "OpenUnlearning, MaxEnt": (None, lambda vocabulary, folder: unlearning(vocabulary, folder, "maxent")),
    "OpenUnlearning, GradDiff": (None, lambda vocabulary, folder: unlearning(vocabulary, folder, "graddiff")),
    "OpenUnlearning, NPO": (None, lambda vocabulary, folder: unlearning(vocabulary, folder, "npo")),
    "OpenUnlearning, RMU": (None, lambda vocabulary, folder: unlearning(vocabulary, folder, "rmu")),
}


# -- measuring -----------------------------------------------------------------------------------------------------------------


def gradients(model: Any) -> dict[str, Any]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(contest: Contest) -> tuple[float, float]:
    """Returns the relative differences of the losses and of the gradients, as one vector."""
    losses, found = [], []
    for loss in (contest.own, contest.ours):
        contest.model.zero_grad()
        value = loss(contest.inputs)
        value.backward()
        losses.append(float(value.detach()))
        found.append({name: gradient.clone() for name, gradient in gradients(contest.model).items()})
    contest.model.zero_grad()
    own, ours = found
    if own.keys() != ours.keys():
        raise RuntimeError(f"gradients: {sorted(own.keys() ^ ours.keys())} have one in one of the two alone")
    square = sum(float((own[name] - ours[name]).double().square().sum()) for name in own)
    whole = sum(float(gradient.double().square().sum()) for gradient in own.values())
    return abs(losses[0] - losses[1]) / abs(losses[0]), (square / whole) ** 0.5


def peak(step: Callable[[], None]) -> int:
    """Returns the high-water mark of a step beyond what was resident before."""
    from undo_kernels import release_workspace

    release_workspace()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = harness.status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return harness.status("VmHWM") - before


def measure(contest: Contest, rounds: int) -> dict[str, Any]:
    """Compares, then measures the peaks, then the time in turns."""
    from undo_core import tied_gradient_in_place

    def step(loss: Callable[[Any], Any], in_place: bool) -> None:
        contest.model.zero_grad()
        with tied_gradient_in_place(contest.model) if in_place else contextlib.nullcontext():
            loss(contest.inputs).backward()

    steps = {"own": lambda: step(contest.own, False), "ours": lambda: step(contest.ours, True)}
    with contest.trained():
        loss, gradient = compare(contest)
        peaks = {}
        for name, run in steps.items():
            peaks[name] = peak(run)
            contest.model.zero_grad()
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for run in steps.values():
            run()  # the memory that later steps use again
        for _ in range(rounds):
            for name, run in steps.items():
                began = time.process_time()
                run()
                seconds[name].append(time.process_time() - began)
    return {"loss": loss, "gradient": gradient, "peaks": peaks, "seconds": seconds}


def missing(package: str | None) -> bool:
    return package is not None and importlib.util.find_spec(package) is None


def records(names: list[str], vocabularies: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    for vocabulary in vocabularies:
        for name in names:
            if missing(CONTESTS[name][0]):
                print(f"{name}: not run, {CONTESTS[name][0]} is not installed", flush=True)
                continue
            with tempfile.TemporaryDirectory() as folder:
                found = measure(CONTESTS[name][1](vocabulary, folder), rounds)
            gc.collect()
            yield {"name": name, "vocabulary": vocabulary, **found}


def line(record: dict[str, Any]) -> list[str]:
    own, ours = (record["seconds"][name] for name in ("own", "ours"))
    faster = statistics.median(a / b for a, b in zip(own, ours, strict=True))
    peaks = record["peaks"]
    return [
        record["name"],
        f"{record['vocabulary'] // 1000}k",
        *(harness.seconds(statistics.median(values)) for values in (own, ours)),
        harness.times(faster),
        *(harness.megabytes(peaks[name]) for name in ("own", "ours")),
        f"{peaks['ours'] / peaks['own']:.2f}",
        f"{record['loss']:.0e}",
        f"{record['gradient']:.0e}",
    ]


HEADER = ["trainer and loss", "vocabulary", "its own", "undo-core's", "faster", "peak of its own", "of undo-core's", "share",
          "loss differs by", "gradient by"]  # fmt: skip


def page(lines: list[list[str]], command: str) -> str:
    """Returns the page of docs/results."""
    about = harness.machine("cpu")
    versions = {name: version for name, version in harness.versions().items() if name in ("torch", "transformers", "trl")}
    said = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        "# In other people's trainers\n\n"
        "A step is the loss and its backward pass: the trainer's own, and that of the script in `examples/` which overrides it, in turns "
        "on the same model and batch. Seconds are the processor's, of one thread; the peak is beyond what was resident before the step, "
        f"gradients included. The model is a Llama of {LAYERS} layers, width {WIDTH}, with a tied embedding; {ROWS} × {LENGTH} tokens, "
        "unlearning of each part. `SFTTrainer` and `DistillationTrainer` have chunked losses of their own; the others hold logits. "
        "Hugging Face's `Trainer` has no distillation loss: its own is `F.kl_div` of both models' `log_softmax`, as such trainers are "
        "usually written. "
        "OpenUnlearning's losses are written out in `bench/open_unlearning.py`; it has no MaxEnt, which is written in the same manner. Its "
        "RMU takes the mean over each sequence first, which changes nothing here, where all have as many labels. With a trunk this small the head is nearly the whole "
        "step; a larger trunk brings both ways nearer to each other. OpenUnlearning's RMU runs both models whole, their heads included, "
        "undo-core's one layer. A forget and a retain loss in one graph each hold a gradient of the head until the backward pass. "
        "*Faster* is the median of the ratios within a turn, not the ratio of the two medians beside it.\n\n"
        f"{markdown(HEADER, lines)}\n\n"
        f"{about['cpu']}, {said}. Made by `{command}`.\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", type=Path, help="Markdown file to write")
    parser.add_argument(
        "--vocabulary", nargs="*", type=int, default=list(VOCABULARIES), help="entries of the head (32000 256000)"
    )
    parser.add_argument(
        "--only", nargs="*", default=[""], metavar="TEXT", help="trainers whose name contains one of these texts"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"timed steps of each ({ROUNDS})")
    options = parser.parse_args(arguments)
    import torch
    import transformers

    sys.path.insert(0, str(EXAMPLES))
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    names = [name for name in CONTESTS if any(text in name for text in options.only)]
    lines, wrong = [], []
    print("| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER), flush=True)
    for record in records(names, options.vocabulary, options.rounds):
        lines.append(line(record))
        print("| " + " | ".join(lines[-1]) + " |", flush=True)
        if not max(record["loss"], record["gradient"]) < TOLERANCE:
            wrong.append(record["name"])
    if options.page is not None:
        command = " ".join(["python bench/trainers.py", *(sys.argv[1:] if arguments is None else arguments)])
        options.page.write_text(page(lines, command))
    for name in wrong:
        print(f"{name}: loss or gradient differs by more than {TOLERANCE:g}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in harness.MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | harness.MALLOC)
    sys.exit(main())
