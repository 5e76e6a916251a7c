"""A stage is one step of the method: a frozen dataclass whose fields are its settings and the stages whose folders it reads."""

from __future__ import annotations

import abc
import dataclasses
import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from undo_core.checkpoints.files import read_header, stored_dtype
from undo_core.io.files import hash_file, hash_json
from undo_core.io.untrusted import Shape
from undo_core.models.folder import CONFIG, TOKENIZER_FILES, weight_files
from undo_core.pipeline.needs import Change, Cost, Memory, Scene

if TYPE_CHECKING:  # meta imports the whole training code
    from transformers import PreTrainedModel

    from undo_core.pipeline.memory.meta import Meta

FORMAT = 5  # part of every key; raise it when a stage computes something else, so that no stale folder is reused
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Work:
    """The folders that a stage works with.

    Attributes:
        inputs: folders of the stages that it reads, by field name.
        scratch: folder for checkpoints and the log; it is kept if the process is killed.
        output: folder for the result; empty at first, it becomes the stage's folder.
        title: title of the progress bar.
        ranks: number of ranks that run the stage, if it is one that they run together.
        tensor: number of ranks that share a head.
    """

    inputs: dict[str, Path]
    scratch: Path
    output: Path
    title: str
    ranks: int = 1
    tensor: int = 1

    def complete(self, name: str) -> bool:
        """Whether an input is complete; one that is late may still be built."""
        return self.inputs[name].exists()

    def wait(self, name: str) -> Path:
        """Waits until an input is complete and returns its folder; whoever started the stage ends it if the input fails."""
        while not self.complete(name):
            time.sleep(0.1)
        return self.inputs[name]


@dataclass(frozen=True)
class Folder:
    """An existing folder that serves as an input in place of a stage.

    Attributes:
        path: the folder.
        names: globs of the files that are hashed for the key; empty for the weights, their configuration, the tokenizer and the
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
        """SHA-256 of each file on which a stage that reads the folder depends, by relative path."""
        if self.names:
            found = {path for name in self.names for path in self.path.glob(name)}
        else:
            found = {path for name in ("data/*.safetensors", *TOKENIZER_FILES) for path in self.path.glob(name)}
            if (self.path / CONFIG).is_file():
                weights = weight_files(self.path)
                for path in weights:
                    read_header(path)  # a torn file is refused before hours of hashing
                found |= {self.path / CONFIG, *weights}
        return {path.relative_to(self.path).as_posix(): hash_file(path) for path in sorted(found) if path.is_file()}

    def stored(self) -> torch.dtype:
        """Dtype of the weights in the folder."""
        return stored_dtype(self.path)


def optional(default: Any = None) -> Any:
    """Declares a setting that the key leaves out at its default, so that folders made before the setting existed stay valid."""
    return field(default=default, metadata={"optional": True})


@dataclass(frozen=True, kw_only=True)
class Stage(abc.ABC):
    """One step of the method.

    A subclass adds fields: settings (JSON values, or dataclasses of them) and inputs (stages or folders).

    Attributes:
        title: title shown to the user; not part of the key.
        recorded: names of optional settings that are recorded even at their default.
        kind: unique name of the kind; first part of the folder's name.
        entries: shape of what the kind alone writes into its manifest and others read.
        model_from: name of the input whose folder holds the model that the stage works on; None if there is none.
        own_text: whether the stage reads the distillation data, which may be other text (``data.distill``) of another length.
        late: names of inputs that the stage does not read at first: it can begin while other processes build them.
        together: whether several ranks run the stage together; otherwise rank 0 runs it while the others wait.
        unties: whether the stage gives a tied head a weight of its own.
        time_from: the settings on which its time depends, as a plan names them.
    """

    title: str = ""
    recorded: tuple[str, ...] = ()
    kind: ClassVar[str]
    entries: ClassVar[Shape] = {}
    model_from: ClassVar[str | None] = "model"
    own_text: ClassVar[bool] = False
    late: ClassVar[tuple[str, ...]] = ()
    together: ClassVar[bool] = False
    unties: ClassVar[bool] = False
    time_from: ClassVar[str] = ""

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """All settings that change the result, seeds included, as JSON values."""
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
        """Writes the result into ``work.output`` and returns facts about it for the manifest."""

    def expected(self, work: Work) -> dict[str, Any]:
        """Predictions made before the stage runs, for the manifest."""
        return {}

    def check(self, model: PreTrainedModel) -> None:
        """Raises a ValueError if the stage would refuse the model that it works on, here without weights on the meta device."""
        return

    def estimated_seconds(self, scene: Scene) -> float | None:
        """Time of a stage that takes no optimizer steps, tried on a sample; None if it is negligible or follows from :meth:`cost`."""
        return None

    def check_ranks(self, count: int) -> None:
        """Raises a ValueError if the stage cannot be run on ``count`` ranks; what rank 0 runs alone can on any number."""
        return

    def reads(self) -> torch.dtype:
        """Dtype of the weights that the stage reads."""
        return self.stored() if self.model_from is None else self.inputs[self.model_from].stored()

    def stored(self) -> torch.dtype:
        """Dtype of the weights that the stage writes; by default that of the model it reads."""
        return self.inputs[self.model_from].stored()

    @property
    def untied(self) -> bool:
        """Whether the model that the stage works on had a tied head that now has a weight of its own."""
        source = None if self.model_from is None else self.inputs[self.model_from]
        return self.unties or (isinstance(source, Stage) and source.untied)

    @abc.abstractmethod
    def memory(self, meta: Meta) -> list[Memory]:
        """Predicted memory in each phase in which the peak may occur."""

    @property
    def sized_by(self) -> dict[str, Any]:
        """The settings on which the memory may depend: stages that agree in them are predicted once."""
        return self.settings

    def cost(self, scene: Scene) -> Cost:
        """Predicted work; by default only a float32 copy of the model on disk."""
        return Cost(disk=4 * scene.parameters)

    def cheaper(self) -> list[Change]:
        """Changes of settings that reduce the stage's memory, cheapest first."""
        return []

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Returns the stage with other settings, given by the flags of :meth:`cheaper`.

        Raises:
            ValueError: the settings exclude each other.
        """
        if changes:
            raise ValueError(f"{self.kind}: got changes of {', '.join(changes)}, wanted none")
        return self

    def accepts(self, changes: Mapping[str, Any]) -> bool:
        """Whether these changes can be made together."""
        try:
            self.changed(changes)
        except ValueError:
            return False
        return True

    def results(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Entries for the results of a model whose student this stage made, or of an attack; ``facts`` is this stage's manifest."""
        return {}

    def _json(self) -> dict[str, Any]:
        """The settings: every field that is not an input, without optional ones at their default."""
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
    """Converts a setting to JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [as_json(entry) for entry in value] if isinstance(value, (list, tuple)) else value
