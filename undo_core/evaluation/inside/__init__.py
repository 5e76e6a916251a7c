"""The measures of what a model still holds, one file for each kind; a file is found by being here."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Union

from undo_core.evaluation.measurement import MEASUREMENTS, Measurement, Texts

for found in pkgutil.iter_modules(__path__):  # each module registers its kind when it is imported
    importlib.import_module(f"{__name__}.{found.name}")

if TYPE_CHECKING:
    AnyMeasurement = Measurement
else:  # the parser of configurations chooses among the classes by their field ``kind``
    AnyMeasurement = Union[tuple(MEASUREMENTS[kind] for kind in sorted(MEASUREMENTS))]  # noqa: UP007

__all__ = ["MEASUREMENTS", "AnyMeasurement", "Measurement", "Texts"]
