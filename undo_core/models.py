"""Language models as the method sees them: a trunk that gives hidden states and a head that gives logits.

The losses never ask a model for its logits. They take the trunk's final hidden states and the head's parts, so that a
vocabulary of any size costs no ``[tokens, V]`` tensor once a fused backend is in use.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

VERIFIED_ROWS = 4096  # of a head, in float64 at once


@dataclass(frozen=True)
class Head:
    """The vocabulary head of a causal language model: ``logits = softcap(scale * (hidden @ weight.T + bias))``.

    Attributes:
        weight: ``[V, d]``.
        bias: ``[V]`` or None.
        scale: factor on the products.
        softcap: ``c`` of ``c * tanh(z / c)``, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    def options(self, prefix: str = "") -> dict[str, Any]:
        """The keyword arguments of the fused ops, their names prefixed (``"student_"``, ``"teacher_"``)."""
        return {f"{prefix}bias": self.bias, f"{prefix}scale": self.scale, f"{prefix}softcap": self.softcap}


class UnsupportedHead(ValueError):
    """The model's own logits are not reproduced by its weight, bias, scale and softcap."""


def head_of(model: PreTrainedModel) -> Head:
    """The head of ``model``, compared once with the model's own logits on a few tokens.

    Raises:
        UnsupportedHead: the head does something else than scale, bias and softcap; computing on would be silently wrong.
    """
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        raise UnsupportedHead(
            f"model: got a {type(model).__name__} whose output layer is {type(output).__name__}, wanted a Linear head"
        )
    head = Head(output.weight, output.bias, *head_constants(model.config))
    if not getattr(model, "_undo_head_verified", False):
        _verify_head(model, head)
        model._undo_head_verified = True
    return head


def head_constants(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Scale and softcap of the head, as the configuration names them."""
    config = config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is None:
        divisor = getattr(config, "logits_scaling", None)  # Granite divides
        scale = 1.0 if divisor is None else 1.0 / divisor
    return float(scale), getattr(config, "final_logit_softcapping", None)


@torch.no_grad()
def _verify_head(model: PreTrainedModel, head: Head) -> None:
    device = head.weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(8, device=device).mul(7919).remainder(vocabulary).view(1, 8)
    training = model.training
    model.eval()
    try:
        wanted = model(input_ids=ids, use_cache=False).logits.double()
        hidden = hidden_states(model, ids).double()
    finally:
        model.train(training)
    parts = head.weight.split(VERIFIED_ROWS)  # a head in float64 would be the largest tensor of a run
    got = torch.cat([hidden @ part.double().T for part in parts], dim=-1)
    if head.bias is not None:
        got = got + head.bias.double()
    got = got * head.scale
    if head.softcap is not None:
        got = head.softcap * torch.tanh(got / head.softcap)
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 3e-2
    error = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))
    if not error <= tolerance:
        raise UnsupportedHead(
            f"model: {type(model).__name__}'s logits differ from softcap(scale * (hidden @ W.T + b)) by {error:.2g} of their largest "
            f"entry (scale {head.scale:g}, softcap {head.softcap}); its head does something that is not supported"
        )


def hidden_states(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Final hidden states ``[batch, length, d]``, after the last norm; the head is not run.

    Where ``position_ids`` start again, a document begins that does not attend to what stands before it: transformers makes that
    mask from the positions, without an attention mask and a cache. A sdpa that was causal without a mask gets one of
    ``[batch, length, length]`` then.

    Raises:
        ValueError: positions that start again for a model or an attention kernel that would let documents attend to each other.
    """
    options = {}
    if position_ids is not None:
        check_isolation(model)
        options["position_ids"] = position_ids
    return model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options).last_hidden_state


def hidden_states_at(
    model: PreTrainedModel,
    layers: Sequence[int],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """:func:`hidden_states`, and those after each of ``layers`` layers, as transformers counts them: 0 for the embeddings, and the last
    after the final norm."""
    options = {}
    if position_ids is not None:
        check_isolation(model)
        options["position_ids"] = position_ids
    output = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=True, **options
    )
    return output.last_hidden_state, [output.hidden_states[layer] for layer in layers]


@torch.no_grad()
def check_isolation(model: PreTrainedModel) -> None:
    """Compare once, per attention kernel: another first document in two packed rows must not change the second's hidden states.

    Raises:
        ValueError: it does; the model does not know position ids, or its kernel does not read them.
    """
    kernel = model.config._attn_implementation
    if getattr(model, "_undo_isolation_verified", None) == kernel:
        return
    embedding = model.get_input_embeddings().weight
    at = torch.arange(16, device=embedding.device)
    ids = at.mul(7919).remainder(embedding.shape[0]).repeat(2, 1)
    other = torch.where(at < 8, (ids + 1).remainder(embedding.shape[0]), ids)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        leaks = []
        for positions in (None, at.remainder(8).repeat(2, 1)):
            given = {} if positions is None else {"position_ids": positions}
            a, b = (model.base_model(input_ids=x, use_cache=False, **given).last_hidden_state[:, 8:] for x in (ids, other))
            leaks.append(float((a - b).abs().max()))
        works = not leaks[1] > 0.1 * leaks[0]  # rounding, at most; a diverged model is not this check's concern
    except TypeError:  # no such argument
        works = False
    finally:
        for module, training in modes:
            module.training = training
    if not works:
        raise ValueError(
            f"position_ids: got rows of isolated documents for {type(model).__name__} with attention {kernel}, which lets them attend "
            f"to each other; wanted data.documents shared, or another model or attention kernel (eager, sdpa, flex_attention)"
        )
    model._undo_isolation_verified = kernel


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
    if config.vocab_size < len(tokenizer):
        raise ValueError(f"model.config.vocab_size: got {config.vocab_size}, wanted at least the tokenizer's {len(tokenizer)}")
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
    """How many positions a model has; None where its configuration names no limit (BLOOM)."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def initialise(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model of this configuration at the random initialisation of ``seed``; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention_of(config), dtype=torch.float32)


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model from a Hugging Face checkpoint folder, in ``dtype``, on the GPU where there is one; remote code is never run.

    A folder keeps the dtype that its stage trained in; :func:`undo_core.training.train` converts what it trains to its own.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention_of(config), dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    # Own storage for every parameter: a mapped file may be renamed or removed by a later stage, and aligned memory keeps
    # the sums of a resumed run in the order of the uninterrupted one.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    model.tie_weights()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder; a missing pad token is replaced by the end-of-text token's id."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_of(model: PreTrainedModel) -> int:
    """Number of rows of the model's head."""
    return model.get_output_embeddings().weight.shape[0]


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

    Two per weight of every matrix product, plus ``4 * heads * head_dim * length`` for scores and values of each layer's
    attention (the causal half is computed too by the dense kernels in use). A backward pass costs twice as much.
    """
    config = model.config.get_text_config()
    parts = [model] if layers is None else layers
    count = config.num_hidden_layers if layers is None else len(layers)
    weights = sum(
        module.weight.numel() for part in parts for module in part.modules() if isinstance(module, (nn.Linear, Conv1D))
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2.0 * weights + 4.0 * count * config.num_attention_heads * head_dim * length


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


def attention_of(config: Any) -> str:
    """The attention implementation that computes what the configuration asks for."""
    return "eager" if _attention_softcap(config) else "sdpa"


def _attention_softcap(config: Any) -> bool:
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
