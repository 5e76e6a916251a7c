"""Settings of the data: what is retained and what is forgotten, other text to distill on, and questions that score the models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from undo_core.data.questions import MultipleChoiceConfig

Sources = list[str] | dict[str, float]


@dataclass(frozen=True)
class DistillDataConfig:
    """Text to distill on, if it is not the training text of retain and forget.

    Attributes:
        sources: files or hf://..., as in data.retain; empty uses the training sequences of retain and forget.
        tokens: maximum number of tokens, or, if the sources have shares, the total that they share; None takes everything.
        length: tokens in a packed sequence; None for data.length.
    """

    sources: Sources = field(default_factory=list)
    tokens: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        _check_sources("data.distill.sources", self.sources, "data.distill.tokens", self.tokens)
        if self.length is not None and self.length < 2:
            raise ValueError(f"data.distill.length: got {self.length}, wanted an integer >= 2")


@dataclass(frozen=True)
class QuestionsConfig:
    """Multiple-choice questions, such as WMDP and MMLU, that score a run on text instead of the cross-entropy of held-out text.

    Give both forget and retain, or neither. With questions, the validation and test rows are questions, and performance on
    retain and forget is the share answered correctly; stop rules treat it as an accuracy. The training data stay the same.

    Attributes:
        forget: questions whose answers are to be forgotten.
        retain: questions whose answers are to be kept.
        valid_fraction: share of the questions used for validation (stop rules and training curves), chosen by a hash of the
            seed and the question; the results use the others.
    """

    forget: MultipleChoiceConfig | None = None
    retain: MultipleChoiceConfig | None = None
    valid_fraction: float = 0.2

    def __post_init__(self) -> None:
        for name, other in (("forget", "retain"), ("retain", "forget")):
            if getattr(self, name) is None and getattr(self, other) is not None:
                raise ValueError(f"data.questions.{name}: got none beside those of {other}, wanted both or neither")
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"data.questions.valid_fraction: got {self.valid_fraction}, wanted a number in (0, 1)")

    def __bool__(self) -> bool:
        """Whether there are any questions."""
        return self.forget is not None

    def chosen(self) -> dict[str, MultipleChoiceConfig]:
        """The questions of retain and forget by name; empty if there are none."""
        return {"retain": self.retain, "forget": self.forget} if self else {}


@dataclass(frozen=True)
class DataConfig:
    """The data: what is retained and what is forgotten.

    Attributes:
        kind: arithmetic-compact (17 characters, one problem in each sequence), arithmetic (the published generator) or text
            (files).
        seed: seed of the draws and of the choice of held-out problems; None derives it from the run's seed.
        train_rows: number of problems drawn for each of retain and forget (arithmetic).
        eval_prompts: number of prompts of each group in each evaluation split (arithmetic).
        held_out: share of operand pairs that no stage ever sees (arithmetic-compact).
        length: tokens in a packed sequence (arithmetic, text).
        documents: shared: a token attends to everything before it in its packed sequence, other documents included, as
            published; isolated: a token attends only to its own document, whose positions start at 0 (arithmetic, text).
        beginning: where the tokenizer's beginning-of-text token stands: before each document, or before each packed sequence
            too, those that continue a document included. Choose sequences for a checkpoint that was pretrained so: without
            the token, Gemma predicts the same text much worse (text).
        retain: text to retain: files (.txt, .jsonl, .parquet) or hf://name[:config[:split]][#field]. A mapping gives each
            source its share of ``tokens``; a source with fewer tokens than that is repeated (text).
        forget: text to forget, in the same form (text).
        tokens: number of tokens taken from each of retain and forget, all three splits together; None takes everything (text).
        distill: other text to distill on (text).
        questions: multiple-choice questions that score the models instead of held-out text (text).
        valid_fraction: share of the documents that goes to the validation split, and to the test split (text).
        special_tokens: how to read a control token, such as ``<|endoftext|>``, that is written out in a document. text: as
            ordinary characters; parse: as that token, for files that were made for it (text).
        tokenizer: folder of a tokenizer; None builds one, of characters for arithmetic and a byte-level BPE for text.
        vocab_size: size of the BPE tokenizer (text).
    """

    kind: Literal["arithmetic-compact", "arithmetic", "text"] = "arithmetic-compact"
    seed: int | None = None
    train_rows: int = 100_000
    eval_prompts: int = 1000
    held_out: float = 0.1
    length: int = 256
    documents: Literal["shared", "isolated"] = "shared"
    beginning: Literal["documents", "sequences"] = "documents"
    retain: Sources = field(default_factory=list)
    forget: Sources = field(default_factory=list)
    tokens: int | None = None
    distill: DistillDataConfig = field(default_factory=DistillDataConfig)
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    valid_fraction: float = 0.05
    special_tokens: Literal["text", "parse"] = "text"
    tokenizer: str | None = None
    vocab_size: int = 8000

    def __post_init__(self) -> None:
        if self.kind not in ("arithmetic-compact", "arithmetic", "text"):
            raise ValueError(f"data.kind: got {self.kind!r}, wanted arithmetic-compact, arithmetic or text")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"data.held_out: got {self.held_out}, wanted a number in [0, 1)")
        if not 0 < self.valid_fraction < 0.5:
            raise ValueError(f"data.valid_fraction: got {self.valid_fraction}, wanted a number in (0, 0.5)")
        for name in ("train_rows", "eval_prompts", "length", "vocab_size"):
            if getattr(self, name) < 2:
                raise ValueError(f"data.{name}: got {getattr(self, name)}, wanted an integer >= 2")
        if self.kind == "text" and not (self.retain and self.forget):
            missing = "retain" if not self.retain else "forget"
            raise ValueError(f"data.{missing}: got no files, wanted at least one; pass --data.{missing}='[path]'")
        if self.documents not in ("shared", "isolated"):
            raise ValueError(f"data.documents: got {self.documents!r}, wanted shared or isolated")
        if self.documents == "isolated" and self.kind == "arithmetic-compact":
            raise ValueError(
                "data.documents: got isolated with kind arithmetic-compact, whose sequences hold one problem; wanted shared"
            )
        if self.beginning not in ("documents", "sequences"):
            raise ValueError(f"data.beginning: got {self.beginning!r}, wanted documents or sequences")
        if self.beginning == "sequences" and self.kind != "text":
            raise ValueError(
                f"data.beginning: got sequences with kind {self.kind}, wanted documents: sequences needs kind text"
            )
        if self.special_tokens not in ("text", "parse"):
            raise ValueError(f"data.special_tokens: got {self.special_tokens!r}, wanted text or parse")
        for name in ("retain", "forget"):
            _check_sources(f"data.{name}", getattr(self, name), "data.tokens", self.tokens)
        if self.distill.sources and self.kind != "text":
            raise ValueError(f"data.distill.sources: got some with kind {self.kind}, wanted none: they need kind text")
        if self.questions and self.kind != "text":
            raise ValueError(f"data.questions: got some with kind {self.kind}, wanted none: they need kind text")

    @property
    def metric(self) -> Literal["accuracy", "loss"]:
        """Measure of performance: accuracy of the answers, or, for text without answers, cross-entropy (loss)."""
        return "loss" if self.kind == "text" and not self.questions else "accuracy"

    def sources(self) -> list[tuple[str, str]]:
        """Every file and Hugging Face Hub data set that is read, each with the key that names it."""
        named = {"retain": self.retain, "forget": self.forget, "distill.sources": self.distill.sources}
        for name, asked in self.questions.chosen().items():
            named |= {f"questions.{name}.files": asked.files, f"questions.{name}.examples": asked.examples}
        return [(f"data.{key}", source) for key, sources in named.items() for source in sources]


def _check_sources(name: str, sources: Sources, budget: str, tokens: int | None) -> None:
    if tokens is not None and tokens < 2:
        raise ValueError(f"{budget}: got {tokens}, wanted an integer >= 2")
    if not isinstance(sources, dict):
        return
    for source, share in sources.items():
        if not 0 < share < float("inf"):
            raise ValueError(f"{name}: got the share {share} for {source}, wanted a finite number > 0")
    if sources and tokens is None:
        raise ValueError(f"{budget}: got null with shares in {name}, wanted the total number of tokens")
