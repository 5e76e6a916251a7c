"""The interventions, one file for each kind; a file is found by being here."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Union

from undo_core.attacks.intervention import INTERVENTIONS, Effort, Given, Intervention, intervened

for found in pkgutil.iter_modules(__path__):  # each module registers its kind when it is imported
    importlib.import_module(f"{__name__}.{found.name}")

if TYPE_CHECKING:
    AnyIntervention = Intervention
else:  # the parser of configurations chooses among the classes by their field ``kind``
    AnyIntervention = Union[tuple(INTERVENTIONS[kind] for kind in sorted(INTERVENTIONS))]  # noqa: UP007

__all__ = ["INTERVENTIONS", "AnyIntervention", "Effort", "Given", "Intervention", "intervened"]
