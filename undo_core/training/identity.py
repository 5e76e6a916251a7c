"""Identity of a training run: everything that decides its result, as JSON values.

It is made of contents, never of file names, so that a checkpoint folder is resumed only by the run that made it.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import json
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from undo_core.io.files import hash_json
from undo_core.models.adapters import adapter_settings

# Entries of a model's configuration that may change when the model is saved and loaded.
_NOT_CONTENT = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names and float32 values of all parameters; the same for a model in memory, streamed or on disk.

    Time: about a second per gigabyte of float32 values.
    """
    reader = getattr(model, "_undo_reader", None)
    return reader.digest() if reader is not None else digest_of((n, p.detach().float()) for n, p in model.named_parameters())


def digest_of(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over the names and values of ``(name, tensor)`` pairs."""
    return hash_json({name: hashlib.sha256(t.cpu().contiguous().numpy()).hexdigest() for name, t in named})


def model_identity(model: nn.Module, trained: Iterable[nn.Parameter] | None = None) -> dict[str, str]:
    """Digests of a model's weights, saved buffers, configuration, adapter settings and names of trained parameters."""
    saved = model.state_dict().keys() if not hasattr(model, "_undo_reader") else ()
    buffers = {name: buffer.detach().double() for name, buffer in model.named_buffers() if name in saved}
    found = {"weights": weights_digest(model)}
    if buffers:
        found["buffers"] = digest_of(buffers.items())
    if hasattr(getattr(model, "config", None), "to_json_string"):
        found["config"] = config_digest(model.config)
        found["attention"] = str(getattr(model.config, "_attn_implementation", None))
    if adapters := adapter_settings(model):
        found["adapters"] = hash_json(adapters)
    if trained is not None:
        chosen = {id(parameter) for parameter in trained}
        found["trained"] = hash_json([name for name, parameter in model.named_parameters() if id(parameter) in chosen])
    return found


def config_digest(config: PreTrainedConfig) -> str:
    """SHA-256 over the entries of a configuration that affect the computation; the same before and after saving."""
    return hash_json(_content(json.loads(config.to_json_string(use_diff=True))))


def function_identity(function: Callable[..., Any], values: bool = True) -> str:
    """Digest of a Python function: its code, its defaults and, with ``values``, what it closes over.

    Of the latter, only numbers, strings and functions count; other objects are ignored, as are variables that it assigns
    itself.
    """
    return hash_json(_function(function, values, set()))


def _content(config: Any) -> Any:
    if isinstance(config, dict):
        return {name: _content(value) for name, value in config.items() if name not in _NOT_CONTENT}
    return config


def _function(function: Any, values: bool, seen: set[int]) -> Any:
    if isinstance(function, functools.partial):
        arguments = [_value(value, values, seen) for value in (*function.args, *function.keywords.values())]
        return [_function(function.func, values, seen), arguments]
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        return f"{type(function).__module__}.{type(function).__qualname__}"
    if id(function) in seen:
        return function.__qualname__
    seen.add(id(function))
    changed = {entry.argval for entry in dis.get_instructions(function) if entry.opname == "STORE_DEREF"}
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    kept = {}
    for name, cell in cells.items() if values else ():
        try:
            kept[name] = "changed" if name in changed else _value(cell.cell_contents, values, seen)
        except ValueError:  # the cell is not set yet
            kept[name] = "empty"
    defaults = [_value(value, values, seen) for value in function.__defaults__ or ()]
    return [function.__module__, function.__qualname__, _code(function.__code__), defaults, kept]


def _value(value: Any, values: bool, seen: set[int]) -> Any:
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return _function(value, values, seen)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return repr(value)
    if isinstance(value, (tuple, frozenset)):
        return [_value(part, values, seen) for part in (value if isinstance(value, tuple) else sorted(value, key=repr))]
    return None


def _code(code: types.CodeType) -> list[Any]:
    constants = [_code(c) if isinstance(c, types.CodeType) else _value(c, False, set()) for c in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]
