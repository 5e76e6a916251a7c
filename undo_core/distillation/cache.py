"""Cache of a teacher's outputs on disk.

The teacher runs once over the sequences; then any number of students, data orders and seeds can be distilled without its trunk.

A cache is a folder of memory-mapped safetensors shards and ``cache.json``. It stores the positions that count (those whose next
token is text), sequence after sequence; sequence ``i`` has the positions ``offsets[i]`` to ``offsets[i + 1]`` (exclusive):

- cached: ``hidden`` ``[positions, d]`` in float32 or bfloat16, and ``lse`` ``[positions]`` float32: ``d * itemsize + 4`` bytes
  per position. The loss is exact for the stored hidden states.
- topk: ``indices`` ``[positions, k]`` int32 and ``logprobs`` ``[positions, k]`` float32: ``8 * k`` bytes per position. The rest
  of the vocabulary counts as one outcome.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from undo_core import ops
from undo_core.checkpoints.files import MappedFile, TensorWriter
from undo_core.data.limits import limits_of
from undo_core.data.sequences import Sequences
from undo_core.distillation.streaming import WeightReader, load_head, weights_digest
from undo_core.distillation.teacher import TeacherConfig
from undo_core.io.files import hash_json, read_json, sync_folder, write_json
from undo_core.io.progress import StageProgress, console
from undo_core.models import Head, check_vocab_size, head_of, hidden_states
from undo_core.models.adapters import adapter_settings, bare
from undo_core.training import Batch
from undo_core.training.identity import config_digest
from undo_core.training.losses import HiddenTargets, TopTargets

FORMAT = 3
FACTS, PROGRESS = "cache.json", "progress.json"
SHARD_BYTES = 2 * 10**9
LOGIT_BYTES = 64 * 2**20  # size of the logits that are ranked at once
BATCH_SIZE = 128
CHECKED_SEQUENCES = 64
STUDENTS = {"near": 0.1, "far from": 1.0}  # noise on the teacher's hidden states, in units of their standard deviation

Column = tuple[torch.dtype, int]  # dtype of a stored tensor, and its entries per position


def cache_teacher(
    teacher: PreTrainedModel,
    sequences: Sequences,
    folder: str | Path,
    config: TeacherConfig | None = None,
    *,
    check: Sequences | None = None,
    shard_bytes: int = SHARD_BYTES,
    checkpoint_seconds: float = 10.0,
    title: str = "cache",
    progress: bool = True,
) -> CachedTeacher:
    """Runs ``teacher`` once over ``sequences`` and stores in ``folder`` the outputs that :func:`undo_core.distill` needs.

    If the call is killed, the same call continues; on a complete cache it does nothing. Every batch is filled up to
    ``batch_size`` sequences, because the bits of a forward pass can depend on its shape. The stored bits equal those of the
    resident teacher if ``batch_size`` is the distillation's micro-batch size and the matrix products of this machine do not
    depend on a sequence's place in the batch. As measured on x86, they do not if ``batch_size`` is a multiple of 16; otherwise
    the last bit can differ. On a GPU the loss uses the stored log-sum-exps instead of computing them again, which can change
    the last bit too.

    Args:
        teacher: model in memory, or streamed (:func:`undo_core.distillation.streaming.stream_model`); put in evaluation mode
            and otherwise unchanged.
        sequences: all sequences that a student will be distilled on; the cache belongs to these sequences in this order.
        folder: a new folder, or one with an unfinished or complete cache of the same teacher, sequences and settings.
        config: kind (cached or topk), dtype, k, batch_size (None for 128).
        check: sequences on which the error of an approximate cache is measured; None for the first sequences of ``sequences``.
        shard_bytes: approximate size of a file.
        checkpoint_seconds: seconds between flushes to disk.
        title: label of the progress bar.
        progress: whether to show the progress bar.

    Memory: the teacher, and the hidden states of one batch (topk: also 64 MiB of logits, and a float32 copy of a 16-bit head).

    Raises:
        ValueError: an invalid argument, or a folder with other contents; nothing is written.
        OSError: too little disk space, found before the start or on the way; finished work is kept.
    """
    config, folder = config or TeacherConfig("cached"), Path(folder)
    if config.kind not in ("cached", "topk"):
        raise ValueError(f"config: got the kind {config.kind}, wanted cached or topk")
    limits = limits_of(teacher)
    limits.check_sequences(sequences, "sequences")
    if check is not None:
        limits.check_sequences(check, "check")
    teacher.eval()
    teacher = bare(teacher)
    head = head_of(teacher)
    identity = _identity(teacher, head, sequences, config)
    check_vocab_size(config.vocab_size, teacher=identity["vocabulary"])
    known = config.vocab_size or identity["vocabulary"]
    if config.kind == "topk" and config.k >= known:
        raise ValueError(f"k: got {config.k}, wanted less than the vocabulary's {known}")
    if not (folder / FACTS).exists():
        work = _Pass(teacher, head, sequences, folder, config, identity, shard_bytes)
        with _DiskFull(folder, work.bytes):
            work.run(checkpoint_seconds, title, progress)
        facts: dict[str, Any] = {"identity": identity, "shards": work.names, "positions": work.total, "bytes": work.bytes}
        if config.kind == "topk" or config.dtype != "float32":
            facts["error"] = _errors(teacher, head, check or sequences, config)
            for name, error in facts["error"].items() if progress else ():
                console.print(f"{title}: {describe_error(name, error)}")
        write_json(folder / FACTS, facts)
        (folder / PROGRESS).unlink()
    found = read_json(folder / FACTS)["identity"]
    _same(found, identity, f"folder: got {folder}, a cache", "wanted a new folder")
    return CachedTeacher(folder, head if config.kind == "cached" else None)


class CachedTeacher:
    """Teacher that reads a cache made by :func:`cache_teacher`; use :meth:`open`, which checks that it is the right cache.

    Attributes:
        vocabulary: number of vocabulary entries of the head.
        vocab_size: number of entries that are real tokens; None if the cache was made with all entries.
        facts: contents of ``cache.json``.

    Memory: the head (cached), and the outputs of one batch.
    """

    def __init__(self, folder: Path, head: Head | None) -> None:
        self.facts = read_json(folder / FACTS)
        identity = self.facts["identity"]
        self.vocabulary, self.kind, self.head = identity["vocabulary"], identity["kind"], head
        self.vocab_size: int | None = identity.get("vocab_size")
        self._columns, self._sequences = _columns(identity), None
        self._shards = [MappedFile(folder / name, read_only=True) for name in self.facts["shards"]]
        counts = [shard.tensor("offsets", torch.int64).clone() for shard in self._shards]
        self._first = torch.tensor([0, *(int(c[-1]) for c in counts)]).cumsum(0)  # index of the first position of each shard
        starts = [offsets[:-1] + first for offsets, first in zip(counts, self._first.tolist(), strict=False)]
        self._offsets = torch.cat([*starts, self._first[-1:]])

    @classmethod
    def open(
        cls, folder: str | Path, head: PreTrainedModel | Head | str | Path | None = None, config: TeacherConfig | None = None
    ) -> CachedTeacher:
        """Opens a complete cache.

        Args:
            folder: folder made by :func:`cache_teacher`.
            head: the teacher or its checkpoint folder, whose weights are all compared with those that the cache was made from,
                and of which only the head is kept; or a head alone. topk needs none, but compares it if given.
            config: expected kind, dtype and k, and vocab_size and batch_size unless these are None; None accepts any cache.

        Raises:
            FileNotFoundError: there is no complete cache in ``folder``.
            ValueError: the cache has another teacher, kind, dtype, k, vocab_size or batch_size than expected.
        """
        folder = Path(folder)
        if not (folder / FACTS).is_file():
            raise FileNotFoundError(f"cache: got {folder}, which has no {FACTS}; wanted a complete cache")
        identity = read_json(folder / FACTS)["identity"]
        if config is not None:
            expected = _form(config) | ({} if config.batch_size is None else _batched(config))
            _same(identity, expected, f"cache: got {folder}, made", "wanted one made as the settings say")
        expected: dict[str, Any] = {}
        if isinstance(head, (str, Path)):
            reader = WeightReader(Path(head))
            expected |= _teacher_identity(reader.model, reader.digest())
            head = load_head(reader)
        elif isinstance(head, torch.nn.Module):
            head = bare(head)
            expected |= _teacher_identity(head, weights_digest(head))
            head = head_of(head)
        if head is not None:
            expected |= _head_identity(head)
        elif identity["kind"] == "cached":
            raise ValueError("head: got None, wanted the teacher, its checkpoint folder or its head, with which it was cached")
        _same(identity, expected, f"cache: got {folder}, made", "wanted the cache of this teacher")
        kept = None if head is None or identity["kind"] == "topk" else dataclasses.replace(head, weight=head.weight.detach())
        return cls(folder, kept)

    def check(self, text: Any) -> None:
        """Raises a ValueError unless ``text`` is the sequences that the cache was made from."""
        if not isinstance(text, Sequences):
            raise ValueError(
                f"text: got {type(text).__name__}, wanted the token sequences (undo_core.data.sequences.Sequences) that the "
                "teacher was cached on; other data needs a resident or streamed teacher"
            )
        got = "text: got sequences that are not those of the cache, which was made"
        _same(self.facts["identity"], _sequences_identity(text), got, "wanted the sequences that it was made from")
        self._sequences = text

    def identity(self) -> dict[str, Any]:
        """Returns the identity of what the cache was made from: teacher, sequences and settings."""
        return dict(self.facts["identity"])

    def targets(self, batch: Batch) -> HiddenTargets | TopTargets:
        """Returns the targets of a batch of the sequences that :meth:`check` accepted."""
        if batch.index is None or self._sequences is None:
            raise ValueError(
                "batch: got one without its sequences' indices, wanted a batch of sequences that `check` was called with"
            )
        ids = self._sequences.input_ids[batch.index]
        mask = self._sequences.text_mask(batch.index)[:, 1:].flatten()
        starts, counts = self._offsets[batch.index], self._offsets[batch.index + 1] - self._offsets[batch.index]
        skipped = starts - (counts.cumsum(0) - counts)
        positions = torch.arange(int(counts.sum())) + skipped.repeat_interleave(counts)
        device, shape = batch.input_ids.device, (len(ids), ids.shape[1] - 1)
        if self.kind == "topk":
            indices, logprobs = self._gather("indices", positions, mask, -1), self._gather("logprobs", positions, mask, 0)
            return TopTargets(_send(indices.view(*shape, -1), device), _send(logprobs.view(*shape, -1), device))
        hidden = _send(self._gather("hidden", positions, mask, 0).view(*shape, -1), device).to(self.head.weight.dtype)
        if device.type == "cpu":  # on a CPU the log-sum-exps save nothing, and would change the last bit
            return HiddenTargets(hidden, self.head)
        return HiddenTargets(hidden, self.head, _send(self._gather("lse", positions, mask, 0).view(shape), device))

    def _gather(self, name: str, positions: torch.Tensor, mask: torch.Tensor, blank: int) -> torch.Tensor:
        """Returns ``[len(mask), ...]``: the stored entries of ``positions`` where ``mask`` is set, ``blank`` elsewhere."""
        dtype = self._columns[name][0]
        first = self._shards[0].tensor(name, dtype)
        packed = torch.empty(len(positions), *first.shape[1:], dtype=dtype)
        home = torch.searchsorted(self._first, positions, right=True) - 1
        for index in home.unique().tolist():
            here, shard = home == index, self._shards[index]
            packed[here] = shard.tensor(name, dtype)[positions[here] - self._first[index]]
            shard.let_go(name)
        out = torch.full((len(mask), *first.shape[1:]), blank, dtype=dtype)
        out[mask] = packed
        return out


@dataclass
class _Pass:
    """One run of the teacher over the sequences, shard by shard."""

    teacher: PreTrainedModel
    head: Head
    sequences: Sequences
    folder: Path
    config: TeacherConfig
    identity: dict[str, Any]
    shard_bytes: int

    def __post_init__(self) -> None:
        self.columns = _columns(self.identity)
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
            found = read_json(record)
            _same(found["identity"], self.identity, f"folder: got {self.folder}, an unfinished cache", "wanted a new folder")
            if found["bounds"] == self.bounds:
                done = found["rows"]
            else:  # shards of another size cannot be continued
                for path in self.folder.iterdir():
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
        return _store(hidden_states(self.teacher, *_inputs(self.sequences, index, ids))[mask], self.head, self.config)


def _allocated(path: Path) -> int:
    """Bytes that a file takes on disk, or its size if the system does not report that (Windows)."""
    stat = path.stat()
    return stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size


class _DiskFull:
    """Context that turns a full disk into a one-line error with the size of the cache."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(
                f"{self.folder}: the disk is full; the teacher's cache takes {self.size:,} bytes in all, and continues from "
                "what is there"
            ) from None


