"""Which of the prepared text an attack trains on, and which it is scored on.

A *part* of the forget set is chosen by content: a hash of a sequence's tokens decides on which side it falls, so that equal
sequences, which a data set may hold many times, are on the same side. An attack on one part that is scored on the other asks
whether it brings back what was removed, or teaches what it trains on (Deeb and Roger 2024, "Do Unlearning Methods Remove
Information from Language Model Weights?", arXiv 2410.08827).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from undo_core.data.characteristic import nearest
from undo_core.data.sequences import Sequences


@dataclass(frozen=True)
class AttackTextConfig:
    """The text of an attack, if it is not all of the training text.

    Attributes:
        forget_part: share of the different forget sequences that the attack trains on, in (0, 1). It is then scored on the other
            sequences of the forget set, which it never sees: on those test prompts that the forget set holds too, or, for text
            without answers, on the sequences themselves, as many as there are test sequences. null for all, scored on the test
            sequences.
        retain_near: share of the retain sequences that the attack trains on, in (0, 1]: those whose tokens resemble the forget
            text most. null for all.
        seed: seed of the hash that chooses the part; the same for all trials.
    """

    forget_part: float | None = None
    retain_near: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.forget_part is not None and not 0 < self.forget_part < 1:
            raise ValueError(f"text.forget_part: got {self.forget_part}, wanted a number in (0, 1), or null")
        if self.retain_near is not None and not 0 < self.retain_near <= 1:
            raise ValueError(f"text.retain_near: got {self.retain_near}, wanted a number in (0, 1], or null")
        if self.seed < 0:
            raise ValueError(f"text.seed: got {self.seed}, wanted an integer >= 0")

    def __bool__(self) -> bool:
        """Whether the attack has text of its own."""
        return self.forget_part is not None or self.retain_near is not None

    def check_mix(self, mix: Iterable[str]) -> None:
        """Raises a ValueError if the attack does not train on the text of which it wants a part."""
        for name, source in (("forget_part", "forget"), ("retain_near", "retain")):
            if getattr(self, name) is not None and source not in mix:
                raise ValueError(
                    f"text.{name}: got {getattr(self, name)} with a mix without {source}, wanted null, or a share of {source}"
                )

    def choose(
        self, forget: Sequences, retain: Sequences, tests: Mapping[str, Sequences]
    ) -> tuple[dict[str, Sequences], dict[str, Sequences]]:
        """Returns the training text and the test sequences of the attack, each by name.

        Args:
            forget: training sequences of the forget set.
            retain: training sequences to retain.
            tests: test sequences of both, by name.

        Raises:
            ValueError: a part is empty, or no test prompt occurs in the forget set, as with packed problems.
        """
        texts, tests = {"forget": forget, "retain": retain}, dict(tests)
        if self.forget_part is not None:
            part = in_part(forget, self.forget_part, self.seed)
            rest = self._rest(forget, ~part, tests["forget"])
            if not part.any() or not len(rest):
                raise ValueError(
                    f"text.forget_part: got {self.forget_part}, which leaves {int(part.sum())} of {len(forget)} sequences to train "
                    f"on and {len(rest)} to score, wanted some of both; scored are test prompts that also occur in the training "
                    "data, which packed sequences and questions do not have"
                )
            texts["forget"], tests["forget"] = forget.take(part), (tests["forget"] if _scored(tests) else forget).take(rest)
        if self.retain_near is not None:
            texts["retain"] = retain.take(nearest(retain, forget, self.retain_near))
        return texts, tests

    def _rest(self, forget: Sequences, other: torch.Tensor, test: Sequences) -> torch.Tensor:
        """Returns the indices of what is scored: of ``test``, or for text of ``forget``."""
        if test.answer_mask is None:
            return other.nonzero().flatten()[: len(test)]
        unseen = {one for one, apart in zip(contents(forget), other.tolist(), strict=True) if apart}
        return torch.tensor([i for i, one in enumerate(contents(test)) if one in unseen], dtype=torch.int64)


def in_part(sequences: Sequences, share: float, seed: int) -> torch.Tensor:
    """Returns ``[n]`` bool: which sequences a hash of the seed and their tokens puts into a part of this size."""
    salt, known = f"{seed}/".encode(), {}
    for one in contents(sequences):
        if one not in known:
            digest = hashlib.sha256(salt + one).digest()
            known[one] = int.from_bytes(digest[:8], "little") < share * 2**64
    return torch.tensor([known[one] for one in contents(sequences)])


def contents(sequences: Sequences) -> list[bytes]:
    """Returns the tokens of every sequence, without padding, as bytes."""
    rows = sequences.input_ids.to(torch.int32).numpy()
    return [row[:length].tobytes() for row, length in zip(rows, sequences.lengths.tolist(), strict=True)]


def facts(texts: Mapping[str, Sequences], tests: Mapping[str, Sequences]) -> dict[str, Any]:
    """What an attack trained on and was scored on, for the manifest."""
    read = {"trained": texts, "scored": tests}
    return {
        kind: {name: {"sequences": len(one), "digest": one.digest()} for name, one in named.items()}
        for kind, named in read.items()
    }


def _scored(tests: Mapping[str, Sequences]) -> bool:
    return tests["forget"].answer_mask is not None
