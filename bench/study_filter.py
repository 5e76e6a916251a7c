"""Measures what a filter of small gradients could save: the products of vocabulary entries whose gradient is small.

    python bench/study_filter.py                                    # a small model that is trained here
    python bench/study_filter.py --model FOLDER --text FILE         # a Hugging Face model with a large vocabulary
    python bench/study_filter.py --model FOLDER --text FILE --forget FILE --retain FILE      # unlearned with MaxEnt first
    python bench/study_filter.py --stage FOLDER                     # student and teacher of a distill stage

The teacher is the model, the student a copy whose matrices have normal noise added, and the tokens the start of the text. The first
table asks how few blocks of the gradient of the logits have to be kept so that the rest has at most 0.001 of its norm, for blocks of
one entry by all tokens, and for blocks of 256 entries in the order of the teacher's average probability; the last column chooses
the blocks by the masses of both models, which are known before the gradient is. The choice is made with hindsight, so that no rule
can keep less.
The second table drops every vocabulary entry whose gradient is below a bound at all tokens, and shows what that does to the
gradient of the hidden states, to that of the weight, and to AdamW's first step (epsilon 1e-8). The third table measures the time of
the products with gathered rows, in multiples of the four products that a loss and its gradient take; the whole op adds its row
kernels. Times are of one thread, and count its processor time alone; they depend on the shape alone, and are left out for an unlearned
model and for a stage.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from activations import capture, generated

from undo_core import ops
from undo_core.data.sequences import Sequences
from undo_core.training import TrainConfig
from undo_core.unlearning import UnlearnConfig, unlearn

TOKENS = 256  # of a chunk, as the CPU's plan has it
LEFT_OUT = 1e-3  # share of the gradient's norm
BOUNDS = (1e-4, 1e-5, 1e-6, 1e-7)
NOISES = (0.03, 0.007, 0.0007)  # standard deviations of the noise, in those of the matrix
SHARES = (0.06, 0.2, 0.4)
STEPS, RATE = 12, 1e-3  # of the unlearning; Adafactor's rate is relative to the size of a weight
EPSILON = 1e-8
TILE = 8192

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # hidden states and weight of the student, of the teacher


def of_model(folder: Path, text: Path, forget: Path | None, retain: Path | None) -> Iterator[Heads]:
    """Yields hidden states and weight of student and teacher, once for each amount of noise.

    With texts to forget and to retain, the model is unlearned first, on their second thousands of tokens, and its loss on ``text``
    before and after is printed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )

    def read(file: Path, first: int, sequences: int) -> torch.Tensor:
        start = file.open(encoding="utf-8").read(60 * TOKENS)
        return tokenizer(start, return_tensors="pt").input_ids[:, first : first + TOKENS // 2 * sequences].view(sequences, -1)

    @torch.no_grad()
    def loss() -> float:
        return float(teacher(input_ids=ids, labels=ids).loss)

    ids = read(text, 0, 4)
    if forget is not None and retain is not None:
        before = loss()
        texts = {name: Sequences(read(file, 1024, 8).int(), 0) for name, file in (("forget", forget), ("retain", retain))}
        train = TrainConfig(steps=STEPS, batch_size=2, lr=RATE, optimizer="adafactor")
        unlearn(teacher, **texts, config=UnlearnConfig(train=train), progress=False)
        teacher.eval().requires_grad_(False).zero_grad()
        print(f"loss on the text: {before:.2f} before unlearning, {loss():.2f} after\n", flush=True)

    @torch.no_grad()
    def parts(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state.flatten(0, 1)[-TOKENS:]
        return hidden, model.get_output_embeddings().weight.detach().clone()

    known = parts(teacher)
    for noise in NOISES:
        student, generator = copy.deepcopy(teacher), torch.Generator().manual_seed(0)
        for parameter in student.parameters():
            if parameter.ndim == 2:
                parameter.data += torch.randn(parameter.shape, generator=generator) * parameter.data.std() * noise
        heads = *parts(student), *known
        del student
        yield heads


@torch.no_grad()
def tables(heads: Heads, softcap: float | None) -> tuple[str, list[str]]:
    """Returns the line of the first table and the lines of the second."""
    hidden, weight, teacher_hidden, teacher_weight = heads

    def shaped(z: torch.Tensor) -> torch.Tensor:
        return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)

    log_t = shaped(teacher_hidden @ teacher_weight.T).log_softmax(-1)
    z = shaped(hidden @ weight.T)
    x = z.log_softmax(-1).sub_(log_t)
    p_t = log_t.exp_()
    gap = x.expm1()
    kl = float((p_t * (gap - x)).sum()) / len(hidden)
    p_s = x.exp_().mul_(p_t)
    gradient = gap.mul_(p_t)
    if softcap is not None:
        gradient.mul_(1 - (z / softcap) ** 2)
    del x, gap, z
    order = p_t.mean(0).argsort(descending=True)

    def kept(values: torch.Tensor, tokens: int, entries: int) -> str:
        entries = min(entries, values.shape[1])
        whole = values[:, order][:, : values.shape[1] // entries * entries].square_()
        blocks = whole.view(len(values) // tokens, tokens, -1, entries).sum((1, 3), dtype=torch.float64).flatten()
        quiet = blocks.sort().values.cumsum(0) <= (LEFT_OUT * float(gradient.norm())) ** 2
        return f"{1 - float(quiet.double().mean()):.1%}"

    mass = p_t.add_(p_s)
    sizes = ((TOKENS, 1), (16, 256), (64, 256), (TOKENS, 256))
    first = f"| {kl:.1e} | " + " | ".join([*(kept(gradient, *size) for size in sizes), kept(mass, 16, 256)]) + " |"
    del mass, p_s
    d_hidden, d_weight = gradient @ weight, gradient.T @ hidden
    mean = d_weight / len(hidden)
    step = float((mean / (mean.abs() + EPSILON)).norm())
    lines, largest = [], gradient.abs().amax(0)
    for bound in BOUNDS:
        dropped = (largest < bound).nonzero()[:, 0]
        share = 1 - len(dropped) / len(largest)
        wrong_hidden = gradient[:, dropped] @ weight[dropped]
        errors = (wrong_hidden.norm() / d_hidden.norm(), d_weight[dropped].norm() / d_weight.norm())
        wrong_step = float((mean[dropped] / (mean[dropped].abs() + EPSILON)).norm()) / step
        shown = " | ".join(f"{float(error):.1e}" for error in errors)
        lines.append(f"| {kl:.1e} | {bound:g} | {share:.1%} | {(2 + 2 * share) / 4:.2f}x | {shown} | {wrong_step:.0%} |")
    return first, lines


def seconds(call: Callable[[], object]) -> float:
    """Returns the processor time of the calling thread, the best of three after one that allocates."""
    times = []
    for _ in range(4):
        began = time.thread_time()
        call()
        times.append(time.thread_time() - began)
    return min(times[1:])


def times(vocabulary: int, width: int) -> list[str]:
    """Returns the lines of the third table."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator).mul_(0.02)
    logits, d_hidden, d_weight = torch.empty(vocabulary, TOKENS), torch.zeros(TOKENS, width), torch.empty_like(weight)
    tiles = [slice(first, min(first + TILE, vocabulary)) for first in range(0, vocabulary, TILE)]

    def project() -> None:
        for at in tiles:
            torch.mm(weight[at], hidden.T, out=logits[at])

    def both() -> None:
        for at in tiles:
            d_hidden.addmm_(logits[at].T, weight[at])
            torch.mm(logits[at], hidden, out=d_weight[at])

    def gathered(rows: list[torch.Tensor]) -> None:
        for at, kept in zip(tiles, rows, strict=True):
            some = logits[at].index_select(0, kept)
            d_hidden.addmm_(some.T, weight[at].index_select(0, kept))
            d_weight[at].zero_().index_copy_(0, kept, torch.mm(some, hidden))

    student = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    teacher = hidden + 0.1 * torch.randn(hidden.shape, generator=generator)

    def op() -> None:
        torch.autograd.grad(ops.linear_kl_div(*student, teacher, weight), student)

    products = seconds(both)
    four = 2 * seconds(project) + products
    whole = seconds(op)
    lines = [f"| everything | 1.00x | {whole / four:.2f}x |"]
    for share in SHARES:
        rows = [(torch.rand(at.stop - at.start, generator=generator) < share).nonzero()[:, 0] for at in tiles]
        left = products - seconds(lambda rows=rows: gathered(rows))
        lines.append(f"| {share:.0%} | {1 - left / four:.2f}x | {(whole - left) / four:.2f}x |")
    return lines


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a Hugging Face model with a tokenizer")
    parser.add_argument("--text", type=Path, help="text file; its first 512 tokens are read, and the last 256 of them counted")
    parser.add_argument("--forget", type=Path, help="text file that the model unlearns first, with MaxEnt")
    parser.add_argument("--retain", type=Path, help="text file that it retains meanwhile")
    parser.add_argument("--stage", type=Path, help="folder of a distill stage, .../stages/distill-KEY")
    arguments = parser.parse_args()
    for first, second in (("model", "text"), ("forget", "retain")):
        if (getattr(arguments, first) is None) != (getattr(arguments, second) is None):
            parser.error(f"--{first} and --{second}: got one of them, wanted both or neither")
    if arguments.forget is not None and arguments.model is None:
        parser.error("--forget: got it without --model, wanted both")
    softcap: float | None = None
    found: Iterator[Heads]
    if arguments.model is not None:
        found = of_model(arguments.model, arguments.text, arguments.forget, arguments.retain)
    else:
        inputs = generated().to(torch.float32, "cpu") if arguments.stage is None else capture(arguments.stage, TOKENS)
        softcap = inputs.softcap
        own, weight, theirs, other = (tensor.detach() for tensor in inputs.heads)
        found = iter([(own[:TOKENS], weight, theirs[:TOKENS], other)])
    results = []
    for heads in found:
        shape = heads[1].shape
        results.append(tables(heads, softcap))
    print(f"{shape[0]:,} entries of width {shape[1]}\n")
    print("| KL | one entry, 256 tokens | 256 entries, 16 tokens | 64 tokens | 256 tokens | by masses, 16 tokens |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(first for first, _ in results), flush=True)
    print("\n| KL | bound | entries kept | products left | error, hidden states | error, weight | error, AdamW's step |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(line for _, lines in results for line in lines), flush=True)
    if arguments.forget is not None or arguments.stage is not None:
        return
    print("\n| entries kept | products | whole op |\n| --- | ---: | ---: |")
    print("\n".join(times(*shape)))


if __name__ == "__main__":
    main()
