"""The command line: ``undo run | sweep | plan | doctor | report``, and each stage by itself on checkpoint folders."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from undo_core import distributed
from undo_core.cli import attack, hints, runs, signals
from undo_core.cli.parser import (
    COMMANDS,
    as_run_config,
    command_parser,
    command_values,
    parser_arguments,
    settings_class,
    settings_files,
)
from undo_core.io.progress import show_every_character
from undo_core.pipeline.sweep_config import SweepConfig
from undo_core.training import DivergedError

# What becomes one line: wrong arguments, settings and files (exit code 2), and a stage or a disk that failed (exit code 1).
REFUSED = (ArgumentError, ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, ImportError)
FAILED = (DivergedError, OSError, SafetensorError)
TOGETHER = ("run", "unlearn", "distill", "relearn", "attack", "evaluate")  # the commands that all ranks of a torchrun work on


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``undo``.

    Returns:
        The exit code: 0; 1 if a stage or a run failed; 2 for an error in the arguments or settings; 130 if interrupted, 143
        after SIGTERM and 129 after SIGHUP.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disable_progress_bar()  # transformers' bars for loading and saving would disturb those of the stages
    show_every_character()
    try:
        distributed.start()
        if distributed.count() > 1:
            from undo_core.pipeline.workers import end_with

            end_with(os.getppid())  # torchrun's children outlive it if it is killed
        if not arguments:
            print(hints.FIRST_STEPS)
            return 2
        if arguments[0] == "completion":
            print(hints.completion(command_parser(), arguments[1] if len(arguments) > 1 else "bash"))
            return 0
        asked = parser_arguments(arguments)
        parser = command_parser(next(iter(asked), ""))
        parsed = parser.parse_args(asked)
        if parsed.subcommand is None:
            parser.print_help()
            return 2
        return _on_ranks(parsed.subcommand, lambda: _dispatch(parser, parsed, "undo " + shlex.join(arguments)))
    except REFUSED as error:
        message = hints.explained(_one_line(error), arguments[0], command_parser, settings_files(arguments))
        return _failed(f"undo: error: {message}{hints.what_to_do(error)}", 2)
    except FAILED as error:
        return _failed(f"undo: failed: {_one_line(error)}{hints.what_to_do(error)}", 1)
    except BrokenProcessPool:
        return _failed("undo: failed: a worker was killed, perhaps for lack of memory; the same command continues", 1)
    except KeyboardInterrupt as error:
        said, code = signals.ended_by(error)
        return _failed(f"undo: {said}; the same command continues", code)
    except Exception as error:
        if memory := hints.lack_of_memory(error):
            return _failed(f"undo: failed: {memory}", 1)
        if distributed.count() == 1:
            raise
        return _failed(f"undo: failed: {distributed.explained(error)}", 1)


def _on_ranks(name: str, command: Callable[[], int]) -> int:
    """Runs a command on all ranks if they work on it together, else on rank 0 while the others wait."""
    if name == "sweep" and distributed.count() > 1:
        raise ValueError(f"sweep: got {distributed.count()} ranks of torchrun, wanted none: a sweep starts its own processes")
    # a rank that waits for another one inside a collective would not notice that it is to end
    with signals.interrupting() if distributed.count() == 1 else contextlib.nullcontext():
        code = command() if name in TOGETHER else distributed.on_first(command)
    distributed.stop()
    return code


def _failed(message: str, code: int) -> int:
    """Prints the message of a failure, once for all ranks, and returns the exit code; a rank among several ends at once."""
    several = distributed.count() > 1
    if distributed.first_to_fail():
        print(message, file=sys.stderr, flush=True)
    if several:
        distributed.end(code)
    return code


def _dispatch(parser: ArgumentParser, parsed: Namespace, command: str) -> int:
    name = parsed.subcommand
    values = command_values(parser, parsed)
    if name in ("run", "plan"):
        config = as_run_config(values)
        return runs.run(config, command) if name == "run" else runs.plan(config, values.memory, values.ranks)
    if name == "sweep":
        fields = {key: value for key, value in vars(values).items() if key not in ("config", "dry_run")}
        return runs.sweep(SweepConfig(**fields), command, values.dry_run)
    function = COMMANDS[name]
    arguments = dict(vars(values))
    settings = settings_class(function)
    if settings:
        names = [field.name for field in dataclasses.fields(settings)]
        arguments["config"] = settings(**{key: arguments.pop(key) for key in names})
    if function is attack.attack:
        arguments["command"] = command
    return function(**arguments)


def _one_line(error: BaseException) -> str:
    """The message in one line that a terminal shows as it is: what a file names cannot move the cursor or change a colour."""
    line = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)
