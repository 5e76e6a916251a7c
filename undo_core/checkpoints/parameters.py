"""Reads a checkpoint's parameters a few at a time, as the model in memory would have them, or edits them in a copy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from undo_core.checkpoints.files import MappedFile, groups, read_header, to_disk, to_memory
from undo_core.io.progress import StageProgress
from undo_core.models.folder import INDEX, SINGLE, weight_files

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".ckpt", ".onnx")
NOT_COPIED = ("manifest.json", "log.jsonl")  # they describe how the source was made, not the copy


class CheckpointParameters:
    """The parameters of a checkpoint folder, read or edited without loading the model.

    A model on the meta device maps names on disk to names in memory, also where transformers renames or stacks tensors on load.

    Args:
        source: a Hugging Face checkpoint folder.
        model: the checkpoint's model on the meta device, from :func:`undo_core.checkpoints.files.checkpoint_skeleton`.
        chosen: the parameters of ``model`` to read or edit, by the names under which they are yielded; a tied parameter appears
            once. The others are skipped, or copied unchanged.

    Memory: the largest tensor; three times the largest parameter that transformers puts together from several tensors.

    Raises:
        ValueError: a chosen tensor is not floating-point, or the model has no place for a tensor.
        FileNotFoundError: the folder has no safetensors file.
    """

    def __init__(self, source: Path, model: PreTrainedModel, chosen: Mapping[str, torch.Tensor]) -> None:
        self.source, self.model = source, model
        self._files = {path: read_header(path) for path in weight_files(source)}
        first = {id(tensor): name for name, tensor in chosen.items()}
        pairs = self.model.named_parameters(remove_duplicate=False)
        self._names = {name: first[id(tensor)] for name, tensor in pairs if id(tensor) in first}
        self._groups = groups(self.model, self._files)
        for group in self._groups:
            for name, path in group.files.items():
                if self._files[path][name].dtype is None and any(parameter in self._names for parameter in group.parameters):
                    raise ValueError(
                        f"model: got {name}, which is not a floating-point tensor; wanted float32, bfloat16, float16 or float64"
                    )

    def read(self, title: str, progress: bool = True) -> Iterator[dict[str, torch.Tensor]]:
        """Yields a few chosen parameters at a time, by name; changes to them are lost."""
        mapped = {path: MappedFile(path, read_only=True) for path in self._files}
        yield from self._each(mapped, False, title, progress)

    def edit(self, output: Path, title: str, progress: bool = True) -> Iterator[dict[str, torch.Tensor]]:
        """Yields a few chosen parameters of a copy at a time; in-place changes made before the next step go to the copy.

        Every file is copied to the existing, empty folder ``output``, and the tensors are changed inside the copied files, so
        that everything else in them stays as it is. Weights in other formats, manifest and log are not copied.
        """
        unread = {path.name for path in self._files} == {SINGLE}
        for path in sorted(self.source.iterdir()):
            # The copy must not contain unedited weights, nor an index that transformers does not read.
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
