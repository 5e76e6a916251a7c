"""Help beyond ``--help``: first steps for a call without arguments, suggestions for misspelt names, and shell completion."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import importlib.util
import pydoc
import re
from argparse import Action
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from undo_core.io.untrusted import lacks_memory
from undo_core.pipeline.config_files import read_settings

FIRST_STEPS = """undo removes a capability from a language model so that fine-tuning cannot cheaply bring it back.

  undo doctor                                  what works on this machine
  undo plan configs/arithmetic-cpu.yaml        what the demo would do and cost, without running it
  undo run configs/arithmetic-cpu.yaml         the demo; then open runs/arithmetic-cpu/report/report.html
  undo run FILE --noise.alphas='[0.6]'         any key of a configuration can be given as a flag
  undo plan configs/hf-template.yaml           your own checkpoint and text, once the file names them
  undo noise CHECKPOINT OUTPUT --alpha=0.6     any stage by itself, on checkpoint folders
  undo attack CHECKPOINT --help                how easily relearning brings back what a checkpoint from anywhere forgot
  undo completion bash                         a script with which the shell completes commands and keys
  undo --help; undo run --help                 all commands; all keys of a configuration"""

ALIASES = {  # names that other libraries give to settings, and what these are called here
    **dict.fromkeys(("learning_rate", "learning_rates"), ("lr", "rates")),
    **dict.fromkeys(("max_steps", "num_steps", "iterations", "epochs", "num_train_epochs"), ("steps", "headline_step")),
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size"), ("batch_size",)),
    **dict.fromkeys(("max_length", "max_seq_length", "seq_length", "sequence_length"), ("length",)),
    **dict.fromkeys(("model_name_or_path", "pretrained_model_name_or_path"), ("path",)),
    **{
        "gradient_checkpointing": ("activation_checkpointing",),
        "lr_scheduler_type": ("schedule",),
        "warmup_steps": ("warmup",),
    },
    **{"eval_steps": ("eval_every",), "output_dir": ("output",), "torch_dtype": ("precision",), "optim": ("optimizer",)},
}
SHELLS = ("bash", "zsh", "tcsh")

_FLAG = re.compile(r"unrecognized arguments: --(?P<key>[^\s=]+)")
_UNKNOWN = (  # jsonargparse's messages about unknown names
    _FLAG,
    re.compile(r"does not accept option '(?P<key>[^']+)'"),
    re.compile(r"invalid choice: '(?P<key>[^']+)' \(choose from (?P<choices>[^)]*)\)"),
    re.compile(r"class_path '(?P<home>[\w.]+)': Option '(?P<key>[^']+)' is not accepted"),
)


_AMBIGUOUS = re.compile(r"ambiguous option: --(?P<given>[^\s=]+.*?) could match (?P<flags>--[\w.]+\+?(, --[\w.]+\+?)*)")


_CONTINUES = "the same command continues"
_ROOM = f"free some space, and {_CONTINUES}"
_ACCESS = f"make it accessible, and {_CONTINUES}"
_MEMORY = f"free some memory, and {_CONTINUES}"
_HANDLES = f"allow more open files (ulimit -n), and {_CONTINUES}"
_TO_DO = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _ROOM),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _ACCESS),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _HANDLES),
    errno.ENOMEM: _MEMORY,
    **dict.fromkeys((errno.EIO, errno.ESTALE), f"once the disk works again, {_CONTINUES}"),
}


class HelpFormatter(DefaultHelpFormatter):
    """Help formatter that wraps the paragraphs of a description and leaves its indented examples unchanged.

    It leaves out the forms of flags that end in +, with which jsonargparse appends to a list.
    """

    def _format_action_invocation(self, action: Action) -> str:
        flags = action.option_strings
        action.option_strings = [flag for flag in flags if not flag.endswith("+")]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = flags

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = re.split(r"\n\s*\n", text.strip("\n"))
        return "\n\n".join(
            part if part.startswith(" ") else super(HelpFormatter, self)._fill_text(part, width, indent) for part in parts
        )


_KEYED = re.compile(
    r"^(?:Problem with given class_path '(?P<home>[\w.]+)':\s+)?Parser key \"(?P<key>[^\"]*)\":\s+(?P<rest>.*)$"
)
_UNION = re.compile(
    r"^Does not validate against any of the Union subtypes.*? Errors: - (?P<errors>.*) Given value type: .*? Given value: (?P<got>.*)$"
)
_WRONG = (  # what jsonargparse says about a value of another type
    re.compile(r"^Expected a (?P<type><class '\w+'>|typing\.Literal\[.*?\])(?:\. Got value: (?P<got>.*))?$"),
    re.compile(r"^(?P<type>Expected a dot import path string): (?P<got>.*)$"),
    re.compile(r"^(?P<type>Problem with given class_path) '(?P<got>.*?)': No module named .*$"),
    re.compile(r"^(?P<type>Unable to load config) '(?P<got>.*?)' - .*$"),
)
# Said of the other classes that settings can have, about none of the settings that were given.
_OF_ANOTHER_CLASS = re.compile(r"^(?:Subclasses are disabled for|Import path \S+ does not correspond to a subclass of) ")
_MAPPING = "a mapping, as in '{KEY: VALUE}'"
_TYPES = {  # how a type is written
    **{
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
        "NoneType": "null",
        "dict": _MAPPING,
    },
    **dict.fromkeys(("Expected a dot import path string", "Problem with given class_path", "Unable to load config"), _MAPPING),
}


def of_types(message: str) -> str:
    """Rewrites the parser's message about a value of a wrong type: the key, what came, what was expected and how to write it.

    Where the class of the settings depends on their ``kind``, only what is said about the given kind is kept. A message of another
    form is returned unchanged.
    """
    keyed = _KEYED.match(message)
    if keyed is None:
        return message
    union = _UNION.match(keyed["rest"])
    if union is None:
        inner = of_types(keyed["rest"]) if _KEYED.match(keyed["rest"]) else _wrong([keyed["rest"]], None)
        return message if inner in (None, keyed["rest"]) else f"{keyed['key']}: {inner}"
    errors = re.split(r" - (?=Expected a |Problem with |Subclasses are |Import path |Does not )", union["errors"])
    errors = [error for error in errors if not _OF_ANOTHER_CLASS.match(error)]
    kinds = [error for error in errors if (inner := _KEYED.match(error)) and inner["key"] == "kind"]
    if kinds and len(kinds) == len(errors):
        said = f"kind: {_wrong([_KEYED.sub(lambda inner: inner['rest'], error) for error in kinds], None)}"
    else:
        own = [error for error in errors if error not in kinds]
        said = _wrong(own, union["got"]) or "; ".join(map(of_types, own))
    return f"{keyed['key']}: {said}"


def _wrong(errors: Sequence[str], got: str | None) -> str | None:
    """What came and what was expected, from an error for each accepted type; None if one of them says something else."""
    found = [next((match for pattern in _WRONG if (match := pattern.match(error))), None) for error in errors]
    if not found or None in found:
        return None
    inner = [
        match for match in found if match["got"] not in (None, got)
    ]  # about a part of what came, such as an entry of a list
    found = inner or found
    came = inner[0]["got"] if inner else got or ""
    came = {"": "''", "None": "null"}.get(came, came)
    choices = [name for match in found for name in re.findall(r"'([^']*)'", match["type"]) if "Literal" in match["type"]]
    wanted = [f"one of {', '.join(choices)}"] if choices else []
    for match in found:
        if "Literal" not in match["type"]:
            name = match["type"].removeprefix("<class '").removesuffix("'>")
            wanted.append(f"a list, as in '[{came}]'" if name == "list" else _TYPES.get(name, name))
    near = difflib.get_close_matches(came, choices, n=1)
    either = ", or " if any("," in name for name in wanted) else " or "
    return f"got {came}, wanted {either.join(dict.fromkeys(wanted))}" + (f"; did you mean {near[0]}?" if near else "")


def explained(message: str, command: str, parser_of: Callable[[str], ArgumentParser], files: Sequence[str] = ()) -> str:
    """Returns ``message`` and, if it reports a name that ``command`` does not know, adds the nearest known name.

    A name that stands in one of the ``files`` of settings, of which later ones override earlier ones, is reported with the file.
    """
    message = of_types(message)
    if match := _AMBIGUOUS.search(message):
        flags = [flag for flag in match["flags"].split(", ") if not flag.endswith(("+", ".help"))]
        said = f"ambiguous option: --{match['given']} could match {', '.join(flags)}"
        if len(flags) == 1:
            said = f"unrecognized arguments: --{match['given']}; did you mean {flags[0].removeprefix('--')}?"
        return message[: match.start()] + said + message[match.end() :]
    for pattern in _UNKNOWN:
        if match := pattern.search(message):
            given = match.groupdict()
            if given.get("choices"):
                found = difflib.get_close_matches(given["key"], re.findall(r"[\w-]+", given["choices"]), n=1)
            elif given.get("home"):
                found = nearest(given["key"], [field.name for field in dataclasses.fields(pydoc.locate(given["home"]))])
            else:
                found = nearest(given["key"], keys(command, parser_of))
            if pattern is not _FLAG and not given.get("choices"):
                message = "".join(f"{file}: " for file in _with_key(given["key"].split("."), files)) + message
            return f"{message}; did you mean {' or '.join(found)}?" if found else message
    return message


def _with_key(path: Sequence[str], files: Sequence[str]) -> list[str]:
    """The last of the files of settings in which a mapping, at any depth, has this path; empty if none has."""

    def has(node: Any) -> bool:
        if not isinstance(node, dict):
            return False
        inner = node
        for part in path:
            if not isinstance(inner, dict) or part not in inner:
                return any(map(has, node.values()))
            inner = inner[part]
        return True

    return [file for file in files if has(read_settings(file))][-1:]


def what_to_do(error: BaseException) -> str:
    """What the user can do about an error of the system, to be added to its message; empty for another error."""
    advice = _TO_DO.get(error.errno) if isinstance(error, OSError) else None
    if isinstance(error, ImportError) and "failed to map segment" in str(error):  # a library that finds no room
        advice = _MEMORY
    return f"; {advice}" if advice else ""


def lack_of_memory(error: BaseException) -> str:
    """One line about an allocation that failed, or that of a thread's stack; empty for another error."""
    if not lacks_memory(error):
        return ""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    wanted = f" ({asked[1]} were asked for)" if asked else ""
    return f"out of memory{wanted}; `undo plan CONFIG --memory SIZE` finds what fits, and {_CONTINUES}"


