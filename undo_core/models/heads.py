"""The vocabulary head of a causal language model, as weight, bias, scale and softcap.

What the head computes is measured once per model. Its matrix product is compared with float64 on a few tokens; then known values
are put in the place of that product, and scale and softcap are read off the logits that come out. No table of architectures is
needed, and a head that does more than bias, scale and softcap raises :class:`UnsupportedHead`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from undo_kernels.ops.checks import is_dtensor

from undo_core.models.adapters import Products, bare, products_of
from undo_core.models.trunk import UnsupportedHead, evaluating, first_argument, trunk_path

VERIFIED_ENTRIES = 4096  # vocabulary entries of the head that are converted to float64 at a time
TOKENS = 8  # length of the sequence that measures a head
SMALL, LARGE = 2.0**-10, 2.0**15  # a softcap leaves SMALL nearly unchanged and cuts LARGE off at the cap
PROBE = (0.0, SMALL, -SMALL, 0.5, -3.0, 64.0, LARGE, -LARGE)


@dataclass(frozen=True)
class Head:
    """The vocabulary head of a causal language model: ``logits = softcap(scale * (hidden @ weight.T + bias))``.

    Attributes:
        weight: ``[V, d]``.
        bias: ``[V]`` or None.
        scale: factor on ``hidden @ weight.T + bias``.
        softcap: ``c`` of ``c * tanh(z / c)``, or None.
        sharing: the ranks that each hold some of the entries and have tokens of their own, a
            :class:`undo_core.distributed.vocabulary.Sharing`; None for a head that serves the same tokens wherever it is.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None
    sharing: Any = None

    def options(self, prefix: str = "") -> dict[str, Any]:
        """Returns the fused ops' keyword arguments, with ``prefix`` (``"student_"``, ``"teacher_"``) before their names."""
        return {f"{prefix}bias": self.bias, f"{prefix}scale": self.scale, f"{prefix}softcap": self.softcap}


@dataclass(frozen=True)
class Constants:
    """What a model does to its output layer's result; ``entries`` is the number of logits."""

    scale: float
    softcap: float | None
    entries: int


def head_of(model: PreTrainedModel) -> Head:
    """Returns the head of ``model``. The first call compares it with the model's own logits on a few tokens.

    After :func:`undo_core.parallelize_head` its weight and bias are sharded by vocabulary entries, as the losses of
    :mod:`undo_core.ops` take them.

    Raises:
        ValueError: FSDP shards the head, and it is read outside of the forward pass of its unit.
        UnsupportedHead: the head does more than bias, scale and softcap, so that losses computed from those would be wrong.
    """
    model = bare(model)
    constants, output = _known_constants(model), _linear(model)
    weight, bias = output.weight, output.bias
    if is_dtensor(weight) and weight.device_mesh != getattr(model, "_undo_head_mesh", None):  # parallelize_head sets it
        raise ValueError(
            f"model: got a {type(model).__name__} whose head is sharded here, wanted it whole: losses of a sharded model run inside one "
            "forward pass of it, and its head is no FSDP unit of its own"
        )
    if constants.entries < len(weight):  # the model drops the logits of the others
        weight, bias = weight[: constants.entries], None if bias is None else bias[: constants.entries]
    return Head(weight, bias, constants.scale, constants.softcap, getattr(model, "_undo_sharing", None))


def vocabulary_of(model: PreTrainedModel) -> int:
    """Returns the number of logits that the model gives; its weight may have further rows, which the model drops."""
    model = bare(model)
    return min(_known_constants(model).entries, len(_linear(model).weight))


def _known_constants(model: PreTrainedModel) -> Constants:
    constants = getattr(model, "_undo_head", None)
    if constants is None:
        constants = model._undo_head = measure_head(model)
    return constants


