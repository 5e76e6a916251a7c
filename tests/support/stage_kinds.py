"""Stages for tests: one that ends as it is told to, one that takes its time, and every kind there is."""

import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from undo_core import distributed
from undo_core.pipeline import stages
from undo_core.pipeline.stage import Folder, Stage

KINDS = [getattr(stages, name) for name in stages.__all__]
HELD = 3
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


@dataclass(frozen=True, kw_only=True)
class Opened(Ending):
    """A stage that ends only once the file ``gate`` exists."""

    kind = "opened"
    gate: str

    def run(self, work):
        while not Path(self.gate).exists():
            time.sleep(0.02)
        return super().run(work)


@dataclass(frozen=True, kw_only=True)
class Opening(Ending):
    """A stage that opens the gate of its late input, and so never ends if it begins after it."""

    kind = "opening"
    late = ("after",)
    after: Opened

    def run(self, work):
        assert not work.complete("after")
        Path(self.after.gate).write_text("")
        return {"found": work.wait("after").name}


@dataclass(frozen=True, kw_only=True)
class Counted(Stage):
    """Writes a line with its machine and process for each step to its scratch folder, and continues there, as a training does.

    Attributes:
        how: ``raise`` to fail.
        steps: number of lines.
        pause: seconds after each.
        gate: a file for which it waits after ``HELD`` steps; empty to wait for none.
        before: stage that it reads.
    """

    kind: ClassVar[str] = "counted"
    model_from: ClassVar[str | None] = None
    how: str = "work"
    steps: int = 3
    pause: float = 0.0
    gate: str = ""
    before: Stage | None = None

    def run(self, work):
        lines = work.scratch / "lines"

        if self.how == "raise":
            raise ValueError("half way")

        count = distributed.count()

        def write(step: int) -> None:
            with open(lines, "a") as file:
                file.write(f"{step} {socket.gethostname()} {os.getpid()} {count}\n")

        done = distributed.on_first(lambda: len(lines.read_text().splitlines()) if lines.exists() else 0)
        for step in range(done, self.steps):
            while step == HELD and self.gate and not Path(self.gate).exists():
                time.sleep(0.05)
            distributed.on_first(lambda step=step: write(step))
            time.sleep(self.pause)
        distributed.on_first(lambda: (work.output / "lines").write_text(lines.read_text()))
        return {}

    def memory(self, meta):
        return []


@dataclass(frozen=True, kw_only=True)
class Together(Counted):
    """The same, in several processes."""

    kind: ClassVar[str] = "together"
    together: ClassVar[bool] = True