def nearest(key: str, known: Sequence[str]) -> list[str]:
    """Finds the known keys that a misspelt ``key`` may mean.

    Returns: For a single part that is the last part of keys, up to three of these. Otherwise the known key whose parts are closest
        to those of ``key``, one by one; if some part has no close match, up to three keys whose last part is close to the last part
        of ``key``, those below the parts that matched if there are any. A name in :data:`ALIASES` is closest to what it stands for.
    """
    paths = [name.split(".") for name in known]
    for leaf in (key, *ALIASES.get(key, ())):
        if inner := [name for name, path in zip(known, paths, strict=True) if path[1:] and path[-1] == leaf]:
            return inner[:3]
    parts, path = key.split("."), []
    for depth, part in enumerate(parts):
        siblings = sorted({other[depth] for other in paths if len(other) > depth and other[:depth] == path})
        if not siblings and path:  # a mapping whose keys the user chooses
            named = ".".join([*path, *parts[depth:]])
            return [named] if named != key else []
        path += _closest(part, siblings, 0.6)
        if len(path) == depth:
            break
    else:
        return [".".join(path)]
    leaf = _closest(parts[-1], sorted({path[-1] for path in paths}), 0.8)
    found = [name for name in known if name.split(".")[-1:] == leaf]
    return [name for name in found if name.startswith(".".join(path) + ".")][:3] or found[:3]


