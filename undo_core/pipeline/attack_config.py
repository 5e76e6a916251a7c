"""Settings of ``undo attack``: the text, and the attacks that every checkpoint undergoes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from undo_core.attacks.config import HEADLINE, AttackConfig
from undo_core.attacks.named import AnyAttack, check_attacks, check_margin
from undo_core.attacks.text import AttackTextConfig
from undo_core.data.config import DataConfig
from undo_core.distributed.config import ParallelConfig
from undo_core.pipeline.config import check_seed

NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class TextConfig(DataConfig):
    """The text: what was to be kept (retain) and what was to be forgotten (forget).

    Attributes:
        kind: text, which is read with the tokenizer of each checkpoint.
    """

    kind: Literal["text"] = "text"


def _headline() -> AttackConfig:
    return AttackConfig(rates=[5e-6, 2e-5, 8e-5, 3.2e-4], evaluate_at=[0, 10, 50, 200], headline_step=200, batch_size=16)


@dataclass(frozen=True)
class AttackRunConfig:
    """An attack on checkpoints.

    Attributes:
        output: folder of the stages, of a folder for each checkpoint, and of the report.
        data: what was to be kept and what was to be forgotten.
        original: checkpoint before the unlearning, NAME=FOLDER or FOLDER; it is evaluated and not attacked.
        reference: checkpoint that never had the capability, such as one trained without the forget text, NAME=FOLDER or FOLDER; it
            is attacked like the others, and the compute slowdown compares them with it.
        name: title of the report.
        seed: seed from which all other seeds derive.
        workers: number of stages that run in parallel, each with its share of the CPU threads.
        parallel: how the ranks of torchrun work together.
        relearn: the headline attack; its settings are also those of the default ``attacks``.
        attacks: further attacks, by name. null: mixed (half retain text), benign (retain text alone), adapters (LoRA at ten times
            the rates) and quantised (8 and 4 bits); {} for none. An intervention has the name of a file in
            undo_core/attacks/interventions as its ``kind``, a search over settings has ``search``.
        measures: names of the two performances in the files for other suites, such as wmdp for questions of WMDP.
        keep: keep the weights of the attacked models, one folder for each trial; else they are removed as soon as they are
            evaluated.
        retain_margin: margin of a second worst case, as in ``undo run``.
    """

    output: str
    data: TextConfig
    original: str | None = None
    reference: str | None = None
    name: str = "attack"
    seed: int = 0
    workers: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    relearn: AttackConfig = field(default_factory=_headline)
    attacks: dict[str, AnyAttack] | None = None
    measures: dict[str, str] = field(default_factory=lambda: {"forget": "forget", "retain": "retain"})
    keep: bool = False
    retain_margin: float | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.workers < 1:
            raise ValueError(f"workers: got {self.workers}, wanted an integer >= 1")
        check_attacks(self.relearn, self.attacks or {})
        check_margin(self.retain_margin)
        names = set(self.measures.values())
        if set(self.measures) != {"forget", "retain"} or len(names) < 2 or not all(map(NAME.fullmatch, names)):
            raise ValueError(
                f"measures: got {self.measures}, wanted different names for forget and retain, of letters, digits, . - and _"
            )
        unlike = "checkpoints with different tokenizers would read different documents"
        for name, reason in (("tokens", unlike), ("tokenizer", "every checkpoint is read with its own tokenizer")):
            if getattr(self.data, name) is not None:
                raise ValueError(f"data.{name}: got {getattr(self.data, name)}, wanted null: {reason}")
        for name, attack in {HEADLINE: self.relearn, **(self.attacks or {})}.items():
            if isinstance(attack, AttackConfig) and attack.text.forget_part is not None:
                part = f"{name if name == HEADLINE else f'attacks.{name}'}.text.forget_part"
                raise ValueError(f"{part}: got {attack.text.forget_part}, wanted null: {unlike}")
        if self.data.distill.sources:
            raise ValueError("data.distill.sources: got some, wanted none: an attack does not distill")

    def every(self, checkpoints: Sequence[str]) -> list[str]:
        """The checkpoints, with the reference and the original if they are given."""
        return [*checkpoints, *(given for given in (self.reference, self.original) if given)]

    def envelope(self) -> dict[str, AnyAttack]:
        """The further attacks: those that are given, or the default ones, with the settings of the headline attack."""
        if self.attacks is not None:
            return self.attacks
        change = lambda **settings: dataclasses.replace(self.relearn, **settings)  # noqa: E731
        return {
            "quantised": change(kind="quantise", together=1, text=AttackTextConfig()),
            "mixed": change(mix={"forget": 0.5, "retain": 0.5}),
            "benign": change(mix={"retain": 1.0}),
            "adapters": change(
                kind="lora", rates=[10 * rate for rate in self.relearn.rates], step_in_backward=False, together=1
            ),
        }
