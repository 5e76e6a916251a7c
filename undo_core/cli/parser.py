"""The commands of ``undo`` and the parser that reads their arguments."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from undo_core.cli import attack, hints, results, runs, single_stages
from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.config_files import SettingsParser, check_sections, read_settings
from undo_core.pipeline.sweep_config import SweepConfig

COMMANDS: dict[str, Callable[..., int]] = {
    function.__name__: function
    for function in (
        *(single_stages.prepare, single_stages.unlearn, single_stages.noise, single_stages.damage),
        *(single_stages.cache, single_stages.distill, single_stages.relearn),
        *(attack.attack, results.evaluate, results.report),
        runs.doctor,
    )
}

_RUN = """Run every stage of CONFIG that is not finished yet, then write the report.

  undo run configs/arithmetic-cpu.yaml
  undo run configs/arithmetic-cpu.yaml --seed=1 --noise.alphas='[0.3,0.6]' --output=runs/mine
  undo run configs/arithmetic-cpu.yaml --target-robustness=0.9 --alpha-resolution=0.02

Override any key of the configuration with --key=value; nested keys are written with dots. After an interruption, even kill -9,
the same command continues where it stopped. Finished stages are kept in OUTPUT/stages, where all runs with the same OUTPUT
share them.

With --target-robustness, the run goes on with further alphas until the cheapest is known whose R reaches the target.
"""

_PLAN = """Print the stages of CONFIG with their steps, time, disk and peak memory, without running anything.

  undo plan configs/arithmetic-cpu.yaml
  undo plan configs/arithmetic-cpu.yaml --memory 8GB
  undo plan configs/arithmetic-cpu.yaml --ranks 2

With --memory, also print the cheapest flags with which every stage fits. From cheapest to most expensive: activation
checkpointing, smaller micro-batches, a cached teacher, steps in the backward pass, 8-bit or 4-bit moments, bfloat16, moments in
host memory. If no flags suffice, the last line names the stages and the least memory that they need, and the exit code is 2.

With --ranks N, the plan is that of `torchrun --nproc-per-node N -m undo_core run CONFIG`: the memory of one rank, and the bytes that
it sends to the others in a training step.
"""


_SWEEP = """Run every combination of settings in FILE, then write a report on each run and one on all of them.

  undo sweep configs/sweep-beta.yaml
  undo sweep configs/sweep-beta.yaml --dry-run
  undo sweep configs/sweep-beta.yaml --engine ray --address head:6379

FILE names a base configuration and what varies: grid maps dotted keys to lists of values, runs lists named variants. Stages
that runs have in common are computed once. All runs share one pool of workers, one on each GPU. After an interruption, even
kill -9, the same command continues where it stopped. A run that fails does not stop the others; it is reported at the end, and
the exit code is 1. Results are written to OUTPUT/runs/NAME/results-seedN.json, the report on all runs to
OUTPUT/report/comparison.html.

With --engine ray, the stages run on the machines of a Ray cluster, which share the working directory and OUTPUT. The stages of a
machine that is lost run again on another one.
"""


_new_parser = functools.partial(SettingsParser, formatter_class=hints.HelpFormatter)


def command_parser(only: str | None = None) -> ArgumentParser:
    """Returns the parser of all commands. With ``only``, the others are names without arguments, which is faster."""
    parser = _new_parser(prog="undo", description="UNDO: robust unlearning for language models.")
    subcommands = parser.add_subcommands(required=False)
    helps = {"run": _RUN, "plan": _PLAN, "sweep": _SWEEP} | {name: f.__doc__ or "" for name, f in COMMANDS.items()}
    for name, text in helps.items():
        sub = _subparser(name) if only in (None, name) else _new_parser()
        subcommands.add_subcommand(name, sub, help=text.splitlines()[0])
    return parser


def _subparser(name: str) -> ArgumentParser:
    """Returns the parser of one command."""
    if name in ("run", "plan"):
        text = _RUN if name == "run" else _PLAN
        sub = _new_parser(description=text, usage=f"undo {name} CONFIG [--key=value ...]")
        sub.add_argument("--config", action="config", help="YAML file; further files override the first")
        if name == "plan":
            sub.add_argument("--memory", type=str | None, default=None, help="memory available to a stage: 24GB, 24GiB, 500MB")
            sub.add_argument(
                "--ranks", type=int, default=1, help="processes of torchrun: predict the memory and traffic of one"
            )
        sub.add_class_arguments(RunConfig)
    elif name == "sweep":
        usage = "undo sweep FILE [--dry-run] [--engine ray] [--key=value ...]"
        sub = _new_parser(description=_SWEEP, usage=usage)
        sub.add_argument("--config", action="config", help="YAML file of the sweep")
        sub.add_argument(
            "--dry_run",
            action="store_true",
            help="print the runs and how many of their stages are shared, finished and missing",
        )
        sub.add_class_arguments(SweepConfig)
    else:
        function = COMMANDS[name]
        sub = _new_parser(description=_description(function))
        settings = settings_class(function)
        if function is attack.attack:
            sub.add_argument("--config", action="config", help="YAML file of settings; flags override it")
            help_text = "print the stages with their steps, time and peak memory, and attack nothing"
            sub.add_argument("--dry_run", action="store_true", help=help_text)
        sub.add_function_arguments(function, as_positional=True, skip={"config", "command", "dry_run"} if settings else set())
        if settings:
            sub.add_class_arguments(settings)
    return sub


def _description(function: Callable[..., int]) -> str:
    """A command's docstring without its arguments, which the help lists separately."""
    return inspect.cleandoc(function.__doc__ or "").split("\n\nArgs:")[0]