def _store(hidden: torch.Tensor, head: Head, config: TeacherConfig) -> dict[str, torch.Tensor]:
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


def _errors(teacher: PreTrainedModel, head: Head, sequences: Sequences, config: TeacherConfig) -> dict[str, dict[str, float]]:
    """Relative errors of the KL and its gradient for simulated students: the teacher's hidden states plus noise."""
    index = slice(CHECKED_SEQUENCES)
    ids = sequences.input_ids[index].long().to(head.weight.device)
    with torch.no_grad():
        hidden = hidden_states(teacher, *_inputs(sequences, index, ids))[sequences.text_mask(index)[:, 1:].to(ids.device)]
        stored, weight = _store(hidden, head, config), head.weight.detach()
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


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _form(config: TeacherConfig) -> dict[str, Any]:
    size = {} if config.vocab_size is None else {"vocab_size": config.vocab_size}
    return {"kind": config.kind, **({"dtype": config.dtype} if config.kind == "cached" else {"k": config.k}), **size}


def _batched(config: TeacherConfig) -> dict[str, int]:
    """The batch size, as the bits of a forward pass depend on it."""
    return {"batch_size": config.batch_size or BATCH_SIZE}


def _sequences_identity(sequences: Sequences) -> dict[str, Any]:
    return {"length": sequences.length, "rows": sequences.digest()}


