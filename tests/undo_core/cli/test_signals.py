"""A signal that asks the command to end ends it in one line, as Ctrl-C does."""

import os
import signal
import threading
import time

import pytest

from undo_core import cli


@pytest.fixture
def signalled(monkeypatch):
    """Returns the exit code of a command that gets this signal at work."""

    def run(number):
        def work(*_):
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            return 0

        monkeypatch.setattr(cli, "_dispatch", work)
        return cli.main(["doctor"])

    return run


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_it_is_an_interrupt(name, code, signalled, capsys):
    number = getattr(signal, name)
    assert signalled(number) == code and signal.getsignal(number) is signal.SIG_DFL
    assert capsys.readouterr().err == f"undo: ended by {name}; the same command continues\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_nohup_is_respected(signalled):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signalled(signal.SIGHUP) == 0 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_command_can_run_in_a_thread(monkeypatch):
    codes = []
    monkeypatch.setattr(cli, "_dispatch", lambda *_: 0)
    (thread := threading.Thread(target=lambda: codes.append(cli.main(["doctor"])))).start()
    thread.join()
    assert codes == [0]