def _closest(part: str, known: Sequence[str], cutoff: float) -> list[str]:
    """The known part that ``part`` most likely means, in a list that is empty if there is none."""
    meant = [name for name in ALIASES.get(part, ()) if name in known]
    return [part] if part in known else meant[:1] or difflib.get_close_matches(part, known, n=1, cutoff=cutoff)


def keys(command: str, parser_of: Callable[[str], ArgumentParser]) -> list[str]:
    """The keys that ``command`` takes; for ``sweep`` also the keys of its runs."""
    found: dict[str, None] = {}
    for name in (command, "run") if command == "sweep" else (command,):
        parser = parser_of(name)._subcommands_action._name_parser_map.get(name)
        actions = [] if parser is None else parser._actions
        found |= dict.fromkeys(option[2:] for action in actions for option in action.option_strings if option.startswith("--"))
    return [key for key in found if not key.endswith(("help", "+"))]


def completion(parser: ArgumentParser, shell: str) -> str:
    """Returns the script with which ``shell`` completes commands and keys: ``eval "$(undo completion bash)"``.

    Raises:
        ValueError: ``shell`` is unknown.
        ModuleNotFoundError: shtab is not installed.
    """
    if shell not in SHELLS:
        raise ValueError(f"completion: got {shell!r}, expected one of {', '.join(SHELLS)}")
    if importlib.util.find_spec("shtab") is None:
        raise ModuleNotFoundError("completion: needs shtab; pip install 'undo-core[completion]'")
    return parser.get_completion_script(f"shtab-{shell}")
