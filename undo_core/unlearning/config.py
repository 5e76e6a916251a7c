"""Settings of the unlearning stage: those that all methods share, and one field for each method with settings of its own."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from undo_core.training.config import TrainConfig
from undo_core.unlearning.method import METHODS, ROBUST, Entry

for found in pkgutil.iter_modules([str(Path(__file__).parent)]):  # each module registers its methods when it is imported
    importlib.import_module(f"{__package__}.{found.name}")
for entries in (METHODS, ROBUST):  # by name, also where a module imports another before its turn
    in_order = sorted(entries.items())
    entries.clear()
    entries.update(in_order)

MethodName = Literal[tuple(METHODS)]  # type: ignore[valid-type]
RobustName = Literal[("none", *ROBUST)]  # type: ignore[valid-type]


@dataclass(frozen=True)
class _Common:
    """How the capability is suppressed.

    Attributes:
        method: {methods}.
        retain_weight: factor on the retain term.
        retain_loss: the retain term: cross-entropy, or the divergence from the original model, of which a copy is kept in memory:
            kl, or jsd (Jensen-Shannon).
        vocab_size: number of real tokens, for a head that is padded to more vocabulary entries: MaxEnt's uniform distribution
            covers only these. None means all entries of the head; a run and ``undo unlearn`` then use the tokenizer's size.
            Cross-entropies always cover all entries, as in transformers.
        forget_rows: number of labelled forget sequences to use, from the first on; None uses all.
        robust: protection against relearning that is added to the method: none, {robust}.
        train: optimizer, learning rates, batch sizes.
    """

    method: MethodName = "maxent"
    retain_weight: float = 1.0
    retain_loss: Literal["cross-entropy", "kl", "jsd"] = "cross-entropy"
    vocab_size: int | None = None
    forget_rows: int | None = None
    robust: RobustName = "none"
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=10, batch_size=40, lr=9e-5))

    def __post_init__(self) -> None:
        for name, entries in (("method", METHODS), ("robust", {"none": None, **ROBUST})):
            if getattr(self, name) not in entries:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted one of {', '.join(entries)}")
        if not (math.isfinite(self.retain_weight) and self.retain_weight >= 0):
            raise ValueError(f"retain_weight: got {self.retain_weight}, wanted a finite number >= 0")
        if self.retain_loss not in ("cross-entropy", "kl", "jsd"):
            raise ValueError(f"retain_loss: got {self.retain_loss!r}, wanted cross-entropy, kl or jsd")
        if self.retain_loss != "cross-entropy" and not self.retain_weight:
            raise ValueError(f"retain_loss: got {self.retain_loss} with retain_weight 0, wanted a retain_weight > 0 with it")
        if self.forget_rows is not None and self.forget_rows < 1:
            raise ValueError(f"forget_rows: got {self.forget_rows}, wanted an integer >= 1")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size: got {self.vocab_size}, wanted an integer >= 1, or null")
        for entry in self.entries():
            if entry.check is not None:
                entry.check(self)

    def entries(self) -> list[Entry]:
        """Registry entries of the method and of the protection that ``robust`` adds."""
        return [METHODS[self.method], *([] if self.robust == "none" else [ROBUST[self.robust]])]

    @property
    def title(self) -> str:
        """Short name, such as ``maxent`` or ``rmu+sam``."""
        return self.method if self.robust == "none" else f"{self.method}+{self.robust}"

    def settings(self) -> dict[str, Any]:
        """Only the settings that change the result, as JSON values; they are part of the stage's key.

        The settings of methods that are not used are left out, as are later additions at their default.
        """
        used = {self.method, self.robust, "rmu"}  # the keys of older stages always hold the settings of rmu
        unused = {name for name, entry in {**METHODS, **ROBUST}.items() if entry.settings} - used
        defaults = (("vocab_size", None), ("forget_rows", None), ("robust", "none"), ("retain_loss", "cross-entropy"))
        absent = {name for name, value in defaults if getattr(self, name) == value}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in unused | absent}


def _unlearn_config() -> type:
    own = {name: entry for name, entry in {**METHODS, **ROBUST}.items() if entry.settings}
    titles = [f"{name} ({entry.title})" for name, entry in ROBUST.items()]
    names = {
        "{methods}": ", ".join(f"{name} ({entry.title})" for name, entry in METHODS.items()),
        "{robust}": " or ".join([", ".join(titles[:-1]), titles[-1]]),
    }
    text = (_Common.__doc__ or "").rstrip()
    for mark, value in names.items():
        text = text.replace(mark, value)
    text += "".join(f"\n        {name}: settings of {entry.title}." for name, entry in own.items()) + "\n    "
    fields = [(name, entry.settings, field(default_factory=entry.settings)) for name, entry in own.items()]
    namespace = {"__doc__": text, "__module__": __name__}
    return dataclasses.make_dataclass("UnlearnConfig", fields, bases=(_Common,), frozen=True, namespace=namespace)


if TYPE_CHECKING:  # a type checker cannot know the fields that the registered methods add
    UnlearnConfig = _Common
else:
    UnlearnConfig = _unlearn_config()
