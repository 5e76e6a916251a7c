"""What a checkpoint folder says about itself, read before transformers sees it: its configuration and its weight files."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from undo_core.io.untrusted import checked_object, inside, read_object, refused

ADAPTER, CONFIG = "adapter_config.json", "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges*", "*.model"),
)

MOST_FILES = 1 << 13  # of weights that an index may name
MOST_PARTS = 2048  # largest number of layers or labels: transformers builds an object for each before it reads weights
MOST_EXPERTS = 1 << 15  # Doge has 16384, as rows of a table
IMPLEMENTATIONS = (None, "eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")  # what needs no package of kernels
_HERE = (None, "eager", "sdpa", "grouped_mm", "batched_mm")  # what every machine has
_PACKAGED = re.compile(r"(paged\|.*|flash_attention_\d|deepgemm|sonicmoe)\Z")  # transformers' names of what needs one
_COUNTS = re.compile(r"(?:^|_)(?:layers?|blocks?|experts?|labels?|depths?)$")


def check_checkpoint(name: str, folder: Path) -> None:
    """Raises a FileNotFoundError that begins with ``name``, the key or argument, unless ``folder`` holds a checkpoint."""
    if (folder / CONFIG).is_file():
        return
    what, wanted = f"which has no {CONFIG}", "wanted a Hugging Face checkpoint folder"
    if not folder.exists():
        what = "a folder that does not exist"
        wanted += f"; a model of the Hugging Face hub must be downloaded first: hf download ORG/NAME --local-dir {folder}"
    raise FileNotFoundError(f"{name}: got {folder}, {what}; {wanted}")


def read_configuration(folder: str | Path) -> PreTrainedConfig:
    """Returns the configuration of a checkpoint folder; code in the folder is never run.

    What says how a model runs rather than what it computes is not taken from the folder: attention and experts run with what
    every machine has (with a warning if the folder names something else), and outputs are objects without hidden states or
    attentions.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        ValueError: it is not the configuration of a model that transformers knows, its weights are quantised in a way that
            transformers does not know, or :func:`check_settings` refuses it.
    """
    folder = Path(folder)
    check_configuration(folder)
    with refused(f"{folder / CONFIG}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32)
        if (quantised := getattr(config, "quantization_config", None)) is not None:
            _check_quantised(dict(quantised))
    _run_here(config, f"{folder / CONFIG}")
    return config


def _check_quantised(settings: dict[str, Any]) -> None:
    """Raises a ValueError for a method that transformers does not know: it would take the stored integers for weights."""
    from transformers.quantizers import AutoHfQuantizer  # imports the file of every method

    if not AutoHfQuantizer.supports_quant_method(settings):
        got = f"quant_method {settings['quant_method']!r} in quantization_config"
        raise ValueError(f"got {got}, wanted one that transformers knows, or none")


def _run_here(config: PreTrainedConfig, where: str) -> None:
    parts = [config]
    for part in parts:
        parts += [sub for name in part.sub_configs if (sub := getattr(part, name, None)) is not None]
    names = {getattr(part, name, None) for part in parts for name in ("_attn_implementation", "_experts_implementation")}
    if absent := sorted(map(str, names.difference(_HERE))):
        warnings.warn(f"{where}: got {', '.join(absent)}; the model runs with what this machine has", stacklevel=3)
        config._attn_implementation = config._experts_implementation = None  # of all parts
    for part in parts:
        part.return_dict, part.output_hidden_states, part.output_attentions = True, False, False


def check_configuration(folder: Path) -> None:
    """Raises a ValueError if :func:`check_settings` refuses ``config.json``, or a file that it names in its place."""
    settings = read_object(folder / CONFIG)
    check_settings(settings, f"{folder / CONFIG}", stored=True)
    others = settings.get("configuration_files", [])  # transformers may read one of them in place of config.json
    for name in others if isinstance(others, list) else [others]:
        other = inside(folder, name, f"{folder / CONFIG}")
        if other.is_file():
            check_settings(read_object(other), f"{other}", stored=True)


def check_settings(settings: Any, where: str, stored: bool = False) -> None:
    """Raises a ValueError if settings of a model ask for too many parts or experts, or for code from elsewhere.

    ``attn_implementation`` can name kernels on the Hugging Face hub, which transformers would download and run. Those of a
    checkpoint (``stored``) may name what transformers knows and this machine may lack: :func:`read_configuration` drops it.
    """
    rest: list[Any] = [settings]
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            rest += value
        if not isinstance(value, dict):
            continue
        for name, entry in value.items():
            most = MOST_EXPERTS if str(name).endswith(("expert", "experts")) else MOST_PARTS
            if isinstance(entry, (int, float)) and _COUNTS.search(str(name)) and not entry <= most:
                raise ValueError(f"{where}: got {name} {entry}, wanted at most {most}")
            if str(name).endswith("_implementation"):
                for one in entry.values() if isinstance(entry, dict) else [entry]:
                    if one not in IMPLEMENTATIONS and not (stored and isinstance(one, str) and _PACKAGED.match(one)):
                        known = ", ".join(map(str, IMPLEMENTATIONS[1:]))
                        raise ValueError(f"{where}: got {name} {one!r}, wanted none, or one of {known}")
            rest.append(entry)


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint folder that transformers reads; others in the folder are left out.

    Raises:
        FileNotFoundError: the folder has none, or lacks one that its index names.
        ValueError: the folder holds an adapter, which transformers would add to the weights in the files, or names a file
            outside it.
    """
    paths = named_weight_files(folder)
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"model: got {folder}, which has no {path.name}; wanted a checkpoint in safetensors")
    return paths


def named_weight_files(folder: Path) -> list[Path]:
    """Returns the paths of :func:`weight_files` without requiring that they exist.

    A run can be planned from a configuration alone.

    transformers takes the file that the configuration names (``transformers_weights``), else ``model.safetensors``, else the
    files of the index. It does not read an index that lies beside ``model.safetensors``.

    Raises:
        ValueError: the folder holds an adapter, or names a file outside it.
    """
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"model: got {folder}, which holds an adapter ({ADAPTER}); wanted a checkpoint with the adapter merged into it"
        )
    path = folder / (SINGLE if (folder / SINGLE).is_file() or not (folder / INDEX).is_file() else INDEX)
    if (folder / CONFIG).is_file() and (named := read_object(folder / CONFIG).get("transformers_weights")):
        path = inside(folder, named, f"{folder / CONFIG}")
    if path.name.endswith(".index.json") and path.is_file():
        index = read_object(path, weight_map=dict)["weight_map"]
        names = _texts(index.values(), f"{path}")
        if not 0 < len(names) <= MOST_FILES:
            raise ValueError(f"{path}: got an index of {len(names):,} files, wanted 1 to {MOST_FILES:,}")
        return sorted(inside(folder, name, f"{path}") for name in names)
    return [path]


def _texts(values: Any, where: str) -> set[str]:
    for value in values:
        checked_object({"weight_map": value}, where, weight_map=str)
    return set(values)
