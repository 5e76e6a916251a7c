"""Helpers of the commands that run a single stage: they check the input folders and build the output folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from safetensors import safe_open

from undo_core import distributed
from undo_core.checkpoints.files import read_header
from undo_core.io.progress import console
from undo_core.io.untrusted import Facts, refused
from undo_core.models.folder import check_checkpoint, weight_files
from undo_core.noise.model import TensorNoise, by_kind
from undo_core.pipeline.stage import Stage
from undo_core.pipeline.stages.noise import left_line
from undo_core.pipeline.store import OneFolder


def build(output: str | Path, stage: Stage, quiet: bool = False) -> Facts:
    """Builds the folder ``output`` by running ``stage``, whose inputs are folders, and returns its manifest.

    An ``output`` that was made from the same inputs and settings is kept.

    Raises:
        FileNotFoundError: an input folder holds no checkpoint, or no prepared data.
        FileExistsError: ``output`` exists and was made from other inputs or settings.
    """
    for name, folder in stage.inputs.items():
        if name == "prepared":
            check_prepared(folder.path)
        elif not folder.names:
            check_checkpoint(name, folder.path)
            check_finite(name, folder.path)
    stage.check_ranks(distributed.count())
    output, store = Path(output), OneFolder(Path(output))
    known = distributed.on_first(lambda: store.done(stage))
    distributed.on_first(store.tidy)
    store.ensure(stage)
    if not quiet:
        console.print(f"{output}: already there, made from the same inputs and settings" if known else str(output))
    return store.manifest(stage)


def check_finite(name: str, folder: Path) -> None:
    """Raises a ValueError that begins with ``name`` if a weight is NaN or infinite: such a model would score as one that forgot."""
    for path in weight_files(folder):
        with refused(f"{name}: got {folder}, of which a file may be cut off"):
            read_header(path)
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118, it cannot be iterated
                tensor = file.get_tensor(key)
                wide = tensor.float() if tensor.itemsize == 1 else tensor  # isfinite knows no float8
                if not wide.isfinite().all():
                    raise ValueError(f"{name}: got {folder}, whose {key} holds NaN or infinity; wanted finite weights")


def check_prepared(folder: Path) -> None:
    """Raises a FileNotFoundError unless ``folder`` holds prepared data."""
    if not (folder / "data").is_dir():
        raise FileNotFoundError(f"data: got {folder}, which has no data/; wanted a folder made by `undo prepare`")


def print_noise(facts: Mapping[str, Any]) -> None:
    """Prints what the noise did, a line for all tensors whose names differ only in numbers; the manifest lists each tensor."""
    names = [field.name for field in dataclasses.fields(TensorNoise)]
    tensors = {name: TensorNoise(**{key: norms[key] for key in names}) for name, norms in facts["tensors"].items()}
    table = Table(box=None, pad_edge=False)
    for heading in ("parameters", "n", "before", "after", "shrink", "noise"):
        table.add_column(heading, justify="left" if heading == "parameters" else "right", overflow="fold")
    for kind, (count, total) in by_kind(tensors).items():
        shares = (f"{share:.1%}" for share in (total.shrink, total.noise))
        table.add_row(kind, str(count), f"{total.before:.4g}", f"{total.after:.4g}", *shares)
    console.print("Frobenius norms before and after; shares of shrinkage and of noise in the change")
    console.print(table)
    print_left(facts)


def print_left(facts: Mapping[str, Any]) -> None:
    """Prints which parameters the damage did not change; the manifest lists each name."""
    if said := left_line(facts):
        console.print(f"left as they were: {said}")
