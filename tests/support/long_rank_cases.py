"""What the long tests of several ranks share: other settings, a run that can be stopped, a stage whose peak is measured, and a config."""

import ctypes
import dataclasses

import torch
from rank_cases import CONFIG, pretraining, sequences
from stage_kinds import NOWHERE

from undo_core import distributed
from undo_core.data.sequences import Sequences
from undo_core.distillation.student import distill
from undo_core.distributed import ParallelConfig
from undo_core.distributed.sharding import whole_state
from undo_core.evaluation.metrics import evaluate
from undo_core.io.memory_use import peak_bytes, reset_peak, resident_bytes
from undo_core.models import initialise
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.stages import Distill, Pretrain
from undo_core.training import TrainConfig
from undo_core.training.batches import SequenceSource

CHANGES = {
    "whole": {},
    "micro-batches": {"micro_batch_size": 5, "batch_size": 15},
    "checkpointing": {"activation_checkpointing": True},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16-master": {"precision": "bfloat16-master"},
}
CONFIGS = {name: dataclasses.replace(CONFIG, **changes) for name, changes in CHANGES.items()}
# A 16-bit gradient is rounded once for each rank and micro-batch, and the parts are larger than their sum.
BOUNDS = {name: 2**-5 if "bfloat16" in name else 4e-6 for name in CHANGES}


class Until(SequenceSource):
    """A source that ends the run at a step."""

    last: int

    def __call__(self, step):
        if step == self.last:
            raise KeyboardInterrupt
        return super().__call__(step)


CURVE = TrainConfig(steps=9, batch_size=12, micro_batch_size=6, lr=1e-2, eps=1e-2, clip=0.5, eval_every=3, seed=1)


def curve(build, folder, tensor=1, last=None):
    """Trains the model that ``build`` makes to step ``last`` or to the end, from where ``folder`` stands; returns weights and history."""
    distributed.arrange(ParallelConfig(tensor))
    model, source = build(), Until(sequences(), CURVE.batch_size, 0)
    object.__setattr__(source, "last", last)
    object.__setattr__(source, "identity", SequenceSource(sequences(), CURVE.batch_size, 0).identity)
    evaluated = lambda model: {"nats": evaluate(model, sequences(seed=5), batch_size=16)["value"]}  # noqa: E731
    try:
        result = pretraining(model, CURVE, source=source, evaluate=evaluated, folder=folder, checkpoint_seconds=-1.0)
    except KeyboardInterrupt:
        return None
    return (model.state_dict() if distributed.count() == 1 else whole_state(model)), result.history


STEPS = TrainConfig(steps=2, batch_size=8, seed=0)
PLANNED = {
    "pretrain": Pretrain(train=STEPS, splits=("retain",), prepared=NOWHERE),
    "distill": Distill(train=STEPS, recover=None, prepared=NOWHERE, teacher=NOWHERE, student=NOWHERE),
}


def predicted_peak(stage, config, tensor=1):
    """Predicted bytes at the peak of a stage on each of two ranks, without those of the process itself."""
    phases = Predictor(config, 64, ranks=2, tensor=tensor, device="cpu", evaluated=1).phases(PLANNED[stage], torch.float32)
    return max(memory.total - memory.process for memory in phases if memory.phase != "evaluation")


def peak(stage, config, tensor=1):
    """Bytes at the peak of a stage on this rank, without those of the process itself."""
    distributed.arrange(ParallelConfig(tensor))
    allocator = ctypes.CDLL(None)  # glibc keeps freed memory otherwise; the prediction is of the memory in use
    allocator.mallopt(-3, 1 << 16), allocator.mallopt(-1, 0)
    ids = torch.randint(1, 32000, (64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    process = resident_bytes()
    model, data = initialise(config, 0), Sequences(ids, 0)
    reset_peak()
    if stage == "pretrain":
        pretraining(model, STEPS, source=SequenceSource(data, STEPS.batch_size, 0))
    else:
        distill(model, initialise(config, 1), data, STEPS, progress=False)
    return peak_bytes() - process


def describe(stage, tied, predicted, measured):
    """One line with the predicted and the measured peaks."""
    shown = " and ".join(f"{size / 2**20:.0f}" for size in measured)
    return f"\n{stage}, {'tied' if tied else 'untied'}: {predicted / 2**20:.0f} MiB predicted, {shown} measured on 2 ranks"


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
MORE = {"head_dim": 16, "query_pre_attn_scalar": 16, "max_position_embeddings": 64, "sliding_window": 64}
SMALL = {
    "name": "small",
    "seed": 0,
    "data": {"kind": "arithmetic-compact", "train_rows": 500, "eval_prompts": 20},
    "model": {"config": {"model_type": "gemma2", **SIZES, **MORE}},
    "pretrain": {"train": {"steps": 60, "batch_size": 16, "lr": 1.0e-3, "eps": 1.0e-2, "eval_every": 20}},
    "unlearn": {"method": "maxent", "train": {"steps": 5, "batch_size": 16, "lr": 1.0e-3, "eps": 1.0e-2}},
    "noise": {"alphas": [0.6]},
    "distill": {"recover": None, "train": {"steps": 10, "batch_size": 16, "lr": 1.0e-3, "eps": 1.0e-2}},
    "controls": {"filter": False, "random": False},
    "relearn": {"rates": [1.0e-3], "evaluate_at": [0, 5], "headline_step": 5, "extend": 0, "batch_size": 16},
}
