"""Building, loading and describing causal language models of transformers.

The method sees a model as a trunk that gives hidden states (:mod:`undo_core.models.trunk`) and a head that gives logits
(:mod:`undo_core.models.heads`). The losses never ask a model for its logits. They take the trunk's final hidden states and the
head's parts, so that with a fused backend no ``[tokens, V]`` tensor exists, whatever the size of the vocabulary.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import difflib
import inspect
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer
from transformers.utils import GENERATION_CONFIG_NAME

from undo_core.io.files import check_size, read_json
from undo_core.io.text_files import check_is_content
from undo_core.io.untrusted import refused
from undo_core.models.folder import (
    CONFIG,
    TOKENIZER_FILES,
    check_configuration,
    check_settings,
    read_configuration,
    weight_files,
)

PARAMETERS_PER_BYTE = 4  # of the weight files: no stored form has less than 2 bits for a parameter
BUFFER_BYTES = 1 << 30  # of a checkpoint's model, or as many as its files have; buffers follow from the configuration alone

MOST_GROWTH = 1 << 10  # how many times longer a tokenizer may make a text; Llama's can 4 times, ALBERT's some hundred


def build_model(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Builds a randomly initialised model of a Hugging Face architecture.

    Args:
        settings: keyword arguments of ``AutoConfig.for_model``; ``model_type`` names the architecture.
        tokenizer: gives the vocabulary size (unless ``settings`` has one) and the special tokens.
        seed: seed of the initialisation.

    Raises:
        ValueError: as :func:`architecture`, or a ``vocab_size`` below the tokenizer's.
    """
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = architecture({"vocab_size": len(tokenizer), **special, **settings})
    size = config.get_text_config().vocab_size
    if size < len(tokenizer):
        raise ValueError(f"model.config.vocab_size: got {size}, wanted at least the tokenizer's {len(tokenizer)}")
    return initialise(config, seed)


def architecture(settings: dict[str, Any]) -> PreTrainedConfig:
    """Returns the Hugging Face configuration that ``settings`` (keyword arguments, ``model_type`` among them) describe.

    Raises:
        ValueError: ``model_type`` is missing or unknown, a setting looks misspelt, or
            :func:`undo_core.models.folder.check_settings` refuses one.
    """
    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise ValueError("model.config: got no model_type, wanted one such as gemma2 or llama")
    check_settings(settings, "model.config")
    with refused("model.config"):
        config = AutoConfig.for_model(model_type, **settings)
    known = {*inspect.signature(type(config).__init__).parameters, *config.attribute_map}
    for name in settings.keys() - known:  # transformers silently keeps a misspelt setting and uses the default of the right one
        if near := difflib.get_close_matches(name, known, 1, cutoff=0.85):
            raise ValueError(f"model.config: got {name}, wanted {near[0]}, or another setting of {type(config).__name__}")
    return config


def configuration(settings: Mapping[str, Any]) -> PreTrainedConfig:
    """Returns a model's configuration: that of the folder ``path``, else the one that the arguments ``config`` describe."""
    path = settings["path"]
    return read_configuration(path) if path else architecture(settings["config"])


def positions_of(config: PreTrainedConfig) -> int | None:
    """Returns the longest input that a model can read, in tokens; None if its configuration names no limit (BLOOM, Mamba)."""
    config = config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)  # the latter is MPT's


def initialise(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Builds a model of this configuration, initialised at random from ``seed``; torch's global generator is left as it was."""
    with _made(config.model_type):
        text = config.get_text_config()
    pad = getattr(text, "pad_token_id", None)
    try:
        if _ends_texts(text, pad):
            text.pad_token_id = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = make(config)
    finally:
        if pad is not None:
            text.pad_token_id = pad
    if pad is not None:
        model.config.get_text_config().pad_token_id = pad
    return model


def _ends_texts(config: PreTrainedConfig, token: int | None) -> bool:
    """Whether ``token`` begins or ends texts. If it also pads, transformers would keep its embedding at 0, untrained."""
    ends = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos")]
    return token is not None and any(token in end if isinstance(end, list) else token == end for end in ends)


def make(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds the causal language model of a configuration, in float32, initialised by transformers, with :func:`attention_of`.

    Raises:
        ValueError: transformers has no causal language model for this configuration.
    """
    with _made(config.model_type):
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention_of(config), dtype=torch.float32)


def skeleton(config: PreTrainedConfig, buffers: bool = False) -> PreTrainedModel:
    """Builds the model of a configuration with its parameters on the meta device: names, shapes and ties, but no contents.

    Args:
        config: the model's configuration; it is copied.
        buffers: whether to compute the buffers (rotary frequencies, for example), which a forward pass needs and no file
            stores.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    config = copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]):
        if not buffers:
            with torch.device("meta"):
                return make(config)
        hook = register_module_parameter_registration_hook(to_meta)
        try:
            model = make(config)
        finally:
            hook.remove()
    model.tie_weights()
    return model


