"""Reads multiple-choice questions from files and formats them as prompts, as lm-eval's WMDP and MMLU tasks do."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from undo_core.data.reading import checked_text, read_records

LETTERS = string.ascii_uppercase
DESCRIPTION = "The following are multiple choice questions (with answers) about {subject}.\n\n"


@dataclass(frozen=True)
class MultipleChoiceConfig:
    """Chooses multiple-choice questions and the format of their prompts.

    Attributes:
        files: files of questions: JSONL, Parquet or hf://name[:config[:split]]; see :func:`read_questions`.
        examples: files of answered questions, some of which are shown before each question.
        shots: number of examples to show, from the question's subject; the published settings are 0 for WMDP and 5 for MMLU.
        description: text before everything else; ``{subject}`` in it becomes the question's subject.
        limit: share of each subject's questions to take, from the first on, in (0, 1]; published for MMLU: 0.4.
        special_tokens: text: a control token that is written out in a question is text; parse: it becomes that token.
    """

    files: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    shots: int = 0
    description: str = DESCRIPTION
    limit: float = 1.0
    special_tokens: Literal["text", "parse"] = "text"

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("multiple_choice: got no files, wanted at least one file of questions")
        if isinstance(self.shots, bool) or not isinstance(self.shots, int) or self.shots < 0:
            raise ValueError(f"shots: got {self.shots}, wanted an integer >= 0")
        if self.shots and not self.examples:
            raise ValueError(f"shots: got {self.shots} and no examples, wanted files of examples")
        if not 0 < self.limit <= 1:
            raise ValueError(f"limit: got {self.limit}, wanted a number in (0, 1]")
        if self.special_tokens not in ("text", "parse"):
            raise ValueError(f"special_tokens: got {self.special_tokens!r}, wanted text or parse")


@dataclass(frozen=True)
class Question:
    """A question with its choices.

    Attributes:
        question: text of the question.
        choices: texts of the choices, 2 to 26.
        answer: index of the right choice.
        subject: topic (``high_school_biology``); examples of the same subject are shown before the question.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""

    def prompt(self) -> str:
        """Returns the question, one line per choice, and ``Answer:``; a space and the right letter would follow."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.question.strip(), *lines, "Answer:"])


def read_questions(sources: Iterable[str | Path]) -> list[Question]:
    """Reads the questions of every source, in order.

    Args:
        sources: ``.jsonl`` or ``.parquet`` files, or ``hf://name[:config[:split]]`` (the split ``test`` where none is named),
            with the fields ``question``, ``choices``, ``answer`` (an index) and, where it has one, ``subject`` (a text): the
            columns of ``cais/wmdp`` and ``cais/mmlu``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an unknown ending, a malformed record, something that is not text, or a source without a question. The error
            names source and row.
        ImportError: a package is missing; the error names the command that installs it.
    """
    found = []
    for source in map(str, sources):
        questions = list(each_question(source))
        if not questions:
            raise ValueError(f"{source}: got no question, wanted at least one")
        found += questions
    return found


def each_question(source: str) -> Iterator[Question]:
    """Yields the questions of a source, as :func:`read_questions` reads them."""
    for place, record in read_records(source, "multiple_choice", split="test"):
        yield _question(record, f"{source}, {place}")


def first_of_each(questions: Sequence[Question], limit: float) -> list[Question]:
    """Returns the first questions of each subject: the share ``limit`` of them, rounded up."""
    left: dict[str, int] = {}
    for question in questions:
        left[question.subject] = left.get(question.subject, 0) + 1
    left = {subject: math.ceil(count * limit) for subject, count in left.items()}
    kept = []
    for question in questions:
        if left[question.subject] > 0:
            left[question.subject] -= 1
            kept.append(question)
    return kept


def posed(config: MultipleChoiceConfig) -> tuple[list[Question], list[str]]:
    """Reads the questions that ``config`` chooses, and returns them with their prompts.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`read_questions` and :func:`prompts`.
    """
    questions = first_of_each(read_questions(config.files), config.limit)
    examples = read_questions(config.examples)
    return questions, prompts(questions, examples, shots=config.shots, description=config.description)


def prompts(
    questions: Sequence[Question], examples: Sequence[Question] = (), *, shots: int = 0, description: str = ""
) -> list[str]:
    """Returns the prompt of each question.

    A prompt consists of the description, the first ``shots`` examples of the question's subject with their answers, and the
    question.

    Args:
        questions: questions to be answered.
        examples: answered questions; those of a subject are shown in this order.
        shots: number of examples to show.
        description: text before everything else; ``{subject}`` in it becomes the question's subject, with spaces for
            underscores.

    Raises:
        ValueError: a subject has fewer examples than ``shots``, or the description has ``{subject}`` and a question has no
            subject.
    """
    by_subject: dict[str, list[Question]] = {}
    for example in examples:
        by_subject.setdefault(example.subject, []).append(example)
    heads = {}
    for subject in dict.fromkeys(question.subject for question in questions):
        known = by_subject.get(subject, [])[:shots]
        if len(known) < shots:
            raise ValueError(
                f"shots: got {shots} and {len(known)} examples of the subject {subject!r}, wanted at least as many examples as "
                "shots"
            )
        if not subject and "{subject}" in description:
            raise ValueError(
                f"description: got {description!r} and a question without a subject, wanted a subject for every question"
            )
        parts = [f"{example.prompt()} {LETTERS[example.answer]}\n\n" for example in known]
        heads[subject] = description.replace("{subject}", subject.replace("_", " ")) + "".join(parts)
    return [heads[question.subject] + question.prompt() for question in questions]


def _question(record: Any, where: str) -> Question:
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: got {type(record).__name__}, wanted an object with question, choices and answer")
    question, choices, answer = (record.get(name) for name in ("question", "choices", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: got the question {question!r}, wanted text")
    if not isinstance(choices, list) or not 2 <= len(choices) <= 26 or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"{where}: got the choices {choices!r}, wanted a list of 2 to 26 texts")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: got the answer {answer!r}, wanted the index of a choice, below {len(choices)}")
    subject = "" if record.get("subject") is None else record["subject"]
    for name, text in (("question", question), ("subject", subject), *(("choices", choice) for choice in choices)):
        checked_text(text, where, name)
    return Question(question, tuple(choices), answer, subject)
