"""Processes of ``undo`` that can be killed: forked from one that has imported everything and computed nothing, so they begin at once.

Run as a program it is that process. It reads commands as JSON lines, and answers each with the numbers of its processes and, when they
have ended, with their exit codes. It imports what the first command that ends well has imported, models and plots among it, so that
no later one spends its time on that. Every process writes a checkpoint after each step, as do the workers that it starts.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ in ("__main__", "__mp_main__"):  # the server, and the workers of its processes
    from undo_core.cli import main
    from undo_core.distillation import cache
    from undo_core.training import loop

    inspect.unwrap(loop.train).__kwdefaults__["checkpoint_seconds"] = -1.0
    cache.cache_teacher.__kwdefaults__["checkpoint_seconds"] = 0.0


@dataclass
class Ended:
    """How a command ended.

    Attributes:
        codes: exit code of each of its processes, negative for a signal.
        said: what they wrote to standard error.
        seconds: how long they took.
    """

    codes: list[int]
    said: str
    seconds: float


class ForkServer:
    """Starts commands of ``undo``; a context. The server begins with the first command."""

    process: subprocess.Popen | None = None

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()

    def start(self, folder: Path, arguments: list[str], *, ranks: int = 1, times: int = 1, memory: int = 0) -> list[int]:
        """Starts a command in ``folder``, on several ranks or several times at once, and returns the numbers of its processes.

        With ``memory``, each may take so many bytes more than it has at its beginning.
        """
        if self.process is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command, pipes = [sys.executable, __file__], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.process = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)
        asked = {"folder": str(folder), "arguments": arguments, "ranks": ranks, "times": times, "memory": memory}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        self.folder, self.began = folder, time.monotonic()
        self.running = json.loads(self.process.stdout.readline())
        return self.running

    def wait(self) -> Ended:
        """Waits until the processes of the command, and all that these have started, have ended."""
        codes = json.loads(self.process.stdout.readline())
        seconds = time.monotonic() - self.began
        until = time.monotonic() + 30
        while left := [number for leader in self.running for number in session(leader)]:
            assert time.monotonic() < until, f"{left} outlive the process that started them"
            time.sleep(0.05)
        return Ended(codes, (self.folder / "said").read_text(), seconds)


def session(leader: int) -> list[int]:
    """The processes of a session that are running."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(number) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


MODULES = "modules"  # file in the folder of a command: the modules that it has imported


def _serve() -> None:
    learnt = False
    for line in sys.stdin:
        asked = json.loads(line)
        (Path(asked["folder"]) / "said").write_text("")
        port = str(_free_port())
        processes = []
        for number in range(max(asked["ranks"], asked["times"])):
            if (process := os.fork()) == 0:
                _become(asked, number, port)
            processes.append(process)
        print(json.dumps(processes), flush=True)
        codes = _ended(processes, asked["ranks"] > 1)
        if not learnt and not any(codes):
            learnt = True
            _learn(Path(asked["folder"]) / MODULES)
        print(json.dumps(codes), flush=True)


def _ended(processes: list[int], ranks: bool) -> list[int]:
    """Waits for processes and returns their exit codes; once one of several ranks has failed, ends the others as torchrun does."""
    codes: dict[int, int] = {}
    until, ways = math.inf, [(signal.SIGTERM, 30.0), (signal.SIGKILL, math.inf)]
    while len(codes) < len(processes):
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended:
            codes[ended] = os.waitstatus_to_exitcode(status)
            if ranks and codes[ended] and until == math.inf:
                until = time.monotonic()
        elif time.monotonic() >= until:
            way, patience = ways.pop(0)
            until = time.monotonic() + patience
            for process in set(processes) - set(codes):
                os.kill(process, way)
        else:
            time.sleep(0.005)
    return [codes[process] for process in processes]


def _learn(modules: Path) -> None:
    """Imports modules, which must leave this process without threads."""
    for name in modules.read_text().splitlines():
        if not name.startswith("__"):
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the threads of this process"


def _become(asked: dict[str, Any], number: int, port: str) -> None:
    """Runs the command in this new process, and ends it."""
    code = 99
    try:
        os.setsid()
        os.chdir(asked["folder"])
        for name, handles in (("/dev/null", (0, 1)), ("said", (2,))):
            file = os.open(name, os.O_RDWR | os.O_APPEND)
            for handle in handles:
                os.dup2(file, handle)
        if asked["ranks"] > 1:
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(asked["ranks"])}
            os.environ.update(where | {"RANK": str(number), "LOCAL_RANK": str(number)})
        if asked["memory"]:
            import resource

            taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (taken + asked["memory"],) * 2)
        code = main(asked["arguments"])
        found = [
            name for name, module in sys.modules.items() if getattr(getattr(module, "__spec__", None), "has_location", False)
        ]
        Path(MODULES).write_text("\n".join(found))  # those that have a file
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def kill(process: int) -> None:
    """Kills a process as ``kill -9`` does; one that has ended already is left alone."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    _serve()
