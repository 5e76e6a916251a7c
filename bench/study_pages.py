"""Measures how much of a distillation step a CPU spends on providing memory: system time and page faults.

    python bench/study_pages.py

The student is a small trunk with a head of 256,000 tokens, whose gradient has 328 MB; the teacher is its copy before the noise. Each
row is a process of its own with one thread: the training loop of undo-core, or a plain one around the fused loss, without and with
``tied_gradient_in_place``; with a gradient in fresh memory in every step or in the memory of the last one
(``kernels/undo_kernels/cpu/workspace.py``). Prints medians over the steps between the first and the last.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import resource
import statistics
import subprocess
import sys

VOCABULARY, WIDTH, TOKENS, STEPS = 256_000, 320, 256, 5


LOOPS = ("undo-core's loop", "plain loop, fused AdamW", "plain loop, fused AdamW, tied_gradient_in_place")


def worker(loop: int, kept: bool, vocabulary: int) -> None:
    """Takes the steps of one row and prints it."""
    import torch
    from transformers import AutoConfig
    from undo_kernels.cpu import workspace

    from undo_core import noise_, ops, tied_gradient_in_place
    from undo_core.data.sequences import Sequences
    from undo_core.distillation.student import distill
    from undo_core.models import head_of, hidden_states, initialise
    from undo_core.training import TrainConfig

    torch.set_num_threads(1)
    config = AutoConfig.for_model(
        "gemma2", vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64, sliding_window=512,
        max_position_embeddings=512,
    )  # fmt: skip
    teacher = initialise(config, seed=0)
    student = copy.deepcopy(teacher)
    noise_(student, alpha=0.6, beta=0.1, seed=0)
    ids = torch.randint(1, vocabulary, (STEPS, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    marks = []

    def mark() -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        marks.append((used.ru_stime, used.ru_utime + used.ru_stime, used.ru_minflt))

    class Marked(Sequences):
        def order(self, step: int, size: int, seed: int) -> torch.Tensor:
            mark()
            return super().order(step, size, seed)

    def plain_loop() -> None:
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
        for step in range(STEPS):
            mark()
            batch, own, other = ids[step : step + 1], head_of(student), head_of(teacher)
            with torch.no_grad():
                theirs = hidden_states(teacher, batch)
            options = own.options("student_") | other.options("teacher_")
            loss = ops.linear_kl_div(hidden_states(student, batch), own.weight, theirs, other.weight, **options)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    if not kept:
        workspace.LEAST_BYTES = sys.maxsize
    if loop:
        with tied_gradient_in_place(student) if loop == 2 else contextlib.nullcontext():
            plain_loop()
    else:
        text = Marked(ids, 0, lengths=torch.full((STEPS,), TOKENS + 1))
        distill(student, teacher, text, TrainConfig(steps=STEPS, batch_size=1, lr=1e-4, seed=0), progress=False)
    mark()
    steps = [[after - before for before, after in zip(*pair, strict=True)] for pair in itertools.pairwise(marks[1:-1])]
    system, whole, faults = (statistics.median(column) for column in zip(*steps, strict=True))
    name = LOOPS[loop] + (", memory kept" if kept else ", fresh memory")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"| {name} | {whole:.2f} s | {system / whole:.1%} | {faults:,.0f} | {peak:.2f} GB |", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="entries of the head")
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker[0], bool(arguments.worker[1]), arguments.vocabulary)
        return
    print(
        "| loop | processor time of a step | system time | page faults | peak memory |\n| --- | ---: | ---: | ---: | ---: |",
        flush=True,
    )
    for loop in range(len(LOOPS)):
        for kept in (0, 1):
            command = [sys.executable, "-W", "ignore", __file__, "--worker", str(loop), str(kept)]
            subprocess.run([*command, "--vocabulary", str(arguments.vocabulary)], check=True)


if __name__ == "__main__":
    main()
