"""The parameters of a checkpoint on disk, a few tensors at a time, as the model in memory would have them; read, or changed in a copy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from undo_kernels.ops.noise_rules import NoiseRule

from undo_core.checkpoints.files import (
    INDEX,
    SINGLE,
    MappedFile,
    checkpoint_skeleton,
    groups,
    read_header,
    to_disk,
    to_memory,
    weight_files,
)
from undo_core.io.progress import StageProgress
from undo_core.noise.parameters import Parts, select

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".ckpt", ".onnx")
NOT_COPIED = ("manifest.json", "log.jsonl")  # they tell how the source was made


class CheckpointParameters:
    """The parameters of the checkpoint folder ``source``: names on disk are mapped to names in memory through a model on the meta
    device, also where transformers renames or stacks tensors on load.

    Args:
        source: a Hugging Face checkpoint folder.
        parts: of a model of text and other modalities: text, or all.
        rules: of the noise, where there are some.

    Attributes:
        model: on the meta device.
        chosen: what :func:`undo_core.noise.parameters.select` says of it. What is left is copied as it is.
        parameters: what decides the damage of each parameter, by canonical name; tied ones once.

    Memory: the largest tensor; three times the largest parameter that transformers puts together from several tensors.

    Raises:
        ValueError: a tensor that is no float or has no place in the model.
        FileNotFoundError: no safetensors file.
    """

    def __init__(self, source: Path, parts: Parts = "text", rules: Sequence[NoiseRule] = ()) -> None:
        self.source, self.model = source, checkpoint_skeleton(source)
        self._files = {path: read_header(path) for path in weight_files(source)}
        self.chosen = select(self.model, parts, rules)
        self.parameters = self.chosen.parameters
        first = {id(tensor): name for name, (tensor, _) in self.chosen.found.items()}
        pairs = self.model.named_parameters(remove_duplicate=False)
        self._names = {name: first[id(tensor)] for name, tensor in pairs if id(tensor) in first}
        self._groups = groups(self.model, self._files)
        for group in self._groups:
            for name, path in group.files.items():
                if self._files[path][name].dtype is None and any(parameter in self._names for parameter in group.parameters):
                    raise ValueError(
                        f"model: got {name}, which is no float tensor; wanted float32, bfloat16, float16 or float64"
                    )

    def read(self, title: str, progress: bool = True) -> Iterator[dict[str, torch.Tensor]]:
        """A few parameters at a time by canonical name; what is written to them is lost."""
        mapped = {path: MappedFile(path, read_only=True) for path in self._files}
        yield from self._each(mapped, False, title, progress)

    def edit(self, output: Path, title: str, progress: bool = True) -> Iterator[dict[str, torch.Tensor]]:
        """A few parameters of a copy at a time; what is written to them before the next are asked for is written to the copy.

        Each file is copied to the existing, empty folder ``output`` and its tensors are changed where they lie, so everything else in it
        stays as it is; weights in other formats are left out.
        """
        unread = {path.name for path in self._files} == {SINGLE}
        for path in sorted(self.source.iterdir()):
            # Undamaged weights must not come along, nor an index that transformers does not read.
            other_weights = (path.suffix in WEIGHTS or (path.name == INDEX and unread)) and path not in self._files
            if path.is_file() and path.name not in NOT_COPIED and not other_weights:
                shutil.copyfile(path, output / path.name)
        mapped = {path: MappedFile(output / path.name) for path in self._files}
        yield from self._each(mapped, True, title, progress)
        for file in mapped.values():
            file.flush()

    def _each(
        self, mapped: dict[Path, MappedFile], write: bool, title: str, progress: bool
    ) -> Iterator[dict[str, torch.Tensor]]:
        sizes = {name: entry.end - entry.start for entries in self._files.values() for name, entry in entries.items()}
        total, done = sum(sizes.values()) >> 20, 0
        with StageProgress(title, total, enabled=progress, unit="MB") as bar:
            for group in self._groups:
                if any(parameter in self._names for parameter in group.parameters):
                    tensors = {name: mapped[path].tensor(name) for name, path in group.files.items()}
                    parameters = to_memory(self.model, group, tensors)
                    yield {self._names[name]: tensor for name, tensor in parameters.items() if name in self._names}
                    if write and group.converter is not None:
                        for name, tensor in to_disk(self.model, group, parameters).items():
                            tensors[name].copy_(tensor)
                for name, path in group.files.items():
                    mapped[path].let_go(name)
                size = sum(sizes[name] for name in group.files)
                done += size
                bar.update(done >> 20, size >> 20, None)
