"""The kinds of stages, one file each: settings, inputs, computation, predicted memory and cost, ways to need less memory."""

from undo_core.pipeline.stages.cache import Cache
from undo_core.pipeline.stages.damage import Damage
from undo_core.pipeline.stages.distill import Distill
from undo_core.pipeline.stages.erase import Erase
from undo_core.pipeline.stages.gate import Gate
from undo_core.pipeline.stages.grid import Grid
from undo_core.pipeline.stages.initialise import Initialise
from undo_core.pipeline.stages.intervene import Intervene
from undo_core.pipeline.stages.measure import Measure
from undo_core.pipeline.stages.noise import Noise
from undo_core.pipeline.stages.prepare import Prepare
from undo_core.pipeline.stages.pretrain import Pretrain
from undo_core.pipeline.stages.probe import Probe
from undo_core.pipeline.stages.relearn import Relearn
from undo_core.pipeline.stages.replay import Replay
from undo_core.pipeline.stages.search import Search
from undo_core.pipeline.stages.unlearn import Unlearn
from undo_core.pipeline.stages.untie import Untie

__all__ = [
    "Cache",
    "Damage",
    "Distill",
    "Erase",
    "Gate",
    "Grid",
    "Initialise",
    "Intervene",
    "Measure",
    "Noise",
    "Prepare",
    "Pretrain",
    "Probe",
    "Relearn",
    "Replay",
    "Search",
    "Unlearn",
    "Untie",
]
