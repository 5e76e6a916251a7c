"""Draws, tokenises and splits the data; builds the tokenizer and initialises the model, or copies those of a checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from undo_core.checkpoints.files import stored_dtype
from undo_core.data.config import DataConfig
from undo_core.data.limits import Limits
from undo_core.data.questions import each_question
from undo_core.data.reading import read_documents
from undo_core.data.splits import make_splits
from undo_core.io.files import hash_file
from undo_core.io.progress import console
from undo_core.io.text_files import check_is_content
from undo_core.models import build_model, configuration, load_model, positions_of
from undo_core.models.config import ModelConfig
from undo_core.models.folder import CONFIG, INDEX, SINGLE, TOKENIZER_FILES, check_checkpoint, named_weight_files
from undo_core.pipeline.config import seeded
from undo_core.pipeline.model_stage import save
from undo_core.pipeline.needs import Memory
from undo_core.pipeline.stage import Stage, Work

if TYPE_CHECKING:
    from undo_core.pipeline.memory.meta import Meta


@dataclass(frozen=True, kw_only=True)
class Prepare(Stage):
    """Prepares the data and the model that reads them.

    Attributes:
        data: what is retained and what is forgotten, with a seed.
        model: an architecture to initialise, or a checkpoint, with a seed.
        files: SHA-256 of every file that is read, by path: text, checkpoint and tokenizer.
    """

    kind = "prepare"
    model_from = None
    data: DataConfig
    model: ModelConfig
    files: dict[str, str]

    def _json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self.data)
        later = {"questions": not self.data.questions, "beginning": self.data.beginning == "documents"}
        for name in (name for name, unused in later.items() if unused):  # keeps the keys of runs made before they existed
            del data[name]
        return {**super()._json(), "data": data}

    def run(self, work: Work) -> dict[str, Any]:
        settings = self.settings["model"]
        path, expected = self.model.path, configuration(settings)
        tokenizer, splits, cut = make_splits(self.settings["data"], positions_of(expected))
        limits = Limits(expected.get_text_config().vocab_size if path else len(tokenizer), positions_of(expected))
        for name, sequences in splits.items():
            limits.check_sequences(sequences, f"data ({name})")
        if path:
            model = load_model(path, stored_dtype(Path(path)))
            for name, parameter in model.named_parameters():
                if not parameter.isfinite().all():  # it would score as a model that forgot
                    raise ValueError(f"model.path: got {path}, whose {name} holds NaN or infinity; wanted finite weights")
        else:
            model = build_model(self.model.config, tokenizer, self.model.seed)
        (work.output / "data").mkdir()
        for name, sequences in splits.items():
            sequences.save(work.output / "data" / f"{name}.safetensors")
        save(model, tokenizer, work.output)
        for name, digest in self.files.items():
            if hash_file(Path(name)) != digest:  # the key would name what was not read
                raise ValueError(
                    f"{name}: changed while it was read, wanted a file that stays the same; the same command reads the new one"
                )
        facts = {
            name: {"rows": len(sequences), "length": sequences.length, "tokens": sequences.tokens()}
            for name, sequences in splits.items()
        }
        for name, count in cut.items():
            facts[name]["truncated"] = count
            if count:
                console.print(
                    f"{work.title}: {count} of {len(splits[name])} questions of {name} are cut at their beginning to fit the "
                    "model"
                )
        return {"parameters": sum(p.numel() for p in model.parameters()), "splits": facts}

    def stored(self) -> torch.dtype:
        """Dtype of the checkpoint's weights; float32 if there is no checkpoint or its weights are missing."""
        path = self.model.path and Path(self.model.path)
        there = path and any((path / name).is_file() for name in (INDEX, SINGLE))
        return stored_dtype(path) if there else torch.float32

    def memory(self, meta: Meta) -> list[Memory]:
        if not self.model.path:
            return [Memory("loading", weights=4 * meta.elements)]
        return [Memory("loading", weights=meta.stored.itemsize * meta.elements + meta.reading(meta.stored))]


def prepare_stage(data: DataConfig, model: ModelConfig, seed: int) -> Prepare:
    """Returns the stage for these settings; missing seeds are derived from ``seed``.

    The content of every file that is read is part of the key. Data streamed from the Hugging Face Hub (``hf://``) cannot be
    hashed: only their name is part of the key, so a data set that changes on the hub is not read again.

    Raises:
        FileNotFoundError: a data file, the checkpoint folder or the tokenizer folder is missing.
        ValueError: one of the files is only a Git LFS pointer.
    """
    data, model = seeded(data, seed, "data"), seeded(model, seed, "model")
    files = []
    for key, source in data.sources():
        if "://" in source:
            continue
        if not Path(source).is_file():
            raise FileNotFoundError(f"{key}: got {source}, which is not a file; wanted a file or hf://NAME")
        files.append(Path(source))
    if model.path:
        checkpoint = Path(model.path)
        check_checkpoint("model.path", checkpoint)
        files += [checkpoint / CONFIG, *(path for path in named_weight_files(checkpoint) if path.is_file())]
    if data.tokenizer and not Path(data.tokenizer).is_dir():
        raise FileNotFoundError(
            f"data.tokenizer: got {data.tokenizer}, which is not a folder; wanted one with a tokenizer's files"
        )
    data = dataclasses.replace(data, tokenizer=data.tokenizer or model.path)
    if data.tokenizer:
        files += sorted({path for name in TOKENIZER_FILES for path in Path(data.tokenizer).glob(name) if path.is_file()})
    for path in files:
        check_is_content(path)
    check_first_records(data)
    return Prepare(data=data, model=model, files={str(path): hash_file(path) for path in files}, title="prepare")


def check_first_records(data: DataConfig) -> None:
    """Reads the first document or question of each file, so that a file of the wrong form is refused before any work.

    Raises:
        ValueError, ImportError: as :func:`undo_core.data.reading.read_documents` and :func:`undo_core.data.questions.read_questions`.
    """
    for key, source in data.sources() if data.kind == "text" else ():
        if "://" not in source:
            next(each_question(source) if key.startswith("data.questions.") else read_documents([source]), None)