@torch.no_grad()
def measure_head(model: PreTrainedModel) -> Constants:
    """Measures scale, softcap and number of logits in a forward pass whose output layer returns known values.

    For a model on the meta device the trunk is skipped and the output layer's product is not compared.

    Raises:
        UnsupportedHead: see :func:`head_of`.
    """
    model = bare(model)
    output, layer = _linear(model), model.get_output_embeddings()
    device, meta = output.weight.device, output.weight.is_meta
    at = torch.arange(TOKENS, device=device)
    ids = at.mul(7919).remainder(model.get_input_embeddings().weight.shape[0]).view(1, TOKENS)
    seen: dict[str, torch.Tensor] = {}

    def put_probe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], products: torch.Tensor) -> torch.Tensor:
        seen["hidden"], seen["products"] = first_argument(args, kwargs), products
        entries = products.shape[-1]
        known = torch.tensor(PROBE, dtype=torch.float64, device="cpu" if meta else device)
        steps = torch.arange(products.numel(), device=known.device).view(products.shape)
        # Shifted by one from token to token, so that every vocabulary entry gets every value.
        seen["probe"] = known[(steps // entries + steps % entries) % len(PROBE)]
        return seen["probe"]

    handle = layer.register_forward_hook(put_probe, with_kwargs=True)
    try:
        with evaluating(model):
            logits = _without_trunk(model, ids) if meta else _logits(model, ids)
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedHead(f"model: got a {type(model).__name__}, which cannot run on token ids alone: {reason}") from error
    finally:
        handle.remove()
    if "probe" not in seen:
        raise UnsupportedHead(f"model: got a {type(model).__name__}, whose forward pass does not call its output layer")
    if seen["products"].shape[:-1] != (1, TOKENS) or logits.shape[:-1] != (1, TOKENS):
        raise UnsupportedHead(
            f"model: got a {type(model).__name__}, whose output layer gives {list(seen['products'].shape)} for {TOKENS} "
            f"tokens, which become logits {list(logits.shape)}; wanted one vector of each for each token"
        )
    if not meta:
        _compare_products(model, output, seen["hidden"][0], seen["products"][0])
    return _constants(model, seen["probe"][0], logits[0], output.weight.dtype)


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    output = model(input_ids=ids, use_cache=False)
    return output[0] if isinstance(output, tuple) else output.logits


def _linear(model: PreTrainedModel) -> Products:
    output, name = model.get_output_embeddings(), type(model).__name__
    found = products_of(output)
    if found is not None:
        return found
    if type(output).__module__.startswith("peft."):
        raise UnsupportedHead(
            f"model: got a {name} whose output layer has an adapter, a {type(output).__name__}, that is not plain LoRA; "
            "wanted a merged adapter (merge_and_unload), or an output layer that is not in target_modules"
        )
    if not isinstance(output, nn.Linear):
        raise UnsupportedHead(f"model: got a {name} whose output layer is {type(output).__name__}, wanted a Linear head")
    raise UnsupportedHead(
        f"model: got a {name} whose output layer, a {type(output).__name__}, overrides forward; wanted a plain Linear, "
        "because only its products can be computed in parts"
    )


def _compare_products(model: PreTrainedModel, output: Products, hidden: torch.Tensor, got: torch.Tensor) -> None:
    """Raises :class:`UnsupportedHead` where the layer's result differs from a float64 product by more than its dtype rounds."""
    eps = max(torch.finfo(got.dtype).eps, torch.finfo(output.weight.dtype).eps)
    if got.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        eps = 2.0**-7  # the product may round its inputs to bfloat16
    bound = 4 * eps + math.sqrt(hidden.shape[-1]) * 2.0**-23
    hidden, error, size = hidden.double(), 0.0, 0.0
    for first in range(
        0, len(output.weight), VERIFIED_ENTRIES
    ):  # the whole head in float64 would be the largest tensor of a run
        part = slice(first, first + VERIFIED_ENTRIES)
        weight = output.weight[part].double()
        wanted, squares = hidden @ weight.T, hidden.square() @ weight.square().T
        if output.bias is not None:
            wanted = wanted + output.bias[part].double()
        difference = got[:, part].double() - wanted
        counted = difference.isfinite()  # a diverged model must not fail this check
        error += float(difference[counted].square().sum())
        size += float((squares + wanted.square())[counted].sum())
    if not math.sqrt(error) <= bound * math.sqrt(size):
        raise UnsupportedHead(
            f"model: {type(model).__name__}'s logits differ from hidden @ W.T + b of its output layer by "
            f"{math.sqrt(error / max(size, 1e-300)):.2g} of their size; its head does something that is not supported"
        )


def _constants(model: PreTrainedModel, probe: torch.Tensor, logits: torch.Tensor, dtype: torch.dtype) -> Constants:
    """Returns the scale and softcap that turned ``probe`` into ``logits``."""
    entries = logits.shape[-1]
    x, z = probe[:, :entries].to(logits.device), logits.double()
    first = {value: float(z[x == value][0]) for value in (SMALL, LARGE)}
    softcap, scale = None, first[SMALL] / SMALL
    if math.isfinite(first[LARGE]) and not abs(first[LARGE] - scale * LARGE) <= 0.1 * abs(first[LARGE]):
        softcap = _as_configured(abs(first[LARGE]), model.config)
        scale = softcap * math.atanh(max(-0.5, min(0.5, first[SMALL] / softcap))) / SMALL
    scale = _as_configured(scale, model.config)
    wanted = x * scale if softcap is None else softcap * torch.tanh(x * scale / softcap)
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    wrong = ~((z - wanted).abs() <= 8 * eps * wanted.abs()) & ~(z.isinf() & (z.sign() == wanted.sign()))
    if bool(wrong.any()):
        share = float(wrong.double().mean())
        raise UnsupportedHead(
            f"model: {type(model).__name__}'s logits differ from softcap(scale * (hidden @ W.T + b)) with scale {scale:g} and "
            f"softcap {softcap} in {share:.1%} of all entries; what it does after its output layer is not supported"
        )
    return Constants(scale, softcap, entries)


def _as_configured(measured: float, config: PreTrainedConfig) -> float:
    """Returns the number of the configuration, or its inverse, that equals ``measured`` up to rounding; else ``measured``."""
    numbers = {1.0}
    for part in (config, config.get_text_config()):
        numbers |= {float(v) for v in vars(part).values() if type(v) in (int, float) and v and math.isfinite(v)}
    nearest = min((abs(c - measured), c) for number in numbers for c in (number, 1 / number))
    return nearest[1] if nearest[0] <= 1e-6 * abs(measured) else measured


class _TrunkOutput(BaseModelOutputWithPast):
    """Stands for the output of any trunk; every attribute beyond the hidden states is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _without_trunk(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Runs :func:`_logits` on the meta device without the trunk, which may have operations that need the tensors' contents."""
    weight = model.get_output_embeddings().weight
    path = trunk_path(model)
    replaced = [vars(module).get("forward") for module in path]
    inner = getattr(
        model.config.get_text_config(), "hidden_size", weight.shape[1]
    )  # differs from the output layer's width where the head has layers before it
    widths = dict.fromkeys((weight.shape[1], inner))
    reason: Exception | None = None
    for width in widths:
        hidden = torch.zeros(1, TOKENS, width, dtype=weight.dtype, device="meta")
        for module in path:
            module.forward = lambda *_, hidden=hidden, **__: _TrunkOutput(last_hidden_state=hidden)
        try:
            return _logits(model, ids)
        except RuntimeError as error:
            reason = error
        finally:
            for module, forward in zip(path, replaced, strict=True):
                vars(module).pop("forward", None)
                if forward is not None:
                    module.forward = forward
    raise UnsupportedHead(f"model: got a {type(model).__name__}, whose head does not run without its trunk: {reason}")
