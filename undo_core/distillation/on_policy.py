"""On-policy distillation: in some steps, the student continues prompts by itself, and learns what the teacher says of its own text.

An on-policy step keeps the first tokens of each sequence of its batch, draws the others from the student at temperature 1, and minimises
the reverse KL, ``KL(student || teacher)``, at the drawn tokens; no gradient flows through the draws. The other steps are as ever:
forward KL on the text. Agarwal et al., "On-Policy Distillation of Language Models", 2024 (arXiv 2306.13649), mix both kinds of text;
here a step is of one kind, and which steps are on-policy is a function of the step alone.

The draws are a function of seed, step and position: they depend neither on micro-batches nor on ranks, and a resumed run repeats them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from undo_core.distributed import head_ops
from undo_core.io.files import hash_json
from undo_core.models import continued_states, evaluating, head_of
from undo_core.models.adapters import bare
from undo_core.training.batches import Batch, Source, identity_of


@dataclass(frozen=True)
class OnPolicyConfig:
    """Which steps of a distillation are on-policy, and where the student takes over. By default none is.

    Attributes:
        first: share of on-policy steps at the beginning, from 0 to 1.
        last: share of on-policy steps after ``over`` steps; in between it changes linearly.
        over: number of steps in which the share goes from ``first`` to ``last``; null for all steps of the training.
        prompt: number of tokens at the beginning of each sequence that the student is given; it draws the others.
    """

    first: float = 0.0
    last: float = 0.0
    over: int | None = None
    prompt: int = 8

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"on_policy.{name}: got {getattr(self, name)}, wanted a number in [0, 1]")
        for name in ("over", "prompt"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"on_policy.{name}: got {getattr(self, name)}, wanted an integer >= 1")

    def __bool__(self) -> bool:
        """Whether any step can be on-policy."""
        return self.first > 0 or self.last > 0

    def check(self, kind: str, longest: int | None = None) -> None:
        """Raises a ValueError for a teacher whose outputs are stored, which knows nothing of new text, or for text without room.

        Args:
            kind: of the teacher.
            longest: tokens of the longest sequence, if it is known.
        """
        if self and kind in ("cached", "topk"):
            raise ValueError(
                f"on_policy: got shares {self.first:g} to {self.last:g} with a {kind} teacher, which cannot score what the student "
                "draws; wanted a resident or streamed teacher"
            )
        if self and longest is not None and longest <= self.prompt:
            raise ValueError(
                f"on_policy.prompt: got {self.prompt} for text of at most {longest} tokens, wanted fewer than these: nothing would be drawn"
            )

    def settings(self) -> dict[str, Any]:
        """Settings that change the student, as JSON values; none if no step is on-policy."""
        return dataclasses.asdict(self) if self else {}

    def count(self, steps: int, total: int) -> int:
        """Number of on-policy steps among the first ``steps`` of a training of ``total``: the whole part of their shares' sum."""
        over = self.over or max(total, 1)
        rising = min(steps, over)
        shares = self.first * steps + (self.last - self.first) * (rising * rising / (2 * over) + steps - rising)
        return math.floor(shares + 1e-9)  # ten shares of 0.1 are one step

    def takes(self, step: int, total: int) -> bool:
        """Whether ``step``, from 0, is on-policy."""
        return self.count(step + 1, total) > self.count(step, total)


@dataclass(frozen=True)
class Prompts:
    """The batches of ``source``; in those of on-policy steps only what the student draws counts, and ``reference`` has the draws."""

    source: Source
    config: OnPolicyConfig
    steps: int
    seed: int

    def __call__(self, step: int) -> Batch:
        batch = self.source(step)
        if not self.config.takes(step, self.steps):
            return batch
        for name in ("attention_mask", "position_ids", "labels"):
            if getattr(batch, name) is not None:
                raise ValueError(
                    f"on_policy: got text with {name}, wanted whole sequences that are padded on the right, without it"
                )
        self.config.check("", batch.input_ids.shape[1])
        drawn = torch.arange(batch.input_ids.shape[1]) >= self.config.prompt
        generator = torch.Generator().manual_seed(int(hash_json(["on-policy", self.seed, step])[:15], 16))
        uniform = torch.rand(len(batch.input_ids), len(drawn) - 1, generator=generator, dtype=torch.float64)
        return dataclasses.replace(batch, mask=batch.mask & drawn.to(batch.mask.device), reference=uniform)

    def identity(self) -> dict[str, Any] | None:
        """Identity of ``source``; the settings are compared with the stage's."""
        return identity_of(self.source)


@torch.no_grad()
def continued(student: PreTrainedModel, batch: Batch, prompt: int, vocab_size: int | None = None) -> Batch:
    """Returns the batch of an on-policy step with the tokens after the prompt drawn from the student.

    A sequence stays as long as its text was; after the end of a text that the student draws, nothing counts.

    Memory: the student's keys and values of the batch, the logits of one token of each sequence, and of a 16-bit head a float32 copy.
    """
    ids, mask, draws = batch.input_ids.clone(), batch.mask.clone(), batch.reference
    whole = batch if batch.whole is None else batch.whole  # every rank must run the same number of passes
    columns = whole.mask.any(0).nonzero()
    end = int(columns.max()) + 1 if len(columns) else 0
    ends = torch.tensor(_ends(student), device=ids.device)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    draw = head_ops.sampler(head_of(student), vocab_size)
    cache, given = DynamicCache(config=bare(student).config), ids[:, :prompt]
    with evaluating(student):
        for at in range(prompt, end):
            hidden = continued_states(student, given, cache)[:, -1]
            ids[:, at] = draw(hidden, draws[:, at - 1])
            mask[:, at] &= ~ended
            ended |= torch.isin(ids[:, at], ends)
            given = ids[:, at : at + 1]
    return dataclasses.replace(batch, input_ids=ids, mask=mask, reference=None)


def drawing_bytes(model: PreTrainedModel, sequences: int, length: int) -> int:
    """Bytes, at most, that :func:`continued` holds for so many sequences beside the model."""
    config, head = bare(model).config.get_text_config(), head_of(model).weight
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * sequences * length * head.dtype.itemsize
    entries = head.shape[0]
    logits = 16 * max(
        entries, min(sequences * entries, head_ops.LOGITS)
    )  # logits and probabilities in float32, sums in float64
    return cache + logits + (0 if head.dtype == torch.float32 else 4 * head.numel())


def _ends(model: PreTrainedModel) -> list[int]:
    """Tokens that end a text."""
    found = getattr(bare(model).config.get_text_config(), "eos_token_id", None)
    return found if isinstance(found, list) else [] if found is None else [found]
