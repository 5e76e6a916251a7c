"""Stages for tests: one that ends as it is told to, and every kind there is."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from undo_core.pipeline import stages
from undo_core.pipeline.stage import Folder, Stage

KINDS = [getattr(stages, name) for name in stages.__all__]
NOWHERE = Folder(Path("nowhere"))  # an input of stages that are predicted and not run


@dataclass(frozen=True, kw_only=True)
class Ending(Stage):
    """A stage that works, raises, is killed from outside, or leaves half of its folder."""

    kind = "ending"
    model_from = None
    how: str
    number: int = 0
    before: Stage | None = None

    def run(self, work):
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "raise":
            (work.output / "half").write_text("x")
            raise ValueError("half way")
        return {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "found": len(list(work.output.iterdir()))}

    def memory(self, meta):
        return []
