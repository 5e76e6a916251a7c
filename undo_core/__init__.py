"""UNDO (Unlearn, Noise, Distill on Outputs): robust unlearning for language models (arXiv 2506.06278).

>>> from undo_core import distill, noise_, relearn, unlearn

The public names are loaded on first use, so that ``from undo_core import ops`` imports torch but not transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from undo_core.io import log_levels as _log_levels  # noqa: F401  # before anything imports transformers
from undo_core.version import __version__

if TYPE_CHECKING:  # editors and type checkers cannot see what __getattr__ loads
    from undo_core import ops
    from undo_core.attacks import LoraConfig, Trial, few_shot, quantise_, worst_of
    from undo_core.attacks.config import AttackConfig
    from undo_core.attacks.relearning import relearn
    from undo_core.distillation.cache import CachedTeacher, cache_teacher
    from undo_core.distillation.streaming import stream_model
    from undo_core.distillation.student import distill
    from undo_core.distillation.teacher import TeacherConfig
    from undo_core.evaluation.metrics import evaluate
    from undo_core.models.vocabulary_parallel import parallelize_head
    from undo_core.noise.damage import damage_
    from undo_core.noise.model import noise_
    from undo_core.ops import NoiseRule
    from undo_core.training.config import TrainConfig
    from undo_core.training.embedding import tied_gradient_in_place
    from undo_core.unlearning import UnlearnConfig, unlearn

__all__ = [
    "AttackConfig",
    "CachedTeacher",
    "LoraConfig",
    "NoiseRule",
    "TeacherConfig",
    "TrainConfig",
    "Trial",
    "UnlearnConfig",
    "__version__",
    "cache_teacher",
    "damage_",
    "distill",
    "evaluate",
    "few_shot",
    "noise_",
    "ops",
    "parallelize_head",
    "quantise_",
    "relearn",
    "stream_model",
    "tied_gradient_in_place",
    "unlearn",
    "worst_of",
]

_HOMES = {  # public name: module that defines it
    "AttackConfig": "attacks.config",
    "CachedTeacher": "distillation.cache",
    "LoraConfig": "attacks",
    "NoiseRule": "ops",
    "TeacherConfig": "distillation.teacher",
    "TrainConfig": "training.config",
    "Trial": "attacks",
    "UnlearnConfig": "unlearning",
    "cache_teacher": "distillation.cache",
    "damage_": "noise.damage",
    "distill": "distillation.student",
    "evaluate": "evaluation.metrics",
    "few_shot": "attacks",
    "noise_": "noise.model",
    "parallelize_head": "models.vocabulary_parallel",
    "quantise_": "attacks",
    "relearn": "attacks.relearning",
    "stream_model": "distillation.streaming",
    "tied_gradient_in_place": "training.embedding",
    "unlearn": "unlearning",
    "worst_of": "attacks",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "ops":
        return importlib.import_module("undo_core.ops")
    value = getattr(importlib.import_module(f"undo_core.{_HOMES[name]}"), name)
    globals()[name] = value  # later look-ups do not call this function
    return value


def __dir__() -> list[str]:
    return __all__
