"""The command line: ``undo run | sweep | plan | doctor | report`` and every stage alone, on Hugging Face checkpoint folders."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import os
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from undo_core import commands, hints
from undo_core.config import RunConfig
from undo_core.config_files import read_settings
from undo_core.sweep_config import SweepConfig
from undo_core.training import DivergedError

_RUN = """Run everything that CONFIG describes and is not there yet, then report.

  undo run configs/arithmetic-cpu.yaml
  undo run configs/arithmetic-cpu.yaml --seed=1 --noise.alphas='[0.3,0.6]' --output=runs/mine

Any key of the configuration can be overridden with --key=value, nested keys with dots. Killed at any moment, the same
command continues where it was. Finished stages are kept in OUTPUT/stages and shared by every run with the same OUTPUT.
"""

_PLAN = """Print the stages of CONFIG with steps, time, disk and memory by part; run nothing.

  undo plan configs/arithmetic-cpu.yaml
  undo plan configs/arithmetic-cpu.yaml --memory 8GB

With --memory, name the cheapest flags with which every stage fits: activation checkpointing, smaller micro-batches, a cached
teacher, steps in the backward pass, 8-bit or 4-bit moments, bfloat16, moments on the host, in this order. Where none are enough the
last line says which stage needs how much at least, and the exit code is 2.
"""


_SWEEP = """Run every combination that FILE describes over one folder of stages, then report on each run and on all of them.

  undo sweep configs/sweep-beta.yaml
  undo sweep configs/sweep-beta.yaml --dry-run

