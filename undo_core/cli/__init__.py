"""The command line: ``undo run | sweep | plan | doctor | report``, and each stage by itself on checkpoint folders."""

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

from undo_core import distributed
from undo_core.cli import attack, hints, results, runs, single_stages
from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.config_files import PARSER_MODE, read_settings
from undo_core.pipeline.sweep_config import SweepConfig
from undo_core.training import DivergedError

# What becomes one line: wrong arguments, settings and files (exit code 2), and a stage or a disk that failed (exit code 1).
REFUSED = (ArgumentError, ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, ImportError)
FAILED = (DivergedError, OSError, SafetensorError)
TOGETHER = ("run", "unlearn", "distill", "relearn", "attack", "evaluate")  # the commands that all ranks of a torchrun work on
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``undo``.

    Returns:
        The exit code: 0; 1 if a stage or a run failed; 2 for an error in the arguments or settings; 130 if interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disable_progress_bar()  # transformers' bars for loading and saving would disturb those of the stages
    try:
        distributed.start()
        if distributed.count() > 1:
            from undo_core.pipeline.workers import end_with

            end_with(os.getppid())  # torchrun's children outlive it if it is killed
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
        return _on_ranks(parsed.subcommand, lambda: _dispatch(parser, parsed, "undo " + shlex.join(arguments)))
    except REFUSED as error:
        message = hints.explained(_one_line(error), arguments[0], _parser)
        return _failed(f"undo: error: {message}{hints.what_to_do(error)}", 2)
    except FAILED as error:
        return _failed(f"undo: failed: {_one_line(error)}{hints.what_to_do(error)}", 1)
    except BrokenProcessPool:
        return _failed("undo: failed: a worker was killed, perhaps for lack of memory; the same command continues", 1)
    except KeyboardInterrupt:
        return _failed("undo: interrupted; the same command continues", 130)
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


def _parser(only: str | None = None) -> ArgumentParser:
    """Returns the parser of all commands. With ``only``, the others are names without arguments, which is faster."""
    parser = ArgumentParser(
        prog="undo",
        description="UNDO: robust unlearning for language models.",
        exit_on_error=False,
        formatter_class=hints.HelpFormatter,
        parser_mode=PARSER_MODE,
    )
    subcommands = parser.add_subcommands(required=False)
    helps = {"run": _RUN, "plan": _PLAN, "sweep": _SWEEP} | {name: f.__doc__ or "" for name, f in COMMANDS.items()}
    for name, text in helps.items():
        sub = (
            _subparser(name)
            if only in (None, name)
            else ArgumentParser(exit_on_error=False, formatter_class=hints.HelpFormatter, parser_mode=PARSER_MODE)
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
            parser_mode=PARSER_MODE,
            usage=f"undo {name} CONFIG [--key=value ...]",
        )
        sub.add_argument("--config", action="config", help="YAML file; further files override the first")
        if name == "plan":
            sub.add_argument("--memory", type=str | None, default=None, help="memory available to a stage: 24GB, 24GiB, 500MB")
            sub.add_argument(
                "--ranks", type=int, default=1, help="processes of torchrun: predict the memory and traffic of one"
            )
        sub.add_class_arguments(RunConfig)
    elif name == "sweep":
        sub = ArgumentParser(
            description=_SWEEP,
            exit_on_error=False,
            formatter_class=hints.HelpFormatter,
            parser_mode=PARSER_MODE,
            usage="undo sweep FILE [--dry-run] [--engine ray] [--key=value ...]",
        )
        sub.add_argument("--config", action="config", help="YAML file of the sweep")
        sub.add_argument(
            "--dry_run",
            action="store_true",
            help="print the runs and how many of their stages are shared, finished and missing",
        )
        sub.add_class_arguments(SweepConfig)
    else:
        function = COMMANDS[name]
        sub = ArgumentParser(
            description=_description(function),
            exit_on_error=False,
            formatter_class=hints.HelpFormatter,
            parser_mode=PARSER_MODE,
        )
        settings = _settings_class(function)
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
    if arguments[:1] in (["report"], ["attack"]):
        paths = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments[1:]))
        return [arguments[0], *([json.dumps(paths)] if paths else []), *arguments[1 + len(paths) :]]
    return arguments


def _dispatch(parser: ArgumentParser, parsed: Namespace, command: str) -> int:
    name = parsed.subcommand
    values = parser.instantiate(parsed)[name]
    if name in ("run", "plan"):
        config = RunConfig(**{key: value for key, value in vars(values).items() if key not in ("config", "memory", "ranks")})
        return runs.run(config, command) if name == "run" else runs.plan(config, values.memory, values.ranks)
    if name == "sweep":
        fields = {key: value for key, value in vars(values).items() if key not in ("config", "dry_run")}
        return runs.sweep(SweepConfig(**fields), command, values.dry_run)
    function = COMMANDS[name]
    arguments = dict(vars(values))
    settings = _settings_class(function)
    if settings:
        names = [field.name for field in dataclasses.fields(settings)]
        arguments["config"] = settings(**{key: arguments.pop(key) for key in names})
    if function is attack.attack:
        arguments["command"] = command
    return function(**arguments)


def _settings_class(function: Callable[..., int]) -> type | None:
    """The dataclass of the command's ``config`` argument, whose fields become flags; None if there is no such argument."""
    hint = typing.get_type_hints(function).get("config")
    return hint if dataclasses.is_dataclass(hint) else None


def _one_line(error: BaseException) -> str:
    """The message in one line that a terminal shows as it is: what a file names cannot move the cursor or change a colour."""
    line = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)


if __name__ == "__main__":
    sys.exit(main())