@contextlib.contextmanager
def _made(what: str) -> Iterator[None]:
    """Turns an error of transformers' automatic class into a ValueError that names the model ``what``."""
    with refused(
        f"model: got {what}, of which transformers' AutoModelForCausalLM makes no model",
        SafetensorError,
    ):
        yield


def sized_skeleton(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """Returns the :func:`skeleton` of a checkpoint folder, whose size is in proportion to its weight files.

    Raises:
        ValueError: the model has more than :data:`PARAMETERS_PER_BYTE` parameters for each byte of the files, or buffers of more
            than :data:`BUFFER_BYTES` and more than the files.
    """
    stored = sum(path.stat().st_size for path in weight_files(folder))
    model = skeleton(config)
    parameters, buffers = sum(p.numel() for p in model.parameters()), sum(b.nbytes for b in model.buffers())
    if parameters > PARAMETERS_PER_BYTE * stored:
        raise ValueError(
            f"model: got {folder}, whose configuration has {parameters:,} parameters and whose files have {stored:,} bytes; "
            f"wanted at most {PARAMETERS_PER_BYTE} parameters a byte: a file may be cut off"
        )
    if buffers > (most := max(BUFFER_BYTES, stored)):
        raise ValueError(f"model: got {folder}, whose model has {buffers:,} bytes of buffers, wanted at most {most:,}")
    return model


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a model from a Hugging Face checkpoint folder in ``dtype``, onto the GPU if there is one; remote code is never run.

    Folders are stored in the dtype that their stage trained in; :func:`undo_core.training.train` converts the model to its own.

    Raises:
        ValueError: the folder is not a checkpoint that can be read, or lacks a weight, which transformers would draw at random.
    """
    config = read_configuration(folder)
    sized_skeleton(Path(folder), config)
    kernel = attention_of(config)
    with _made(f"{folder}, a {config.model_type}"):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            **({} if kernel is None else {"attn_implementation": kernel}),
        )  # fmt: skip
        if (generation := Path(folder) / GENERATION_CONFIG_NAME).is_file():  # transformers goes on if it cannot be read
            model.generation_config = GenerationConfig.from_dict(read_json(generation))
    if lacking := sorted(found["missing_keys"]):
        raise ValueError(
            f"model: got {folder}, which has no {lacking[0]} ({len(lacking)} weights in all); wanted a whole checkpoint"
        )
    # Give every parameter its own storage: a later stage may rename or remove the mapped file, and aligned memory makes a
    # resumed run add in the same order as an uninterrupted one.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # tied names share the parameter, so they stay tied
    embedding = model.get_input_embeddings()
    if _ends_texts(config.get_text_config(), getattr(embedding, "padding_idx", None)):
        embedding.padding_idx = None
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def growth_of(backend: Tokenizer) -> int:
    """Returns a bound on how many times a tokenizer's normalizers and what it puts around a text can make the text longer.

    The memory of an encoded text is in proportion to it. Few bytes could ask for more memory than there is.
    """
    parts = (backend.normalizer, backend.post_processor)
    grown, rest = 1, [json.loads(part.__getstate__()) for part in parts if part is not None]
    for part in rest:  # which grows by the parts within it
        rest += [*(part.get("normalizers") or ()), *(part.get("processors") or ())]
        if part["type"] in ("Replace", "Prepend"):
            grown *= 1 + len((part.get("content") or part.get("prepend") or "").encode())
        elif part["type"] == "Precompiled":  # a trie, whose size comes first, and the texts that it leads to
            table = base64.b64decode(part["precompiled_charsmap"])
            grown *= max(map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")), default=1) or 1
        elif part["type"] == "TemplateProcessing":
            added = {name: len(token["ids"]) for name, token in part["special_tokens"].items()}
            grown *= max(
                1, sum(added[piece["SpecialToken"]["id"]] if "SpecialToken" in piece else 1 for piece in part["single"])
            )
    return grown


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a checkpoint folder; it needs no padding token, since sequences record where their text ends."""
    folder = Path(folder)
    for path in sorted({path for name in (*TOKENIZER_FILES, "*.json", "*.txt", "*.jinja") for path in folder.glob(name)}):
        if path.is_file():
            check_is_content(path)
            check_size(path)
    if (folder / CONFIG).is_file():  # transformers reads it to find the tokenizer's class
        check_configuration(folder)
    with refused(f"tokenizer: got {folder}, of which transformers' AutoTokenizer makes no tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        grown = growth_of(tokenizer.backend_tokenizer) if tokenizer.is_fast else 1
    if grown > MOST_GROWTH:
        raise ValueError(f"tokenizer: got {folder}, which can make a text {grown:,} times longer, wanted at most {MOST_GROWTH}")
    return tokenizer


def check_vocab_size(vocab_size: int | None, **sizes: int) -> None:
    """Raises a ValueError if ``vocab_size`` exceeds the vocabulary of a head or is below 1.

    Args:
        vocab_size: number of logits to compare; None passes.
        sizes: vocabulary entries of each head, by the name of its model (``student=...``).
    """
    for name, count in sizes.items():
        if vocab_size is not None and not 1 <= vocab_size <= count:
            raise ValueError(
                f"vocab_size: got {vocab_size}, wanted at most the {count} vocabulary entries of the {name}'s head, and at "
                "least 1"
            )


def tokens_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the largest id of a tokenizer plus one, added tokens and gaps included; a head often has more entries."""
    return max(tokenizer.get_vocab().values()) + 1


def forward_flops(model: PreTrainedModel, length: int, layers: list[nn.Module] | None = None) -> float:
    """Returns the FLOPs per token of a forward pass over ``length`` tokens, head included; or those of ``layers`` alone.

    Counts two per weight of every matrix product; of stacked experts only the share that a token is sent to. Adds ``4 * heads *
    head_dim * length`` for scores and values of each layer's softmax attention (the dense kernels in use compute the masked
    half of causal attention too). A backward pass costs twice as much.

    Except for rotary positions, the count is exact for decoders with plain softmax attention in every layer, dense or with
    experts (Llama, Gemma 2, Mixtral). It leaves out what linear attention, state spaces and convolutions compute besides the
    products with their weights; this does not grow with the length. It includes modules that text does not reach (vision
    towers, cross-attention). It counts only the chosen experts, also for models that run every expert on every token (Llama 4).
    """
    config = model.config.get_text_config()
    parts = [model] if layers is None else layers
    share = _active_share(config)
    weights = 0.0
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, (nn.Linear, Conv1D)):
            weights += module.weight.numel()
        elif "Expert" in type(module).__name__:
            matrices = (p for name, p in module.named_parameters(recurse=False) if p.ndim >= 2 and "bias" not in name)
            weights += share * sum(p.numel() for p in matrices)
        elif "Router" in type(module).__name__:
            weights += sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 2)
    if layers is None:
        count = getattr(config, "num_hidden_layers", 0)
        kinds = getattr(config, "layer_types", None) or []
    else:
        count, kinds = len(layers), [getattr(layer, "layer_type", None) for layer in layers]
    each = config.per_layer_config[:count] if getattr(config, "is_heterogeneous", False) else [config] * count
    attending = [own for own, kind in itertools.zip_longest(each, kinds[:count]) if kind not in _NO_ATTENTION]
    return 2.0 * weights + 4.0 * sum(map(_attention_width, attending)) * length


_NO_ATTENTION = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp")  # transformers' layer_types
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")


def _active_share(config: PreTrainedConfig) -> float:
    """Returns the share of the routed experts that a token is sent to; 1 if the configuration names no experts."""
    config = getattr(config, "ffn_config", config)  # DBRX
    known, active = (
        next((value for name in names if (value := getattr(config, name, None))), None) for names in (_EXPERTS, _ACTIVE_EXPERTS)
    )
    if isinstance(known, int) and isinstance(active, int):
        return min(1.0, active / known)
    return 1.0


def _attention_width(config: PreTrainedConfig) -> int:
    heads = getattr(config, "num_attention_heads", None)  # Mamba has none
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0


def set_attention(model: PreTrainedModel, kernel: str) -> None:
    """Makes ``model`` use an attention kernel of transformers.

    ``eager`` holds scores of ``[batch, heads, length, length]``. ``sdpa`` (PyTorch), ``flash_attention_2`` (needs the package
    flash-attn, 16 bits and a GPU) and ``flex_attention`` (compiled by PyTorch) do not. eager, flash_attention_2 and
    flex_attention apply an attention softcap (Gemma 2); sdpa would drop it.

    Raises:
        ValueError: sdpa for a model with an attention softcap, or a kernel that the model or the installation does not have.
    """
    if kernel == "sdpa" and _attention_softcap(model.config):
        raise ValueError(
            f"attention: got sdpa for {type(model).__name__}, whose attention has a softcap that sdpa would drop; "
            f"wanted eager, flash_attention_2 or flex_attention"
        )
    try:
        model.set_attn_implementation(kernel)
    except (ValueError, ImportError) as error:
        raise ValueError(f"attention: got {kernel}, wanted a kernel that can be used here: {error}") from None
    if model.config._attn_implementation != kernel:
        raise ValueError(f"attention: got {kernel}, wanted a kernel that {type(model).__name__} has")


def head_flops(model: PreTrainedModel) -> float:
    """Returns the FLOPs of the head's matrix product for one token."""
    return 2.0 * model.get_output_embeddings().weight.numel()


def attention_of(config: Any) -> str | None:
    """Returns the attention kernel to ask for: eager for a model with an attention softcap, which sdpa would drop; else None.

    With None transformers chooses: sdpa, if the model supports it.
    """
    return "eager" if _attention_softcap(config) else None


def _attention_softcap(config: Any) -> bool:
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