FILE names a base configuration and what is varied: grid, a mapping of dotted keys to lists, and runs, a list of named variants.
Stages that runs have in common are computed once; all runs share one pool of workers, one on each GPU. Killed at any moment, the
same command continues. A run that fails is reported at the end, stops no other, and makes the exit code 1. The results are in
OUTPUT/runs/NAME/results-seedN.json, the report over all runs in OUTPUT/report/comparison.html.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``undo``; returns the exit code: 0, 1 for a failure at work, 2 for a mistake in what was asked."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disable_progress_bar()  # transformers' own bars for loading and saving; the stages have theirs
    try:
        if not arguments:
            print(hints.FIRST_STEPS)
            return 2
        if arguments[0] == "completion":
            print(hints.completion(_parser(), arguments[1] if len(arguments) > 1 else "bash"))
            return 0
        asked = _config_first(arguments)
        parser = _parser(next(iter(asked), ""))
        parsed = parser.parse_args([_dashes(argument) for argument in asked])
        if parsed.subcommand is None:
            parser.print_help()
            return 2
        return _dispatch(parser, parsed, "undo " + shlex.join(arguments))
    except (ArgumentError, ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, ImportError) as error:
        print(f"undo: error: {hints.explained(_one_line(error), arguments[0], _parser)}", file=sys.stderr)
        return 2
    except (DivergedError, OSError, SafetensorError) as error:
        print(f"undo: failed: {_one_line(error)}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        print("undo: failed: a worker was killed from outside, perhaps for memory; the same command continues", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("undo: interrupted; the same command continues", file=sys.stderr)
        return 130


def _parser(only: str | None = None) -> ArgumentParser:
    """Returns the parser of every command, or of the command ``only``: the others are then names without arguments, which takes a
    fraction of the time."""
    parser = ArgumentParser(
        prog="undo",
        description="UNDO: robust unlearning for language models.",
        exit_on_error=False,
        formatter_class=hints.HelpFormatter,
    )
    subcommands = parser.add_subcommands(required=False)
    helps = {"run": _RUN, "plan": _PLAN, "sweep": _SWEEP} | {name: f.__doc__ or "" for name, f in commands.COMMANDS.items()}
    for name, text in helps.items():
        sub = (
            _subparser(name)
            if only in (None, name)
            else ArgumentParser(exit_on_error=False, formatter_class=hints.HelpFormatter)
        )
        subcommands.add_subcommand(name, sub, help=text.splitlines()[0])
    return parser


def _subparser(name: str) -> ArgumentParser:
    """Returns the parser of one command."""
    if name in ("run", "plan"):
        text = _RUN if name == "run" else _PLAN
        sub = ArgumentParser(
            description=text,
            exit_on_error=False,
            formatter_class=hints.HelpFormatter,
            usage=f"undo {name} CONFIG [--key=value ...]",
        )
        sub.add_argument("--config", action="config", help="YAML file; a further one is laid over the first")
        if name == "plan":
            sub.add_argument("--memory", type=str | None, default=None, help="what a stage may take: 24GB, 24GiB, 500MB")
        sub.add_class_arguments(RunConfig)
    elif name == "sweep":
        sub = ArgumentParser(
            description=_SWEEP,
            exit_on_error=False,
            formatter_class=hints.HelpFormatter,
            usage="undo sweep FILE [--dry-run] [--key=value ...]",
        )
        sub.add_argument("--config", action="config", help="YAML file of the sweep")
        sub.add_argument("--dry_run", action="store_true", help="print the runs and their stages, shared, there and missing")
        sub.add_class_arguments(SweepConfig)
    else:
        function = commands.COMMANDS[name]
        sub = ArgumentParser(description=_description(function), exit_on_error=False, formatter_class=hints.HelpFormatter)
        settings = _settings_class(function)
        sub.add_function_arguments(function, as_positional=True, skip={"config"} if settings else set())
        if settings:
            sub.add_class_arguments(settings)
    return sub


def _description(function: Callable[..., int]) -> str:
    """A command's docstring without its arguments, which the help lists by themselves."""
    return inspect.cleandoc(function.__doc__ or "").split("\n\nArgs:")[0]


def _dashes(argument: str) -> str:
    """``--a-flag=value`` as ``--a_flag=value``."""
    name, *value = argument.split("=", 1)
    return "=".join([name[:2] + name[2:].replace("-", "_") if name.startswith("--") else name, *value])


def _config_first(arguments: list[str]) -> list[str]:
    """``run FILE ...`` as ``run --config FILE ...``: the configuration must be read before what overrides it.

    ``plan`` of a sweep's file is the sweep's dry run; the paths of ``report`` become a list. What may be left out is a flag to the
    parser: ``evaluate MODEL DATA`` has ``--data DATA``.
    """
    if arguments[:1] in (["run"], ["plan"], ["sweep"]):
        for name, following in itertools.pairwise([*arguments, ""]):
            laid_over = following if name == "--config" else name.removeprefix("--config=")
            if laid_over != name and Path(laid_over).is_file():
                read_settings(laid_over)
    if len(arguments) > 1 and arguments[0] in ("run", "plan", "sweep") and not arguments[1].startswith("-"):
        settings = read_settings(arguments[1])
        rest = ["--config", *arguments[1:]]
        if arguments[0] == "plan" and "base" in settings:
            return ["sweep", *rest, "--dry-run"]
        return [arguments[0], *rest]
    if len(arguments) > 2 and arguments[0] == "evaluate" and not any(part.startswith("-") for part in arguments[1:3]):
        return [*arguments[:2], "--data", *arguments[2:]]
    if arguments[:1] == ["report"]:
        paths = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments[1:]))
        return ["report", *([json.dumps(paths)] if paths else []), *arguments[1 + len(paths) :]]
    return arguments


def _dispatch(parser: ArgumentParser, parsed: Namespace, command: str) -> int:
    name = parsed.subcommand
    values = parser.instantiate(parsed)[name]
    if name in ("run", "plan"):
        config = RunConfig(**{key: value for key, value in vars(values).items() if key not in ("config", "memory")})
        return commands.run(config, command) if name == "run" else commands.plan(config, values.memory)
    if name == "sweep":
        fields = {key: value for key, value in vars(values).items() if key not in ("config", "dry_run")}
        return commands.sweep(SweepConfig(**fields), command, values.dry_run)
    function = commands.COMMANDS[name]
    arguments = dict(vars(values))
    settings = _settings_class(function)
    if settings:
        names = [field.name for field in dataclasses.fields(settings)]
        arguments["config"] = settings(**{key: arguments.pop(key) for key in names})
    return function(**arguments)


def _settings_class(function: Callable[..., int]) -> type | None:
    """The dataclass of the command's ``config`` argument, whose fields are flags of the command."""
    hint = typing.get_type_hints(function).get("config")
    return hint if dataclasses.is_dataclass(hint) else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
