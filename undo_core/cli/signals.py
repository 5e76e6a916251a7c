"""Lets the signals that ask a process to end do so as Ctrl-C does."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_ENDS = ("SIGTERM", "SIGHUP")  # sent by schedulers and `docker stop`, and when a terminal is closed; Windows lacks the second


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """Raises a KeyboardInterrupt with the signal's number, inside the block, for a signal that asks the process to end.

    By default it would end at once, and keep its locks: another machine would wait until they expire. A signal that is ignored, as by
    nohup, or has another handler is left alone, and so are all in a thread that is not the main one.
    """

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    numbers = [getattr(signal, name) for name in _ENDS if hasattr(signal, name)]
    main = threading.current_thread() is threading.main_thread()
    taken = [number for number in numbers if main and signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def ended_by(error: KeyboardInterrupt) -> tuple[str, int]:
    """What to say of an interrupt, and the exit code that shells give to its signal."""
    number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
    return ("interrupted" if number == signal.SIGINT else f"ended by {number.name}"), 128 + number
