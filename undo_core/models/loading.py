"""Language models as the method sees them: a trunk that gives hidden states and a head that gives logits.

The losses never ask a model for its logits. They take the trunk's final hidden states and the head's parts, so that a
vocabulary of any size costs no ``[tokens, V]`` tensor once a fused backend is in use.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

from undo_core.io.text_files import check_is_content
from undo_core.models.heads import (
    Head,
    UnsupportedHead,
    check_isolation,
    evaluating,
    head_of,
    hidden_states,
    hidden_states_at,
)

__all__ = [
    "Head",
    "UnsupportedHead",
    "architecture",
    "attention_of",
    "build_model",
    "check_isolation",
    "check_vocab_size",
    "configuration",
    "evaluating",
    "forward_flops",
    "head_flops",
    "head_of",
    "hidden_states",
    "hidden_states_at",
    "initialise",
    "load_model",
    "load_tokenizer",
    "make",
    "positions_of",
    "set_attention",
    "skeleton",
    "tokens_of",
    "vocabulary_of",
]


def build_model(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A freshly initialised model of a Hugging Face architecture.

    Args:
        settings: keyword arguments of ``AutoConfig.for_model``; ``model_type`` names the architecture.
        tokenizer: gives the vocabulary size (unless ``settings`` has one) and the special tokens.
        seed: of the initialisation.
    """
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = architecture({"vocab_size": len(tokenizer), **special, **settings})
    rows = config.get_text_config().vocab_size
    if rows < len(tokenizer):
        raise ValueError(f"model.config.vocab_size: got {rows}, wanted at least the tokenizer's {len(tokenizer)}")
    return initialise(config, seed)


def architecture(settings: dict[str, Any]) -> PreTrainedConfig:
    """The Hugging Face configuration that keyword arguments, ``model_type`` among them, describe.

    Raises:
        ValueError: no or an unknown ``model_type``, or what looks like a misspelt setting.
    """
    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise ValueError("model.config: got no model_type, wanted one such as gemma2 or llama")
    config = AutoConfig.for_model(model_type, **settings)
    known = {*inspect.signature(type(config).__init__).parameters, *config.attribute_map}
    for name in settings.keys() - known:  # transformers keeps what it does not know, and takes the default of what was meant
        if near := difflib.get_close_matches(name, known, 1, cutoff=0.85):
            raise ValueError(f"model.config: got {name}, wanted {near[0]}, or another setting of {type(config).__name__}")
    return config


def configuration(settings: Mapping[str, Any]) -> PreTrainedConfig:
    """Of a model that ``settings`` describe: a checkpoint folder ``path``, or the keyword arguments ``config``."""
    path = settings["path"]
    return AutoConfig.from_pretrained(path, trust_remote_code=False) if path else architecture(settings["config"])


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many positions a model has; None where its configuration names no limit (BLOOM, Mamba)."""
    config = config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)  # the latter is MPT's


def initialise(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model of this configuration at the random initialisation of ``seed``; the global generator is left as it was."""
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
    """Whether a token begins or ends texts; where it pads too, transformers would set its embedding to 0 and give it no gradient."""
    ends = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos")]
    return token is not None and any(token in end if isinstance(end, list) else token == end for end in ends)


def make(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of a configuration, float32, as transformers initialises it, with :func:`attention_of`.

    Raises:
        ValueError: transformers cannot make one.
    """
    with _made(config.model_type):
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention_of(config), dtype=torch.float32)


def skeleton(config: PreTrainedConfig, buffers: bool = False) -> PreTrainedModel:
    """The model of a configuration with its parameters on the meta device: names, shapes and ties without contents.

    Args:
        config: of the model; it is copied.
        buffers: whether to compute the buffers (rotary frequencies, for example), which a forward pass needs and no file stores.
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
    """Name the model that transformers' automatic class fails on."""
    try:
        yield
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"model: got {what}, of which transformers' AutoModelForCausalLM makes no model: {error}") from error


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model from a Hugging Face checkpoint folder, in ``dtype``, on the GPU where there is one; remote code is never run.

    A folder keeps the dtype that its stage trained in; :func:`undo_core.training.train` converts what it trains to its own.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with _made(f"{folder}, a {config.model_type}"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=attention_of(config), dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    # Own storage for every parameter: a mapped file may be renamed or removed by a later stage, and aligned memory keeps
    # the sums of a resumed run in the order of the uninterrupted one.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # of a tied one under both of its names
    embedding = model.get_input_embeddings()
    if _ends_texts(config.get_text_config(), getattr(embedding, "padding_idx", None)):
        embedding.padding_idx = None
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, as it is there: nothing needs a padding token, since padding is told by its position."""
    for path in sorted(Path(folder).glob("*.json")):
        check_is_content(path)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def vocabulary_of(model: PreTrainedModel) -> int:
    """Number of logits that the model's head gives; a model may drop rows that its weight has beyond them."""
    return len(head_of(model).weight)


def check_vocab_size(vocab_size: int | None, **rows: int) -> None:
    """Raise a ValueError that names the model where ``vocab_size`` is more than the rows of its head."""
    for name, count in rows.items():
        if vocab_size is not None and not 1 <= vocab_size <= count:
            raise ValueError(
                f"vocab_size: got {vocab_size}, wanted at most the {count} rows of the {name}'s head, and at least 1"
            )


def tokens_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of ids that a tokenizer may give, added tokens and gaps included; a head often has more rows."""
    return max(tokenizer.get_vocab().values()) + 1


def forward_flops(model: PreTrainedModel, length: int, layers: list[nn.Module] | None = None) -> float:
    """FLOPs of one forward pass for one token in a row of ``length`` tokens, head included; or of some layers alone.

    Two per weight of every matrix product, where stacked experts count as the share of them that a token is sent to, plus ``4 * heads *
    head_dim * length`` for scores and values of each layer's softmax attention (the causal half is computed too by the dense kernels in
    use). A backward pass costs twice as much.

    The count is exact, but for rotary positions, for decoders with plain softmax attention in every layer, dense or with experts (Llama,
    Gemma 2, Mixtral). It leaves out what
    linear attention, state spaces and convolutions compute besides the products with their weights, which does not grow with the length
    of the row. It counts modules that text alone does not reach (vision towers, cross-attention), and it counts the chosen experts of
    models that run every expert on every token (Llama 4).
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


_NO_ATTENTION = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp")  # kinds of layers in transformers
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")


def _active_share(config: PreTrainedConfig) -> float:
    """The share of the routed experts that a token is sent to; 1 where the configuration names none."""
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
    """Let ``model`` use an attention kernel of transformers.

    ``eager`` holds ``[batch, heads, length, length]`` scores; ``sdpa`` (PyTorch), ``flash_attention_2`` (the package flash-attn, 16-bit,
    a GPU) and ``flex_attention`` (compiled by PyTorch) do not. An attention softcap (Gemma 2) is kept by eager, flash_attention_2 and
    flex_attention; sdpa has none and would drop it.

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
    """FLOPs of the head's product for one token."""
    return 2.0 * model.get_output_embeddings().weight.numel()


def attention_of(config: Any) -> str | None:
    """The attention implementation to ask for: eager where sdpa would drop a softcap; None lets transformers choose, which takes sdpa
    where the model declares it."""
    return "eager" if _attention_softcap(config) else None


def _attention_softcap(config: Any) -> bool:
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
