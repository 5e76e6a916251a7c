"""The attacks of a run by name: their types, and what is checked of them together."""

from __future__ import annotations

import math
import re

from undo_core.attacks.config import HEADLINE, AttackConfig
from undo_core.attacks.interventions import AnyIntervention
from undo_core.attacks.search import SearchConfig

AnyAttack = AttackConfig | SearchConfig | AnyIntervention


def check_attacks(relearn: AttackConfig, attacks: dict[str, AnyAttack]) -> None:
    """Raises a ValueError if the headline attack trains nothing, or a further attack has an unusable name or is an impossible search."""
    if not relearn.trains:
        raise ValueError(f"relearn.kind: got {relearn.kind}, wanted finetune or lora; put other kinds under attacks")
    for name in attacks:
        if name == HEADLINE or not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ValueError(
                f"attacks: got the name {name!r}, wanted letters, digits, - and _, and not relearn, the headline attack"
            )
    for name, own in attacks.items():
        if isinstance(own, SearchConfig):
            try:
                own.along(relearn)
            except ValueError as error:
                raise ValueError(f"attacks.{name}.{error}") from None


def check_margin(margin: float | None) -> None:
    """Raises a ValueError unless the margin is a finite number of at least 0, or None."""
    if margin is not None and not 0 <= margin < math.inf:
        raise ValueError(f"retain_margin: got {margin}, wanted a finite number >= 0, or null")
