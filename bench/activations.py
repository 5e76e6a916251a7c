"""Benchmark problems from the hidden states of trained models, as a distillation meets them; random inputs only have their
shape.

A trained head has a few large logits and a long tail, and a distilled student agrees with its teacher almost everywhere. The
models are the student and teacher of a distill stage on the run's own text, or small models that are trained here in seconds.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from problems import Inputs
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from undo_core import noise_, ops
from undo_core.data.sequences import Sequences
from undo_core.models import head_of, hidden_states, initialise, load_model

TOKENS = 1024
VOCABULARY, WIDTH, LENGTH, BATCH = 4096, 96, 32, 16  # sizes of the models that are trained here
SPLIT = "valid_retain"


def capture(folder: Path, tokens: int = TOKENS) -> Inputs:
    """Captures hidden states, heads and labels of a distill stage's student and teacher on the start of its validation text.

    Args:
        folder: folder of a distill stage, beside the folders of the stages that its manifest names.
        tokens: largest number of tokens, padding not counted.

    Raises:
        ValueError: the models have something that the contenders do not support, or :func:`check` refuses the folder.
    """
    prepared, teacher = check(folder)
    sequences = Sequences.load(prepared)
    some = sequences.take(slice(-(-2 * tokens // sequences.length)))
    return _inputs(load_model(folder), load_model(teacher), some.input_ids.long(), some.text_mask(), tokens)


def check(folder: Path) -> tuple[Path, Path]:
    """Returns the paths of a distill stage's validation text and of its teacher.

    Raises:
        ValueError: ``folder`` is not that of a distill stage, or a folder that it names is missing.
    """
    manifest = folder / "manifest.json"
    kind = json.loads(manifest.read_text()).get("kind") if manifest.exists() else "no manifest.json"
    if kind != "distill":
        raise ValueError(f"--activations: got {folder} ({kind}), wanted the folder of a distill stage, .../stages/distill-KEY")
    inputs = json.loads(manifest.read_text())["inputs"]
    text = folder.parent / inputs["prepared"]["folder"] / "data" / f"{SPLIT}.safetensors"
    teacher = folder.parent / inputs["teacher"]["folder"]
    for path in (text, teacher):
        if not path.exists():
            raise ValueError(f"--activations: got {folder}, whose {path.name} is missing; wanted a file at {path}")
    return text, teacher


@torch.no_grad()
def _inputs(
    student: PreTrainedModel, teacher: PreTrainedModel, ids: torch.Tensor, counted: torch.Tensor, tokens: int
) -> Inputs:
    heads = [head_of(model.eval()) for model in (student, teacher)]
    for name, head in zip(("student", "teacher"), heads, strict=True):
        if head.bias is not None or head.scale != 1.0:
            raise ValueError(f"--activations: got a {name} whose head has a bias or a scale, which not every contender knows")
    shapes = [(tuple(head.weight.shape), head.softcap) for head in heads]
    if shapes[0] != shapes[1]:
        raise ValueError(f"--activations: got heads {shapes[0]} and {shapes[1]}, wanted the same shape and softcap")
    counted = (counted[:, :-1] & counted[:, 1:]).flatten()
    found = [hidden_states(model, ids)[:, :-1].flatten(0, 1)[counted][:tokens].float() for model in (student, teacher)]
    labels = ids[:, 1:].flatten()[counted][:tokens]
    weights = [head.weight.detach().float().clone() for head in heads]
    return Inputs(found[0], weights[0], found[1], weights[1], labels, softcap=heads[0].softcap)


def save(inputs: Inputs, file: Path) -> None:
    """Saves the problem for the processes that measure memory."""
    tensors = {name: value.contiguous() for name, value in vars(inputs).items() if isinstance(value, torch.Tensor)}
    save_file(tensors, file)


def load(file: Path) -> Inputs:
    return Inputs(**load_file(file))


# -- models trained here -------------------------------------------------------------------------------------------------------


def text(sequences: int, seed: int) -> torch.Tensor:
    """Returns ``[sequences, LENGTH]`` of an artificial language: a word has a fixed successor or one drawn by Zipf's law."""
    generator = torch.Generator().manual_seed(seed)
    successor = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))
    zipf = 1.0 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    drawn = torch.multinomial(zipf, sequences * LENGTH, replacement=True, generator=generator).view(sequences, LENGTH)
    follows = torch.rand(sequences, LENGTH, generator=generator) < 0.6
    ids = drawn.clone()
    for at in range(1, LENGTH):
        ids[:, at] = torch.where(follows[:, at], successor[ids[:, at - 1]], drawn[:, at])
    return ids


def generated(quick: bool = False) -> Inputs:
    """Trains a teacher on :func:`text`, and distills a noised student from it; each takes a few seconds."""
    steps = 3 if quick else 200
    config = AutoConfig.for_model(
        "gemma2", vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24, query_pre_attn_scalar=24, sliding_window=LENGTH,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    teacher = initialise(config, seed=0)

    def likelihood(ids: torch.Tensor) -> torch.Tensor:
        head = head_of(teacher)
        return ops.linear_cross_entropy(hidden_states(teacher, ids)[:, :-1], head.weight, ids[:, 1:], softcap=head.softcap)

    _fit(teacher, likelihood, steps)
    student = copy.deepcopy(teacher)
    noise_(student, alpha=0.6, beta=0.1, seed=0)

    def divergence(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            theirs = hidden_states(teacher, ids)
        own, other = head_of(student), head_of(teacher)
        return ops.linear_kl_div(
            hidden_states(student, ids),
            own.weight,
            theirs,
            other.weight,
            **own.options("student_"),
            **other.options("teacher_"),
        )

    _fit(student, divergence, steps)
    tokens = 128 if quick else TOKENS
    ids = text(-(-tokens // (LENGTH - 1)), seed=-1)
    return _inputs(student, teacher, ids, torch.ones_like(ids, dtype=torch.bool), tokens)


def _fit(model: PreTrainedModel, loss_of: Callable[[torch.Tensor], torch.Tensor], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        loss = loss_of(text(BATCH, seed=step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
