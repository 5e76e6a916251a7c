"""The smallest run and sweep, for tests of commands and engines, and a small run as an object."""

from pathlib import Path
from typing import Any

import yaml

from undo_core.attacks import AttackConfig
from undo_core.data.config import DataConfig
from undo_core.distillation.config import DistillConfig
from undo_core.models.config import ModelConfig
from undo_core.pipeline.config import PretrainConfig, RunConfig
from undo_core.training import TrainConfig
from undo_core.unlearning import UnlearnConfig

RUN: dict[str, Any] = {
    "name": "tiny",
    "output": "out",
    "data": {"kind": "arithmetic-compact", "train_rows": 200, "eval_prompts": 20},
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
    },
    "pretrain": {"train": {"steps": 2, "batch_size": 8}},
    "unlearn": {"train": {"steps": 1, "batch_size": 4}},
    "noise": {"alphas": [0.5]},
    "distill": {"recover": None, "train": {"steps": 2, "batch_size": 4}},
    "controls": {"random": False, "filter": False},
    "relearn": {"rates": [1e-3], "evaluate_at": [0, 1], "headline_step": 1, "extend": 1, "batch_size": 4},
}


def write_run(folder: Path, *, steps: int = 2, **sweep: Any) -> Path:
    """Writes ``base.yaml``, a run with so many steps of pretraining, and ``sweep.yaml``, a sweep over it, into ``folder``."""
    folder.mkdir(exist_ok=True)
    run = {**RUN, "pretrain": {"train": {"steps": steps, "batch_size": 8}}}
    (folder / "base.yaml").write_text(yaml.safe_dump(run))
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"name": "small", "base": "base.yaml", "output": "swept", **sweep}))
    return folder


def small_run(name: str, output: str | Path = "unused", **changes: Any) -> RunConfig:
    """Returns a run of the model of ``RUN`` in which every stage trains for two steps, with ``changes`` to its settings."""
    train = TrainConfig(steps=2, batch_size=4)
    values = {
        "data": DataConfig(train_rows=300, eval_prompts=20),
        "model": ModelConfig(**RUN["model"]),
        "pretrain": PretrainConfig(train=train),
        "unlearn": UnlearnConfig(train=train),
        "distill": DistillConfig(train=train),
        "relearn": AttackConfig(rates=[1e-3], evaluate_at=[0, 1], headline_step=1, extend=0, batch_size=4),
    }
    return RunConfig(**{"name": name, "output": str(output), **values, **changes})
