"""What decides the contents of a teacher's cache, and how two of them are compared."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel

from undo_core.data.sequences import Sequences
from undo_core.distillation.streaming import weights_digest
from undo_core.distillation.teacher import TeacherConfig
from undo_core.io.files import hash_json
from undo_core.models import Head
from undo_core.models.adapters import adapter_settings
from undo_core.training.identity import config_digest

FORMAT = 3
BATCH_SIZE = 128

Column = tuple[torch.dtype, int]  # dtype of a stored tensor, and its entries per position


def form_of(config: TeacherConfig) -> dict[str, Any]:
    size = {} if config.vocab_size is None else {"vocab_size": config.vocab_size}
    return {"kind": config.kind, **({"dtype": config.dtype} if config.kind == "cached" else {"k": config.k}), **size}


def batch_of(config: TeacherConfig) -> dict[str, int]:
    """The batch size, as the bits of a forward pass depend on it."""
    return {"batch_size": config.batch_size or BATCH_SIZE}


def sequences_identity(sequences: Sequences) -> dict[str, Any]:
    return {"length": sequences.length, "rows": sequences.digest()}


def head_identity(head: Head) -> dict[str, Any]:
    parts = [p for p in (head.weight, head.bias) if p is not None]
    digests = [hashlib.sha256(p.detach().float().cpu().contiguous().numpy()).hexdigest() for p in parts]
    dtype = str(head.weight.dtype).removeprefix("torch.")
    return {"head": hash_json([digests, head.scale, head.softcap]), "head_dtype": dtype, "vocabulary": head.weight.shape[0]}


def teacher_identity(teacher: PreTrainedModel, weights: str) -> dict[str, Any]:
    adapters = adapter_settings(teacher)
    return {"teacher": weights, "config": config_digest(teacher.config), "adapters": hash_json(adapters) if adapters else None}


def identity_of(teacher: PreTrainedModel, head: Head, sequences: Sequences, config: TeacherConfig) -> dict[str, Any]:
    """Everything that decides the contents of a cache, as JSON values."""
    known = {"format": FORMAT, **form_of(config), **batch_of(config), **head_identity(head)}
    known |= teacher_identity(teacher, weights_digest(teacher))
    return {**known, "hidden_size": head.weight.shape[1], **sequences_identity(sequences)}


def columns_of(identity: dict[str, Any]) -> dict[str, Column]:
    if identity["kind"] == "topk":
        return {"indices": (torch.int32, identity["k"]), "logprobs": (torch.float32, identity["k"])}
    return {"hidden": (getattr(torch, identity["dtype"]), identity["hidden_size"]), "lse": (torch.float32, 1)}


def require_same(found: dict[str, Any], wanted: dict[str, Any], got: str, end: str) -> None:
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
