"""Runs the teacher once over the distillation data and stores the outputs that students need."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from undo_core import ops
from undo_core.distillation.cache import cache_teacher
from undo_core.distillation.cache_identity import BATCH_SIZE
from undo_core.distillation.cache_writer import LOGIT_BYTES
from undo_core.distillation.streaming import stream_model
from undo_core.distillation.teacher import TeacherConfig
from undo_core.io.untrusted import read_object
from undo_core.models import forward_flops, head_of, hidden_states, load_model
from undo_core.pipeline.model_stage import ModelStage
from undo_core.pipeline.needs import Cost, Memory, Scene
from undo_core.pipeline.prepared import distill_sequences, heldout_sequences, load_split, retain_performance
from undo_core.pipeline.stage import MANIFEST, Folder, Stage, Work

if TYPE_CHECKING:
    from undo_core.pipeline.memory.meta import Meta


@dataclass(frozen=True, kw_only=True)
class Cache(ModelStage):
    """Stores a teacher's outputs on disk.

    Attributes:
        config: kind (cached or topk), dtype, k, batch size, vocabulary size.
        streamed: whether the teacher's layers are read from disk in each forward pass.
        teacher: the unlearned model.
    """

    kind = "cache"
    time_from = "data.tokens"
    model_from = "teacher"
    own_text = True
    config: TeacherConfig
    streamed: bool = False
    teacher: Stage | Folder

    def _json(self) -> dict[str, Any]:
        return {**self.config.settings(), **({"streamed": True} if self.streamed else {})}

    def run(self, work: Work) -> dict[str, Any]:
        model = (stream_model if self.streamed else load_model)(work.inputs["teacher"])
        data = work.inputs["prepared"]
        text, scored = distill_sequences(data), load_split(data, "valid_retain")
        scratch = work.scratch / "cache"
        cached = cache_teacher(model, text, scratch, self.config, check=heldout_sequences(data, "retain"), title=work.title)
        for path in sorted(scratch.iterdir()):
            try:
                # A hard link keeps the cache in scratch, in case the process is killed before the folder is published.
                os.link(path, work.output / path.name)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, work.output / path.name)
        flops = forward_flops(model, text.length) * text.input_ids.numel()
        return {**cached.facts, "flops": flops, "retain": retain_performance(model, data), "retain_rows": scored.digest()}

    def memory(self, meta: Meta) -> list[Memory]:
        model = meta.model()
        share = meta.streamed_share(model) if self.streamed else 1.0
        file = meta.mapped * meta.largest if self.streamed else meta.reading(torch.float32)
        loading = Memory("loading", weights=file, teacher=int(share * 4 * meta.elements))
        meta.hold(model.eval().parameters(), "teacher", share)
        with meta.counted("forward"), torch.no_grad():
            inputs, _, _ = meta.batch(self.config.batch_size or BATCH_SIZE).shifted()
            hidden, head = hidden_states(model, *inputs).flatten(0, 1), head_of(model)
            if self.config.kind == "topk":
                meta.touch("workspace", min(LOGIT_BYTES, 4 * len(hidden) * head.weight.shape[0]) * 3)
            else:
                ops.linear_lse(hidden, head.weight, vocab_size=self.config.vocab_size, **head.options())
            del hidden
            meta.evaluate(model)
        return [loading, *meta.peaks()]

    def cost(self, scene: Scene) -> Cost:
        """A forward pass over the distillation data; on disk, the hidden state or the most likely tokens of each token."""
        batch_size, positions = self.config.batch_size, scene.sequences * scene.length
        if self.config.kind == "topk":
            stored = 8 * self.config.k
        else:
            width = scene.model.config.get_text_config().hidden_size
            stored = width * getattr(torch, self.config.dtype).itemsize + 4
        return Cost(
            disk=scene.sequences * (scene.length - 1) * stored,
            steps=-(-scene.sequences // batch_size),
            sequences=batch_size,
            passes=1,
            positions=positions,
            flops=forward_flops(scene.model, scene.length) * positions,
        )


def cached_retain(cache: Path, data: Path) -> float:
    """Returns the teacher's retain performance, which was measured when the cache was made.

    Raises:
        ValueError: the cache was made with other validation sequences.
    """
    facts = read_object(cache / MANIFEST, retain_rows=str, retain=float)
    if facts["retain_rows"] != load_split(data, "valid_retain").digest():
        raise ValueError(
            f"cache: got {cache}, made with other validation sequences than {data} has; wanted a cache made from the same data"
        )
    return facts["retain"]
