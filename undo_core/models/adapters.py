"""Models with peft adapters: the transformers model inside the wrapper, and heads that have an adapter.

peft puts its layers into the model that it is given, so that this model itself computes with them. The wrapper, a
``PeftModel``, can therefore be removed. A wrapper that computes something more (such as prompts before the text) is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Products:
    """Weight and bias of a linear output layer, which computes ``hidden @ weight.T + bias``."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def bare(model: nn.Module) -> PreTrainedModel:
    """Returns the transformers model inside a ``PeftModel``; returns any other model unchanged.

    The first call compares the logits of wrapper and inner model on a few tokens.

    Raises:
        ValueError: the wrapper computes other logits than the model inside.
    """
    peft = sys.modules.get("peft")  # if it was not imported, there is no PeftModel
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    kind = model.active_peft_config.peft_type.value
    inner = model.get_base_model()
    if getattr(model, "_undo_looked_through", None) == kind:
        return inner
    if model.active_peft_config.is_prompt_learning or not isinstance(inner, PreTrainedModel) or not _same_logits(model, inner):
        raise ValueError(
            f"model: got a {type(model).__name__} of kind {kind}, whose wrapper computes something else than the model inside; "
            "wanted adapters that are layers of the model, such as LoRA or IA3"
        )
    model._undo_looked_through = kind
    return inner


@torch.no_grad()
def _same_logits(model: nn.Module, inner: PreTrainedModel) -> bool:
    embedding = inner.get_input_embeddings().weight
    ids = torch.arange(8, device=embedding.device).mul(7919).remainder(embedding.shape[0]).view(1, 8)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        a, b = (m(input_ids=ids, use_cache=False).logits for m in (model, inner))
    finally:
        for module in training:
            module.training = True
    return torch.equal(a, b) or not bool(b.isfinite().all())  # a diverged model must not fail this check


def has_adapters(model: nn.Module) -> bool:
    """Whether ``model`` contains layers of peft."""
    return next(_layers(model), None) is not None


def products_of(output: nn.Module) -> Products | None:
    """Returns weight and bias of a linear output layer, its adapter included; None for any other layer or adapter.

    With LoRA the weight is ``weight + scale * B @ A``, through which gradients reach ``A`` and ``B``. For 16-bit weights the
    sum is in float32, so that a small adapter is not rounded away.

    Raises:
        ValueError: the layer is in training mode and has a dropout before its adapter, which a merged weight cannot express.

    Memory: with LoRA, a matrix of the head's size, and another one for its gradient.
    """
    if type(output) is nn.Linear or (isinstance(output, nn.Linear) and type(output).forward is nn.Linear.forward):
        return Products(output.weight, output.bias)
    peft = sys.modules.get("peft")
    if peft is None:
        return None
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(output, ModulesToSaveWrapper):
        active = [] if output.disable_adapters else [name for name in output.active_adapters if name in output.modules_to_save]
        return products_of(output.modules_to_save[active[0]] if active else output.original_module)
    if type(output) is not LoraLinear:
        return None
    base = products_of(output.base_layer)
    if base is None or output.disable_adapters or output.merged:
        return base
    weight, bias = base.weight, base.bias
    for name in output.active_adapters:
        if name not in output.lora_A:
            continue
        if name in output.lora_variant or output.fan_in_fan_out:
            return None
        if output.training:
            _check_dropout(name, output.lora_dropout[name])
        a, b, scale = output.lora_A[name], output.lora_B[name], output.scaling[name]
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight = weight.to(wide) + scale * (b.weight.to(wide) @ a.weight.to(wide))
        if b.bias is not None:
            bias = b.bias.to(wide) * scale if bias is None else bias.to(wide) + b.bias.to(wide) * scale
    return Products(weight, bias)


def check_adapters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Checks that a model with adapters can be trained in ``dtype``; changes nothing.

    Raises:
        ValueError: there is a dropout before the head's adapter, which a merged head cannot express; or trained copies of whole
            modules (``modules_to_save``) would get another dtype than the frozen model around them.
    """
    if not has_adapters(model):
        return
    output = model.get_output_embeddings()
    for name, dropout in getattr(output, "lora_dropout", {}).items():
        _check_dropout(name, dropout)
    from peft.utils.other import ModulesToSaveWrapper

    frozen = {p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()}
    for name, module in model.named_modules():
        copies = module.modules_to_save.parameters() if isinstance(module, ModulesToSaveWrapper) else ()
        if any(p.requires_grad for p in copies) and frozen - {dtype}:
            got = ", ".join(sorted(str(d).removeprefix("torch.") for d in frozen))
            raise ValueError(
                f"precision: got weights of {str(dtype).removeprefix('torch.')} for {name}, a trained copy (modules_to_save) "
                f"in a frozen model of {got}; wanted one dtype for both"
            )


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns peft's trained parameters, named by adapted weight and parameter: ``mlp.down_proj.weight (lora_A)``."""
    found: dict[str, nn.Parameter] = {}
    for name, layer in _layers(module):
        for own, parameter in layer.named_parameters():
            if parameter.requires_grad:
                found.setdefault(f"{name}.weight ({own})", parameter)
    return found


def adapter_settings(model: nn.Module) -> dict[str, str]:
    """Returns, by layer, the settings of peft's layers: scales, dropout, and which adapters are active, merged or disabled."""
    return {name: repr(sorted(_settings(layer))) for name, layer in _layers(model)}


def _settings(layer: nn.Module) -> Iterator[tuple[str, str]]:
    for name in ("active_adapters", "disable_adapters"):
        yield name, repr(getattr(layer, name))
    for name, module in layer.named_modules():
        for own, value in vars(module).items():
            if not own.startswith("_") and own != "training" and _plain(value):
                yield f"{name}.{own}", repr(value)


def _plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_plain, (*value, *value.values())))
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield name, module


def _check_dropout(name: str, dropout: nn.Module) -> None:
    if getattr(dropout, "p", 0.0) > 0:
        raise ValueError(
            f"model: got lora_dropout {dropout.p:g} in the adapter {name} of the output layer, wanted 0 there, because the "
            f"losses read the head with its adapter merged; leave the head out of target_modules, or set lora_dropout to 0"
        )
