"""UNDO: unlearn, noise, distill on outputs. Robust unlearning for language models (arXiv 2506.06278).

>>> from undo_core import distill, noise_, relearn, unlearn
"""

from undo_core import quiet as _quiet  # noqa: F401  # isort: skip  # before transformers is imported
from undo_core.version import __version__  # isort: skip
from undo_core import ops
from undo_core.attacks import LoraConfig, Trial, few_shot, quantise_, worst_of
from undo_core.damage import damage_
from undo_core.distill import distill
from undo_core.evaluate import evaluate
from undo_core.noise import noise_
from undo_core.ops import NoiseRule
from undo_core.relearn import AttackConfig, relearn
from undo_core.streaming import stream_model
from undo_core.teacher import TeacherConfig
from undo_core.teacher_cache import CachedTeacher, cache_teacher
from undo_core.training.config import TrainConfig
from undo_core.unlearn import UnlearnConfig, unlearn

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
    "quantise_",
    "relearn",
    "stream_model",
    "unlearn",
    "worst_of",
]