def parser_arguments(arguments: list[str]) -> list[str]:
    """Returns what the parser reads for the arguments of ``undo``: a file becomes ``--config FILE``, dashes in flags underscores.

    Raises:
        ValueError: a file of settings is not allowed, see :func:`undo_core.pipeline.config_files.read_settings`.
    """
    return [_dashes(argument) for argument in _config_first(arguments)]


def settings_files(arguments: list[str]) -> list[str]:
    """The files of settings that the arguments name and that exist; later ones override earlier ones."""
    first = arguments[1:2] if arguments[:1] in (["run"], ["plan"], ["sweep"]) else []
    return [name for name in first if Path(name).is_file()] + _laid_over(arguments)


def _laid_over(arguments: list[str]) -> list[str]:
    """The files that ``--config`` names and that exist."""
    named = [
        following if name == "--config" else name.removeprefix("--config=")
        for name, following in itertools.pairwise([*arguments, ""])
        if name.startswith("--config")
    ]
    return [name for name in named if Path(name).is_file()]


def run_config(arguments: Sequence[str]) -> RunConfig:
    """Returns the settings of ``undo run`` with these arguments: ``--config=FILE``, once or more, and flags."""
    parser = command_parser("run")
    return as_run_config(command_values(parser, parser.parse_args(["run", *arguments])))


def command_values(parser: ArgumentParser, parsed: Namespace) -> Namespace:
    """Returns the values of the command that was parsed, its settings as dataclasses.

    Raises:
        ValueError: :func:`undo_core.pipeline.config_files.check_sections` refuses them.
    """
    name = parsed.subcommand
    owner = {"run": RunConfig, "plan": RunConfig, "sweep": SweepConfig}.get(name) or settings_class(COMMANDS[name])
    if owner:
        check_sections(parsed[name], owner)
    return parser.instantiate(parsed)[name]


def as_run_config(values: Namespace) -> RunConfig:
    """Returns the settings of a run among the values that ``undo run`` or ``undo plan`` parsed."""
    return RunConfig(**{key: value for key, value in vars(values).items() if key not in ("config", "memory", "ranks")})


def settings_class(function: Callable[..., int]) -> type | None:
    """The dataclass of the command's ``config`` argument, whose fields become flags; None if there is no such argument."""
    hint = typing.get_type_hints(function).get("config")
    return hint if dataclasses.is_dataclass(hint) else None


def _dashes(argument: str) -> str:
    """Replaces the dashes in a flag's name by underscores: ``--a-flag=value`` becomes ``--a_flag=value``."""
    name, *value = argument.split("=", 1)
    return "=".join([name[:2] + name[2:].replace("-", "_") if name.startswith("--") else name, *value])


def _config_first(arguments: list[str]) -> list[str]:
    """Rewrites the arguments for the parser: ``run FILE ...`` becomes ``run --config FILE ...``; flags then override the file.

    ``plan`` with a sweep's file becomes the sweep's dry run. The paths of ``report`` and ``attack`` become one JSON list. Positional arguments
    that may be omitted become flags: ``evaluate MODEL DATA`` becomes ``evaluate MODEL --data DATA``.
    """
    if arguments[:1] in (["run"], ["plan"], ["sweep"]):
        for laid_over in _laid_over(arguments):
            read_settings(laid_over)
    if len(arguments) > 1 and arguments[0] in ("run", "plan", "sweep") and not arguments[1].startswith("-"):
        settings = read_settings(arguments[1])
        rest = ["--config", *arguments[1:]]
        if arguments[0] == "plan" and "base" in settings:
            return ["sweep", *rest, "--dry-run"]
        return [arguments[0], *rest]
    if len(arguments) > 2 and arguments[0] == "evaluate" and not any(part.startswith("-") for part in arguments[1:3]):
        return [*arguments[:2], "--data", *arguments[2:]]
    if arguments[:1] in (["report"], ["attack"]):
        paths = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments[1:]))
        return [arguments[0], *([json.dumps(paths)] if paths else []), *arguments[1 + len(paths) :]]
    return arguments
