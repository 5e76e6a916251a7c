"""Attacks on unlearning: fine-tuning of all weights or of adapters, few-shot prompting, quantisation, and interventions.

The attacks that train are in :mod:`undo_core.attacks.relearning`, a search over their settings in
:mod:`undo_core.attacks.search`, and their cost against a model without the capability in
:mod:`undo_core.attacks.slowdown`; the interventions, one file each, in :mod:`undo_core.attacks.interventions`.
"""

from undo_core.attacks.config import AttackConfig, LoraConfig, Trial
from undo_core.attacks.grid import worst_of
from undo_core.attacks.prompting import few_shot
from undo_core.attacks.quantise import quantise_

__all__ = ["AttackConfig", "LoraConfig", "Trial", "few_shot", "quantise_", "worst_of"]
