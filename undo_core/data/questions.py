"""Multiple-choice questions: read from files, and put as lm-eval's WMDP and MMLU tasks put them."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LETTERS = string.ascii_uppercase
DESCRIPTION = "The following are multiple choice questions (with answers) about {subject}.\n\n"


@dataclass(frozen=True)
class Question:
    """A question with its choices.

    Attributes:
        question: text.
        choices: texts, 2 to 26.
        answer: index of the right choice.
        subject: what it is about (``high_school_biology``); examples of the same subject are shown before it.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""

    def prompt(self) -> str:
        """The question, a line a choice, and ``Answer:``, after which a space and the right letter come."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.question.strip(), *lines, "Answer:"])


def read_questions(sources: Iterable[str | Path]) -> list[Question]:
    """The questions of every source, in order.

    Args:
        sources: ``.jsonl`` or ``.parquet`` files with the fields ``question``, ``choices``, ``answer`` (an index) and, where it has
            one, ``subject``: the columns of ``cais/wmdp`` and ``cais/mmlu``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an unknown ending, a malformed record, or a file without a question; names file and line.
        ImportError: Parquet without pyarrow; names the command that installs it.
    """
    found = []
    for path in map(Path, sources):
        questions = [_question(record, f"{path}, {where}") for where, record in _records(path)]
        if not questions:
            raise ValueError(f"{path}: got no question, wanted at least one")
        found += questions
    return found


def prompts(
    questions: Sequence[Question], examples: Sequence[Question] = (), *, shots: int = 0, description: str = ""
) -> list[str]:
    """What a model reads before it answers: the description, the first ``shots`` examples of the question's subject with their
    answers, the question.

    Args:
        questions: to be answered.
        examples: answered questions; those of one subject in the order in which they are shown.
        shots: number of examples.
        description: text before everything; ``{subject}`` in it becomes the question's, with spaces for underscores.

    Raises:
        ValueError: a subject with fewer examples than ``shots``.
    """
    by_subject: dict[str, list[Question]] = {}
    for example in examples:
        by_subject.setdefault(example.subject, []).append(example)
    heads = {}
    for subject in dict.fromkeys(question.subject for question in questions):
        known = by_subject.get(subject, [])[:shots]
        if len(known) < shots:
            raise ValueError(
                f"shots: got {shots} and {len(known)} examples of the subject {subject!r}, wanted as many examples"
            )
        parts = [f"{example.prompt()} {LETTERS[example.answer]}\n\n" for example in known]
        heads[subject] = description.replace("{subject}", subject.replace("_", " ")) + "".join(parts)
    return [heads[question.subject] + question.prompt() for question in questions]


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"multiple_choice: got {path}, which is not a file; wanted .jsonl or .parquet")
    if path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"line {number}", json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); wanted one object a line") from None
    elif path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ImportError(f"{path}: reading Parquet needs pyarrow; pip install 'undo-core[data]'") from None
        for number, record in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1):
            yield f"row {number}", record
    else:
        raise ValueError(f"{path}: got the ending {path.suffix!r}, wanted .jsonl or .parquet")


def _question(record: Any, where: str) -> Question:
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: got {type(record).__name__}, wanted an object with question, choices and answer")
    question, choices, answer = (record.get(name) for name in ("question", "choices", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: got the question {question!r}, wanted a text")
    if not isinstance(choices, list) or not 2 <= len(choices) <= 26 or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"{where}: got the choices {choices!r}, wanted a list of 2 to 26 texts")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: got the answer {answer!r}, wanted the index of a choice, below {len(choices)}")
    return Question(question, tuple(choices), answer, str(record.get("subject") or ""))
