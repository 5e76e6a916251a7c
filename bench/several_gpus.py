"""Predicts memory, bytes between GPUs and time of a distillation step on 1 to 64 GPUs, and writes the tables of a page.

A step distils a frozen teacher into a student of the same size, on 8,192 tokens for each GPU, in one pass. The student's parameters,
gradients and moments are float32, the computation is bfloat16, gradients are reduced in float32, and the layers are checkpointed.
Nothing here is measured. The bytes come from undo_core/planning/communication.py, whose formulas a test compares with what processes
move; memory and time are sums of the terms below.

    python bench/several_gpus.py                                 prints the tables
    python bench/several_gpus.py docs/results/several-gpus.md    writes them between the page's markers
"""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from undo_core.models import architecture, forward_flops, skeleton
from undo_core.planning.communication import Collective, Unit, fsdp_collectives, head_collectives, padded, units_of, wire_bytes

TOKENS, LENGTH = 8192, 2048  # tokens for each GPU and in each sequence
MODELS = {
    "Gemma-2-2B": {},  # the defaults of transformers' Gemma 2
    "Gemma-2-27B": {
        **{"hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46, "head_dim": 128},
        **{"num_attention_heads": 32, "num_key_value_heads": 16},
    },
}
# How many GPUs share the vocabulary, and whether each of them computes the trunk for its own tokens and gathers the hidden states.
HEADS = {
    "whole": (1, False),
    "2 parts": (2, False),
    "8 parts": (8, False),
    "8 parts, own tokens": (8, True),
}
CASES = [
    *(("Gemma-2-2B", 1, head) for head in ("whole",)),
    *(("Gemma-2-2B", 2, head) for head in ("whole", "2 parts")),
    *(("Gemma-2-2B", 8, head) for head in HEADS),
    *(("Gemma-2-27B", 8, head) for head in ("whole", "2 parts", "8 parts, own tokens")),
    *(("Gemma-2-27B", 64, head) for head in HEADS),
]

# An H200 SXM by NVIDIA's data sheet: dense bfloat16 FLOP/s, bytes of memory, NVLink's 900 GB/s in one direction; eight of them to a
# machine, each with a 400 Gb/s InfiniBand adapter. The shares of these peaks that a step reaches are assumptions.
FLOPS, MEMORY, NVLINK, INFINIBAND, ON_NODE = 989e12, 141e9, 450e9, 50e9, 8
COMPUTED, SENT = 0.4, 0.8


@dataclass(frozen=True)
class Step:
    """The predicted step of one case.

    Attributes:
        state: bytes of parameters, gradients and moments of the student and of the teacher's parameters, on each GPU.
        gathered: bytes of what is gathered for the computation, and of its gradients.
        activations: bytes of the layers' inputs and of one layer's activations.
        fsdp: bytes that each GPU sends for FSDP.
        head: bytes that each GPU sends for the shared vocabulary.
        compute: seconds of computation.
        wire: seconds of communication.
        tokens: tokens of all GPUs.
    """

    state: float
    gathered: float
    activations: float
    fsdp: float
    head: float
    compute: float
    wire: float
    tokens: int

    @property
    def memory(self) -> float:
        """Bytes on each GPU."""
        return self.state + self.gathered + self.activations


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    """The model without its weights."""
    return skeleton(architecture({"model_type": "gemma2", **MODELS[name]}))


def step(name: str, gpus: int, head: str) -> Step:
    """Predicts the step of a model on ``gpus`` GPUs."""
    model, (group, own) = model_of(name), HEADS[head]
    config = model.config
    *layers, root = units_of(model, [f"model.layers.{index}" for index in range(config.num_hidden_layers)])
    root = _slice(root, config.vocab_size, group)
    apart = gpus // group  # the groups; they divide each slice of the vocabulary among them
    ranks = gpus if own else apart  # that divide the trunk
    shared, tokens, width = TOKENS * group, TOKENS * (1 if own else group), config.hidden_size

    trunk, top = (
        fsdp_collectives(units, count, itemsize=2) + fsdp_collectives(units, count, itemsize=2, trained=False)
        for units, count in ((layers, ranks), ([root], apart))
    )
    heads = [*head_collectives("forward", shared, width, group), *_embedding(shared, width, group, own)]
    wire = [(trunk, ranks, 1 if own else group), (top, apart, group), (heads, group, 1)]

    elements = sum(padded(unit.trained, ranks) for unit in layers) / ranks + padded(root.trained, apart) / apart
    whole, layer = (padded(unit.trained, 1) for unit in (root, layers[0]))
    # Of the root: student and teacher in bfloat16, the gradient in bfloat16 and float32. Of the layers: one, and the next one.
    gathered = (10 * whole if apart > 1 else 0) + (2 * 2 * layer if ranks > 1 else 0) + (2 * 2 * shared * width if own else 0)
    heads_width = config.head_dim * (config.num_attention_heads + 2 * config.num_key_value_heads)
    inside = 6 * width + 4 * config.intermediate_size + 2 * heads_width
    activations = 2 * tokens * (config.num_hidden_layers * width + inside)

    product = 2 * config.vocab_size * width  # of the head, for a token
    below = forward_flops(model, LENGTH) - product
    # The trunk: student forward, again for the checkpoints, and backward, which counts twice; teacher forward. The head: student and
    # teacher for the statistics, again for the gradient, and the gradients of hidden states and weight.
    flops = 5 * below * tokens + 6 * product / group * shared
    return Step(
        state=18 * elements,
        gathered=gathered,
        activations=activations,
        fsdp=wire_bytes(trunk) + wire_bytes(top),
        head=wire_bytes(heads),
        compute=flops / (FLOPS * COMPUTED),
        wire=sum(wire_bytes(calls) / _rate(count * stride > ON_NODE, stride) for calls, count, stride in wire),
        tokens=TOKENS * gpus,
    )


def tables() -> str:
    """Returns the tables in Markdown."""
    costs = ["| model | GPUs | head | sent for FSDP | sent for the head | computing | sending | step | tokens/s |"]
    sizes = ["| model | GPUs | head | state | gathered | activations | sum |"]
    costs.append("| --- | ---: | --- |" + " ---: |" * 6)
    sizes.append("| --- | ---: | --- |" + " ---: |" * 4)
    for name, gpus, head in CASES:
        found = step(name, gpus, head)
        low, high = max(found.compute, found.wire), found.compute + found.wire
        cells = [f"{found.fsdp / 1e9:.1f} GB", f"{found.head / 1e9:.2f} GB", f"{found.compute:.2f} s", f"{found.wire:.2f} s"]
        cells += [f"{low:.2f} to {high:.2f} s", f"{found.tokens / high / 1e3:,.1f}k to {found.tokens / low / 1e3:,.1f}k"]
        costs.append(f"| {name} | {gpus} | {head} | {' | '.join(cells)} |")
        cells = [f"{part / 1e9:.1f} GB" for part in (found.state, found.gathered, found.activations, found.memory)]
        too_much = " (too much)" * (found.memory > MEMORY)
        sizes.append(f"| {name} | {gpus} | {head} | {' | '.join(cells)}{too_much} |")
    return "\n".join([*costs, "", *sizes])


def _slice(root: Unit, vocabulary: int, group: int) -> Unit:
    """The root unit with the slice of the head, and of the embedding tied to it, that a GPU of a group holds."""
    cut = tuple((-(-shape[0] // group), *shape[1:]) if shape[0] == vocabulary else shape for shape in root.trained)
    return Unit(root.name, cut, gathered=root.gathered)


def _embedding(tokens: int, width: int, group: int, own: bool) -> list[Collective]:
    """What the tied embedding of student and teacher adds up in bfloat16, and, with ``own`` tokens, what is gathered for the head."""
    size = 2 * tokens * width
    if not own:
        return [Collective("all_reduce", "embeddings", size, group, calls=2)]
    return [
        Collective("reduce_scatter", "embeddings", size, group, calls=2),
        Collective("all_gather", "hidden states, and the gradient of the embedding", size, group, calls=3),
    ]


def _rate(between: bool, stride: int) -> float:
    """Bytes per second that a GPU sends in a ring: through the adapters of the ring's GPUs on a machine, or over NVLink."""
    return SENT * (min(NVLINK, INFINIBAND * ON_NODE / stride) if between else NVLINK)


def main(arguments: list[str]) -> None:
    if not arguments:
        print(tables())
        return
    page = Path(arguments[0])
    before, after = re.split(r"(?s)(?<=<!-- ranks -->\n\n).*(?=\n\n<!-- /ranks -->)", page.read_text())
    page.write_text(before + tables() + after)


if __name__ == "__main__":
    main(sys.argv[1:])