def _head_identity(head: Head) -> dict[str, Any]:
    parts = [p for p in (head.weight, head.bias) if p is not None]
    digests = [hashlib.sha256(p.detach().float().cpu().contiguous().numpy()).hexdigest() for p in parts]
    dtype = str(head.weight.dtype).removeprefix("torch.")
    return {"head": hash_json([digests, head.scale, head.softcap]), "head_dtype": dtype, "vocabulary": head.weight.shape[0]}


def _teacher_identity(teacher: PreTrainedModel, weights: str) -> dict[str, Any]:
    adapters = adapter_settings(teacher)
    return {"teacher": weights, "config": config_digest(teacher.config), "adapters": hash_json(adapters) if adapters else None}


def _identity(teacher: PreTrainedModel, head: Head, sequences: Sequences, config: TeacherConfig) -> dict[str, Any]:
    """Everything that decides the contents of a cache, as JSON values."""
    known = {"format": FORMAT, **_form(config), **_batched(config), **_head_identity(head)}
    known |= _teacher_identity(teacher, weights_digest(teacher))
    return {**known, "hidden_size": head.weight.shape[1], **_sequences_identity(sequences)}


def _columns(identity: dict[str, Any]) -> dict[str, Column]:
    if identity["kind"] == "topk":
        return {"indices": (torch.int32, identity["k"]), "logprobs": (torch.float32, identity["k"])}
    return {"hidden": (getattr(torch, identity["dtype"]), identity["hidden_size"]), "lse": (torch.float32, 1)}


def _same(found: dict[str, Any], wanted: dict[str, Any], got: str, end: str) -> None:
    """Raises a ValueError that names the first entry of ``wanted`` that differs in ``found``.

    The teacher's weights are compared first, because a different head follows from them.
    """
    words = {
        "teacher": "another teacher's weights",
        "rows": "other sequences",
        "head": "another head",
        "head_dtype": "a head of",
        "config": "another model configuration",
        "adapters": "other settings of the adapters",
    }
    for name in dict.fromkeys(("teacher", *wanted)):
        if name in wanted and found.get(name) != wanted[name]:
            value = wanted[name]
            a, b = (str(v)[:12] for v in (found.get(name), value))
            raise ValueError(f"{got} with {words.get(name, name)} {a}; {end}, {name} {b}")
