"""The run of a teacher over all sequences that writes its cache, and the error of a cache that stores less than everything."""

from __future__ import annotations

import errno
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from undo_core import ops
from undo_core.checkpoints.files import TensorWriter
from undo_core.data.sequences import Sequences
from undo_core.distillation.cache_identity import columns_of, require_same
from undo_core.distillation.teacher import TeacherConfig
from undo_core.io.files import sync_folder, write_json
from undo_core.io.progress import StageProgress
from undo_core.io.untrusted import read_object
from undo_core.models import Head, hidden_states

PROGRESS = "progress.json"
LOGIT_BYTES = 64 * 2**20  # size of the logits that are ranked at once
CHECKED_SEQUENCES = 64
STUDENTS = {"near": 0.1, "far from": 1.0}  # noise on the teacher's hidden states, in units of their standard deviation


@dataclass
class CacheWriter:
    """One run of the teacher over the sequences, shard by shard."""

    teacher: PreTrainedModel
    head: Head
    sequences: Sequences
    folder: Path
    config: TeacherConfig
    identity: dict[str, Any]
    shard_bytes: int

    def __post_init__(self) -> None:
        self.columns = columns_of(self.identity)
        counts = (self.sequences.lengths.long() - 1).clamp_min(0)
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        self.total = int(self.offsets[-1])
        if self.total == 0:
            raise ValueError("sequences: got no position that counts, wanted at least one token after another")
        self.position_bytes = sum(dtype.itemsize * width for dtype, width in self.columns.values())
        self.bounds = [0]
        while self.bounds[-1] < len(self.sequences):
            room = self.offsets[self.bounds[-1]] + self.shard_bytes // self.position_bytes
            last = int(torch.searchsorted(self.offsets, room, right=True)) - 1
            self.bounds.append(min(max(last, self.bounds[-1] + 1), len(self.sequences)))
        count = len(self.bounds) - 1
        self.names = [f"{self.config.kind}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        self.bytes = self.total * self.position_bytes + 8 * (len(self.sequences) + count) + 1024 * count

    def run(self, checkpoint_seconds: float, title: str, progress: bool) -> None:
        done = self._begin()
        size = self.identity["batch_size"]
        with StageProgress(title, len(self.sequences), start=done, enabled=progress) as bar:
            for index, name in enumerate(self.names):
                first, last = self.bounds[index : index + 2]
                if done >= last or (self.folder / name).exists():  # finished, but killed before the record
                    continue
                shard = TensorWriter(self.folder / f".{name}.partial", self._layout(first, last), keep=done > first)
                saved = time.monotonic()
                with shard:
                    for start in range(max(first, done), last, size):
                        end = min(start + size, last)
                        for column, values in self._outputs(start, end, size).items():
                            shard.write(column, int(self.offsets[start] - self.offsets[first]), values)
                        bar.update(end, int(self.offsets[end] - self.offsets[start]), None)
                        if end < last and time.monotonic() - saved > checkpoint_seconds:
                            shard.flush()
                            self._save(end)
                            saved = time.monotonic()
                    shard.write("offsets", 0, self.offsets[first : last + 1] - self.offsets[first])
                    shard.flush()
                os.replace(shard.path, self.folder / name)
                sync_folder(self.folder)
                self._save(last)

    def _begin(self) -> int:
        """Returns the number of sequences already stored; raises if the folder has other contents or the disk is too small."""
        record = self.folder / PROGRESS
        done = 0
        if record.exists():
            found = read_object(record, identity=dict, bounds=[int], rows=int)
            require_same(
                found["identity"], self.identity, f"folder: got {self.folder}, an unfinished cache", "wanted a new folder"
            )
            if found["bounds"] == self.bounds and 0 <= found["rows"] <= len(self.sequences):
                done = found["rows"]
            else:  # shards of another size cannot be continued; if this is killed, no call takes the record for shards that are gone
                write_json(record, {"identity": self.identity, "bounds": [], "rows": 0})
                for path in self.folder.iterdir():
                    if path != record:
                        path.unlink()
        elif self.folder.exists() and any(not path.name.endswith(".tmp") for path in self.folder.iterdir()):
            raise ValueError(f"folder: got {self.folder}, which holds something else; wanted a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(".*.tmp"):  # left by a kill within a write
            path.unlink()
        there = sum(_allocated(path) for path in self.folder.iterdir())
        needed, free = max(0, self.bytes - there), shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{self.folder}: the teacher's cache needs {needed:,} bytes ({self.total:,} positions of "
                f"{self.position_bytes:,}) and the disk has {free:,} free"
            )
        self._save(done)
        return done

    def _save(self, sequences: int) -> None:
        write_json(self.folder / PROGRESS, {"identity": self.identity, "bounds": self.bounds, "rows": sequences})

    def _layout(self, first: int, last: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        count = int(self.offsets[last] - self.offsets[first])
        shapes = {n: (dtype, (count,) if n == "lse" else (count, width)) for n, (dtype, width) in self.columns.items()}
        return {"offsets": (torch.int64, (last - first + 1,)), **shapes}

    @torch.no_grad()
    def _outputs(self, start: int, end: int, size: int) -> dict[str, torch.Tensor]:
        """Returns the stored form of sequences ``start`` to ``end``, from a batch filled up with others to ``size``."""
        index = torch.arange(start, start + size) % len(self.sequences)
        ids = self.sequences.input_ids[index].long().to(self.head.weight.device)
        mask = self.sequences.text_mask(index)[:, 1:].to(ids.device)
        mask[end - start :] = False
        return stored_form(hidden_states(self.teacher, *_inputs(self.sequences, index, ids))[mask], self.head, self.config)


def _allocated(path: Path) -> int:
    """Bytes that a file takes on disk, or its size if the system does not report that (Windows)."""
    stat = path.stat()
    return stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size


class DiskFull:
    """Context that turns a full disk into a one-line error with the size of the cache."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(
                f"{self.folder}: the disk is full; the teacher's cache takes {self.size:,} bytes in all. Free some space, and "
                "the same command continues from what is there"
            ) from None


def stored_form(hidden: torch.Tensor, head: Head, config: TeacherConfig) -> dict[str, torch.Tensor]:
    """Returns the stored columns for hidden states ``[positions, d]``."""
    if config.kind == "cached":
        stored = hidden.to(getattr(torch, config.dtype))
        lse = ops.linear_lse(stored.to(head.weight.dtype), head.weight, vocab_size=config.vocab_size, **head.options())
        return {"hidden": stored, "lse": lse.float()}
    indices, logprobs, size = [], [], config.vocab_size
    weight, bias = head.weight[:size].float().T, None if head.bias is None else head.bias[:size].float()
    for part in hidden.split(max(1, LOGIT_BYTES // (4 * head.weight.shape[0]))):
        logits = part.float() @ weight
        if bias is not None:
            logits += bias
        logits *= head.scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        values, index = logits.topk(config.k, dim=-1)
        indices.append(index.int())
        logprobs.append(values - logits.logsumexp(-1, keepdim=True))
    return {"indices": torch.cat(indices), "logprobs": torch.cat(logprobs)}


def errors_of(teacher: PreTrainedModel, head: Head, sequences: Sequences, config: TeacherConfig) -> dict[str, dict[str, float]]:
    """Relative errors of the KL and its gradient for simulated students: the teacher's hidden states plus noise."""
    index = slice(CHECKED_SEQUENCES)
    ids = sequences.input_ids[index].long().to(head.weight.device)
    with torch.no_grad():
        hidden = hidden_states(teacher, *_inputs(sequences, index, ids))[sequences.text_mask(index)[:, 1:].to(ids.device)]
        stored, weight = stored_form(hidden, head, config), head.weight.detach()
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    sides = {**head.options("student_"), **head.options("teacher_")}

    def exact(student: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        options = {k: _detached(v) for k, v in sides.items()}
        return ops.linear_kl_div(student, weight, known, weight, vocab_size=config.vocab_size, **options)

    def approximate(student: torch.Tensor) -> torch.Tensor:
        if config.kind == "cached":
            return exact(student, stored["hidden"].to(weight.dtype))
        options = {name: _detached(value) for name, value in head.options().items()} | {"vocab_size": config.vocab_size}
        return ops.linear_sparse_kl_div(student, weight, stored["indices"], stored["logprobs"], tail="bucket", **options)

    errors = {}
    for name, amount in STUDENTS.items():
        student = (hidden + amount * hidden.std() * noise).requires_grad_()
        values = [exact(student, hidden), approximate(student)]
        true, got = (torch.autograd.grad(value, student)[0].double() for value in values)
        kl, other = (float(value.detach()) for value in values)
        errors[name] = {
            "positions": len(hidden),
            "kl": kl,
            "kl_error": abs(other - kl) / max(kl, 1e-12),
            "gradient_error": float((got - true).norm() / true.norm().clamp_min(1e-30)),
        }
    return errors


def describe_error(name: str, error: dict[str, float]) -> str:
    """Describes an entry of a cache's ``error`` in words."""
    return (
        f"for a student {name} its teacher (KL {error['kl']:.3g}) the stored KL is off by {error['kl_error']:.2g} and its "
        f"gradient by {error['gradient_error']:.2g} (relative, {error['positions']} positions)"
    )


def _inputs(
    sequences: Sequences, index: torch.Tensor | slice, ids: torch.Tensor
) -> tuple[torch.Tensor, None, torch.Tensor | None]:
    """Inputs of the teacher for the sequences ``index`` with ids ``ids``, without the last token, which is only a label."""
    positions = sequences.position_ids(index)
    return ids[:, :-1], None, None if positions is None else positions[:, :-1].to(ids.device)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
