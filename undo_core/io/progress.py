"""Progress on the terminal: loss, tokens per second, ETA and memory, with one bar per stage, also for parallel stages."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from undo_core.io.memory_use import resident_bytes

console = Console(highlight=False, markup=False, soft_wrap=True)  # names and messages are text, whatever brackets they hold


def show_every_character() -> None:
    """Lets standard output write characters that its encoding lacks as escapes, as standard error does; by default they are an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@dataclass(frozen=True)
class Update:
    """State of one stage's progress.

    Attributes:
        title: name of the stage.
        step: steps done.
        total: steps of the whole stage.
        note: text after the bar, such as loss and speed.
        metrics: performances of the last evaluation, by name, as they were measured.
        start: step at which this run of the stage began (above 0 after a resume).
        done: whether to remove the bar.
    """

    title: str
    step: int
    total: int
    note: str = ""
    start: int = 0
    done: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """Unit in which performances are shown.

    Attributes:
        name: the unit; empty to name none.
        factors: what a performance is multiplied by, by the name of its split; others are shown as they are.
    """

    name: str = ""
    factors: Mapping[str, float] = field(default_factory=dict)

    def show(self, metrics: Mapping[str, float]) -> str:
        """The performances in this unit, without the bounds of their intervals."""
        values = {name: value for name, value in metrics.items() if not name.endswith(("_low", "_high"))}
        shown = "  ".join(f"{name} {value * self.factors.get(name, 1):.3f}" for name, value in values.items())
        return f"{shown} {self.name}" if shown and self.name else shown


_unit_of: Callable[[str], Unit] = lambda title: Unit()  # noqa: E731


@contextlib.contextmanager
def shown_in(unit_of: Callable[[str], Unit]) -> Iterator[None]:
    """Context in which the progress of a stage shows performances in the unit that ``unit_of`` returns for its title."""
    global _unit_of
    before, _unit_of = _unit_of, unit_of
    try:
        yield
    finally:
        _unit_of = before


def shown_metrics(title: str, metrics: Mapping[str, float]) -> str:
    """The performances of a stage as progress shows them: with the unit that :func:`shown_in` has set."""
    return _unit_of(title).show(metrics)


class _Note(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("note", ""))


class Board:
    """Shows updates: bars on a terminal; elsewhere a line when a stage starts or continues, and then at most one every ``every`` seconds."""

    def __init__(self, every: float = 15.0) -> None:
        self.every = every
        self._progress: Progress | None = None
        self._tasks: dict[str, int] = {}
        self._began: dict[str, float] = {}
        self._spoke: dict[str, float] = {}

    def show(self, update: Update) -> None:
        """Draws or prints ``update``."""
        if update.metrics:
            shown = shown_metrics(update.title, update.metrics)
            update = dataclasses.replace(update, note=f"{update.note}  {shown}", metrics={})
        if console.is_terminal:
            self._draw(update)
        else:
            self._print(update)

    def _draw(self, update: Update) -> None:
        if self._progress is None:
            columns = (
                TextColumn("{task.description:<20}", markup=False),
                BarColumn(20),
                TextColumn("{task.completed:>5.0f}/{task.total:.0f}"),
            )
            self._progress = Progress(*columns, TimeRemainingColumn(), _Note(), console=console)
            self._progress.start()
        if update.title not in self._tasks:
            self._tasks[update.title] = self._progress.add_task(
                update.title, total=update.total, completed=update.start, note=""
            )
        self._progress.update(self._tasks[update.title], completed=update.step, note=update.note)
        if update.done:
            self._progress.remove_task(self._tasks.pop(update.title))
            if not self._tasks:
                self._progress.stop()
                self._progress = None

    def _print(self, update: Update) -> None:
        now = time.monotonic()
        if update.title not in self._began:
            how = f"continues from {update.start} of {update.total}" if update.start else "starts"
            console.print(f"{update.title}: {how}")
        began = self._began.setdefault(update.title, now)
        spoke = self._spoke.setdefault(update.title, now)
        if update.done:
            del self._began[update.title], self._spoke[update.title]
        elif now - spoke > self.every:
            self._spoke[update.title] = now
            left = (update.total - update.step) * (now - began) / max(update.step - update.start, 1)
            console.print(f"{update.title:<22} {update.step:>5}/{update.total}  ETA {left:4.0f} s  {update.note}")


_board = Board()
_show: Callable[[Update], None] = _board.show


def send_updates_to(receive: Callable[[Update], None]) -> None:
    """Sends the updates of this process's stages to ``receive``, as a worker does for the process that owns the terminal."""
    global _show
    _show = receive


class StageProgress:
    """Reports the progress of one stage; a context manager that removes the bar on exit."""

    def __init__(self, title: str, total: int, *, start: int = 0, enabled: bool = True, unit: str = "tok") -> None:
        self.title, self.total, self.start, self.enabled, self.unit = title, total, start, enabled, unit
        self._began = time.monotonic()
        self._read, self._step, self._spoke = 0, start, 0.0

    def __enter__(self) -> StageProgress:
        if self.enabled:
            _show(Update(self.title, self.start, self.total, start=self.start))
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            _show(Update(self.title, self._step, self.total, start=self.start, done=True))

    def update(self, step: int, read: int, loss: float | None, metrics: Mapping[str, float] | None = None) -> None:
        """Shows that ``step`` steps are done; ``read`` is the number of units (such as tokens) read since the last call."""
        self._read += read
        self._step = step
        now = time.monotonic()
        if not self.enabled or now - self._spoke < 0.1:  # drawing takes longer than a small step
            return
        self._spoke = now
        rate = self._read / max(now - self._began, 1e-9)
        speed = f"{rate / 1000:.1f}k {self.unit}/s" if rate >= 1000 else f"{rate:.0f} {self.unit}/s"
        parts = [] if loss is None else [f"loss {loss:.4f}"]
        parts += [speed, f"{resident_bytes() / 2**30:.2f} GiB"]
        _show(Update(self.title, step, self.total, "  ".join(parts), self.start, metrics=metrics or {}))
