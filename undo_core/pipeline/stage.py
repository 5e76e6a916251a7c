"""A stage is one step of the method: a frozen dataclass whose fields are its settings and the stages whose folders it reads."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from undo_core.checkpoints.files import CONFIG, stored_dtype, weight_files
from undo_core.io.files import hash_file, hash_json
from undo_core.pipeline.needs import Change, Cost, Memory, Scene

if TYPE_CHECKING:  # it imports all that training does
    from undo_core.pipeline.meta import Meta

FORMAT = 5  # of the folders; a change of what a stage computes raises it, so that nothing stale is reused
MANIFEST = "manifest.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges*", "*.model"),
)


@dataclass(frozen=True)
class Work:
    """The folders that a stage works with.

    Attributes:
        inputs: folders of the stages that it reads, by the name of the field.
        scratch: survives a kill: checkpoints and the log.
        output: empty at first; becomes the stage's folder.
        title: for the progress bar.
    """

    inputs: dict[str, Path]
    scratch: Path
    output: Path
    title: str


@dataclass(frozen=True)
class Folder:
    """A folder that exists, in the place of a stage that would make it.

    Attributes:
        path: the folder.
        names: globs of the files that decide what is made from it; empty for the weights, their configuration, the tokenizer and the
            prepared data.
    """

    path: Path
    names: tuple[str, ...] = ()
    inputs: ClassVar[Mapping[str, Stage]] = MappingProxyType({})

    @property
    def key(self) -> str:
        """Hash of the folder's content."""
        return hash_json(self.content)[:12]

    @functools.cached_property
    def content(self) -> dict[str, str]:
        """SHA-256 of each file that decides what is made from the folder."""
        if self.names:
            found = {path for name in self.names for path in self.path.glob(name)}
        else:
            found = {path for name in ("data/*.safetensors", *TOKENIZER_FILES) for path in self.path.glob(name)}
            if (self.path / CONFIG).is_file():
                found |= {self.path / CONFIG, *weight_files(self.path)}
        return {path.relative_to(self.path).as_posix(): hash_file(path) for path in sorted(found)}

    def stored(self) -> torch.dtype:
        """Dtype of the weights in the folder."""
        return stored_dtype(self.path)


def optional(default: Any = None) -> Any:
    """A field for a setting that the stage's key leaves out at its default, so that stages made before it existed are found again."""
    return field(default=default, metadata={"optional": True})


@dataclass(frozen=True, kw_only=True)
class Stage(abc.ABC):
    """One step of the method. A subclass adds fields: settings as JSON values or dataclasses of these, and inputs.

    Attributes:
        title: for people; not part of the key.
        recorded: names of optional settings that are written down even at their default.
        kind: name of the kind, unique; the first part of the folder's name.
        model_from: name of the input whose folder holds the model that the stage works on; None where there is none.
        own_text: whether its rows are those that students are distilled on, which may be text of their own.
    """

    title: str = ""
    recorded: tuple[str, ...] = ()
    kind: ClassVar[str]
    model_from: ClassVar[str | None] = "model"
    own_text: ClassVar[bool] = False

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the result besides the inputs, as JSON values, seeds included."""
        return self._json()

    @functools.cached_property
    def inputs(self) -> dict[str, Stage | Folder]:
        """The stages and folders that this one reads."""
        return {entry.name: value for entry, value in self._values() if isinstance(value, (Stage, Folder))}

    @functools.cached_property
    def key(self) -> str:
        """Hash of the stage's settings and of its inputs' keys."""
        inputs = {name: stage.key for name, stage in self.inputs.items()}
        return hash_json({"format": FORMAT, "kind": self.kind, "settings": self.settings, "inputs": inputs})[:12]

    @property
    def name(self) -> str:
        """Name of the stage's folder."""
        return f"{self.kind}-{self.key}"

    @abc.abstractmethod
    def run(self, work: Work) -> dict[str, Any]:
        """Make the content of ``work.output`` and return what the manifest says about it."""

    def expected(self, work: Work) -> dict[str, Any]:
        """What the manifest holds of what was predicted before the stage ran."""
        return {}

    def reads(self) -> torch.dtype:
        """Dtype of the weights that the stage reads."""
        return self.stored() if self.model_from is None else self.inputs[self.model_from].stored()

    def stored(self) -> torch.dtype:
        """Dtype of the weights that the stage leaves behind: that of the model that it works on."""
        return self.inputs[self.model_from].stored()

    @abc.abstractmethod
    def memory(self, meta: Meta) -> list[Memory]:
        """Predicted memory at each moment at which it may be largest."""

    def cost(self, scene: Scene) -> Cost:
        """Predicted work, at most."""
        return Cost(disk=4 * scene.parameters)

    def cheaper(self) -> list[Change]:
        """Changes of settings with which the stage would need less memory, those that cost least first."""
        return []

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """The stage with other settings, by the flags of :meth:`cheaper`.

        Raises:
            ValueError: settings that exclude each other.
        """
        if changes:
            raise ValueError(f"{self.kind}: got changes of {', '.join(changes)}, wanted none")
        return self

    def accepts(self, changes: Mapping[str, Any]) -> bool:
        """Whether the settings allow these changes together."""
        try:
            self.changed(changes)
        except ValueError:
            return False
        return True

    def results(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What a run's results say about a student that was distilled from this stage's model; ``facts`` is the manifest."""
        return {}

    def _json(self) -> dict[str, Any]:
        """The settings: every field that is no input, but for optional ones at their default."""
        return {
            entry.name: as_json(value)
            for entry, value in self._values()
            if not isinstance(value, (Stage, Folder)) and not self._left_out(entry, value)
        }

    def _values(self) -> list[tuple[dataclasses.Field, Any]]:
        common = {entry.name for entry in dataclasses.fields(Stage)}
        return [(entry, getattr(self, entry.name)) for entry in dataclasses.fields(self) if entry.name not in common]

    def _left_out(self, entry: dataclasses.Field, value: Any) -> bool:
        return bool(entry.metadata.get("optional")) and value == entry.default and entry.name not in self.recorded


def as_json(value: Any) -> Any:
    """A setting as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [as_json(entry) for entry in value] if isinstance(value, (list, tuple)) else value
