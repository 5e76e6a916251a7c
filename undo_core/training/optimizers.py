"""Optimizer steps: the optimizers, master weights, gradient clipping, and the optimizer state in a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from undo_kernels.ops.sharding import local_of

from undo_core.distributed.sharding import global_norm, is_sharded, like_shard
from undo_core.training.config import TrainConfig
from undo_core.training.embedding import TiedEmbedding
from undo_core.training.precision import convert_, seeded, weight_dtype
from undo_core.training.stochastic_adamw import BLOCK_CPU, StochasticAdamW, block_size, flattened, held

QUANTISED = {"adamw-8bit": (8, 256), "adamw-4bit": (4, 128)}  # bits per entry of a moment, entries that share a float32 scale


def bytes_per_parameter(config: TrainConfig, device: str | None = None) -> dict[str, float]:
    """Returns the bytes that training holds per trained parameter: the table of :func:`undo_core.training.train` as numbers.

    Args:
        config: only precision, optimizer, beta1 (for sgd) and step_in_backward matter.
        device: ``"cuda"`` or ``"cpu"``; None for the GPU if there is one. It matters only to adamw-offload.

    Returns:
        Bytes of ``weights``, ``gradient`` and ``optimizer`` on the device, and of ``host``, what adamw-offload keeps in host
        memory. Not counted are the step counters, adafactor's sums over rows and columns, and that tensors under 4096 elements
        are not quantised.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    weights = float(weight_dtype(config.precision).itemsize)
    stepped = 4.0 if config.precision == "bfloat16-master" else weights  # the optimizer steps the master, where there is one
    gradient = 0.0 if config.step_in_backward else stepped
    moments = 2.0 * stepped
    if config.optimizer in QUANTISED:
        bits, block = QUANTISED[config.optimizer]
        moments = 2 * (bits / 8 + 4 / block)
    elif config.optimizer in ("sgd", "adafactor"):
        moments = stepped if config.optimizer == "sgd" and config.beta1 else 0.0
    if config.optimizer == "adamw-offload" and device != "cpu":
        return {"weights": weights, "gradient": 0.0, "optimizer": 0.0, "host": stepped + gradient + moments}
    master = 4.0 if config.precision == "bfloat16-master" else 0.0
    return {"weights": weights, "gradient": gradient, "optimizer": master + moments, "host": 0.0}


class Updater:
    """Optimizer of a stage, with master weights, host offload and clipping.

    For each step call :meth:`begin`, then run one or more backward passes inside :meth:`attached`, then call :meth:`step`.

    The optimizer updates *targets*: the parameters themselves, their float32 masters (bfloat16-master), or their copies on the
    host (adamw-offload on a GPU). A hook moves each gradient to its target as soon as the backward pass has computed it, so
    that no second set of gradients exists. With ``step_in_backward`` the hook also updates the parameter and frees the
    gradient.

    Args:
        model: converted in place to ``config.precision``.
        parameters: the parameters to train.
        config: precision, optimizer, clipping, seed.

    Raises:
        ModuleNotFoundError: the optimizer needs torchao, which is not installed.
    """

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter], config: TrainConfig) -> None:
        if config.optimizer in QUANTISED and importlib.util.find_spec("torchao") is None:
            raise ModuleNotFoundError(
                f"optimizer: got {config.optimizer}, which needs torchao; pip install 'undo-core[lowmem]', or choose adamw"
            )
        self.config, self.parameters = config, parameters
        self.sharded = is_sharded(model)
        mastered = config.precision == "bfloat16-master"
        if self.sharded:  # the shards of this rank, in the memory of the parameters
            self.targets = [nn.Parameter(local_of(parameter)) for parameter in parameters]
        else:
            originals = (
                [parameter.data for parameter in parameters] if mastered else None
            )  # the float32 bits, which the conversion rounds away
            convert_(model, config.precision)
            originals = originals or [parameter.data for parameter in parameters]
            self.targets = [_target(*pair, config) for pair in zip(parameters, originals, strict=True)]
        groups = [[target] for target in self.targets] if config.step_in_backward else [self.targets]
        self.parts = [optimizer_of(group, config) for group in groups]
        whole = {id(target): held(number, p) for number, (p, target) in enumerate(zip(parameters, self.targets, strict=True))}
        for part in self.parts:
            if isinstance(part, StochasticAdamW):
                part.held = whole
        self._index = 0  # index of the current step
        self._tied: TiedEmbedding | None = None
        self._norm: torch.Tensor | None = None  # norm of the previous step's gradient, with step_in_backward
        self._square = torch.zeros((), device=self.targets[0].device)

    def begin(self, index: int, rate: float) -> None:
        """Starts step ``index`` (from 0) at learning rate ``rate``; call it before the backward passes."""
        self._index = index
        if self._tied is not None:
            self._tied.reset()
        for part in self.parts:
            for group in part.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    @contextlib.contextmanager
    def attached(self, tied: TiedEmbedding | None = None) -> Iterator[None]:
        """Context with active gradient hooks; ``tied`` is the tied weight whose gradient comes in two parts, if any."""
        hooks, self._tied = [], tied
        for index, (parameter, target) in enumerate(() if self.sharded else zip(self.parameters, self.targets, strict=True)):
            if target is not parameter or self.config.step_in_backward:
                late = tied is not None and parameter is tied.weight
                register = tied.on_gradient if late else parameter.register_post_accumulate_grad_hook
                hooks.append(register(functools.partial(self._receive, index)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def step(self) -> None:
        """Clips and applies the gradients, then frees them; call it after the backward passes."""
        if self.config.step_in_backward:
            if self.config.clip:
                self._norm, self._square = self._square.sqrt(), torch.zeros_like(self._square)
            return
        if self.sharded:
            for parameter, target in zip(self.parameters, self.targets, strict=True):
                if parameter.grad is not None:
                    target.grad, parameter.grad = local_of(parameter.grad), None
        gradients = [target.grad for target in self.targets if target.grad is not None]
        if self.sharded and self.config.clip:
            nn.utils.clip_grads_with_norm_(self.targets, self.config.clip, global_norm(gradients))
        elif self.config.clip and gradients:
            norms = _norms(gradients)
            norm = torch.linalg.vector_norm(torch.stack([value.to(norms[0].device) for value in norms]))
            nn.utils.clip_grads_with_norm_(self.targets, self.config.clip, norm)
        self._update(0, range(len(self.targets)))

    @torch.no_grad()
    def _receive(self, index: int, parameter: nn.Parameter) -> None:
        target = self.targets[index]
        if target is not parameter:
            gradient, parameter.grad = parameter.grad, None
            if target.grad is None:
                target.grad = torch.empty_like(target, pin_memory=target.is_pinned()).copy_(gradient)
            else:
                _add_(target.grad, gradient.to(target.device))
        if self.config.step_in_backward:
            if self.config.clip:
                (own,) = (value.to(self._square.device) for value in _norms([target.grad]))
                self._square += own.square()
                so_far = self._square.sqrt()
                norm = so_far if self._norm is None else torch.maximum(so_far, self._norm)
                target.grad.mul_((self.config.clip / (norm + 1e-6)).clamp(max=1.0).to(target.device))
            self._update(index, [index])

    def _update(self, part: int, indices: range | list[int]) -> None:
        device = self.targets[indices[0]].device
        draws = self.config.precision == "bfloat16-stochastic"  # torchao's optimizers, from the device's generator
        with seeded(device, self.config.seed or 0, self._index, part) if draws else contextlib.nullcontext():
            self.parts[part].step()
        for index in indices:
            parameter, target = self.parameters[index], self.targets[index]
            if target is not parameter and target.grad is not None and not self.sharded:
                parameter.copy_(target)
            target.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the state that a resumed run needs, by name: plain tensors, or DTensors like the sharded parameters."""
        found = {} if self._norm is None else {"norm": self._norm}
        mastered = self.config.precision == "bfloat16-master"
        for index, (parameter, target) in enumerate(zip(self.parameters, self.targets, strict=True)):
            for key, value in self._part(index).state.get(target, {}).items():
                for name, tensor in _plain(value).items():
                    found[f"{index}.{key}{name}"] = like_shard(tensor.contiguous(), parameter)
            if target is not parameter and (mastered or not self.sharded):
                found[f"{index}.target"] = like_shard(target.detach(), parameter)
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restores the state that :meth:`tensors` returned."""
        for name, tensor in tensors.items():
            if name == "norm":
                self._norm = tensor.clone().to(self._square.device)
                continue
            place, key, *inner = name.split(".")
            target, part = self.targets[int(place)], self._part(int(place))
            state = part.state[target]
            if key == "target":
                target.copy_(tensor)
            elif inner:  # codes or scales of a quantised moment
                if key not in state:
                    state[key] = part._new_buffer(target, key == "exp_avg")
                getattr(state[key], inner[0]).copy_(tensor)
            else:
                counter_on_host = key == "step" and not part.defaults.get("fused")
                state[key] = tensor.clone().to("cpu" if counter_on_host else target.device)

    def _part(self, index: int) -> torch.optim.Optimizer:
        return self.parts[index if self.config.step_in_backward else 0]


def _target(parameter: nn.Parameter, original: torch.Tensor, config: TrainConfig) -> nn.Parameter:
    dtype = torch.float32 if config.precision == "bfloat16-master" else parameter.dtype
    if config.optimizer == "adamw-offload" and _is_remote(parameter):
        host = torch.empty(original.shape, dtype=dtype, pin_memory=parameter.is_cuda)
        return nn.Parameter(host.copy_(original))
    if dtype == parameter.dtype:
        return parameter
    # A float32 tensor of the caller becomes the master without a copy.
    return nn.Parameter(original.to(dtype).contiguous())


def _is_remote(parameter: nn.Parameter) -> bool:
    return parameter.device.type != "cpu"


def _norms(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Norm of each gradient in float32, because a bfloat16 norm would be off by 0.4 %.

    On a CPU, torch would convert a whole bfloat16 tensor to float32 first, so such a tensor is split into parts.
    """
    whole = [g for g in gradients if g.device.type != "cpu" or g.dtype == torch.float32]
    found = dict(zip(map(id, whole), torch._foreach_norm(whole, 2, dtype=torch.float32) if whole else (), strict=True))
    for gradient in gradients:
        if id(gradient) not in found:
            parts = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in gradient.reshape(-1).split(BLOCK_CPU)]
            found[id(gradient)] = torch.linalg.vector_norm(torch.stack(parts))
    return [found[id(gradient)] for gradient in gradients]


def _add_(total: torch.Tensor, gradient: torch.Tensor) -> None:
    """Adds ``gradient`` to ``total``; on a CPU with other dtypes in parts, as torch would convert the whole gradient first."""
    if total.device.type != "cpu" or total.dtype == gradient.dtype:
        total.add_(gradient)
        return
    for part, more in zip(total.view(-1).split(BLOCK_CPU), gradient.reshape(-1).split(BLOCK_CPU), strict=True):
        part.add_(more)


def optimizer_of(targets: list[nn.Parameter], config: TrainConfig, device: str | None = None) -> torch.optim.Optimizer:
    """Returns the optimizer that ``config`` names; ``device`` is the device type to assume for targets on the meta device."""
    plain = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":  # not fused: on a CPU, torch 2.13's fused kernel loses most of an update in bfloat16
        return torch.optim.SGD(targets, momentum=config.beta1, foreach=False, **plain)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(targets, foreach=False, **plain)
    settings: dict[str, Any] = {
        **plain,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
    }
    stochastic = config.precision == "bfloat16-stochastic"
    if config.optimizer in QUANTISED:
        return _torchao(config.optimizer)(targets, bf16_stochastic_round=stochastic, **settings)
    if stochastic:
        return StochasticAdamW(targets, **settings, seed=config.seed or 0, block=block_size(device or targets[0].device.type))
    return torch.optim.AdamW(targets, fused=True, **settings)


@functools.cache
def _torchao(name: str) -> Callable[..., torch.optim.Optimizer]:
    from torchao import optim
    from torchao.optim import adam

    base = {"adamw-8bit": optim.AdamW8bit, "adamw-4bit": optim.AdamW4bit}[name]

    class Quantised(base):
        @torch.no_grad()
        def step(self) -> None:
            """Updates every parameter that has a gradient.

            On a GPU, torchao compiles one kernel per shape. Elsewhere the update runs in slices, so that its temporaries, some
            60 bytes per element, stay in the cache.
            """
            if any(target.is_cuda for group in self.param_groups for target in group["params"]):
                super().step()
                return
            for group in self.param_groups:
                for target in group["params"]:
                    if target.grad is not None:
                        self._step_in_slices(target, group)

        def _step_in_slices(self, target: nn.Parameter, group: dict[str, Any]) -> None:
            state = self.state[target]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = self._new_buffer(target, True), self._new_buffer(target, False)
            state["step"] += 1
            rounds = self.bf16_stochastic_round and target.dtype is torch.bfloat16
            settings = (None, group["lr"], *group["betas"], group["weight_decay"], group["eps"], self.is_adamw, rounds)
            with flattened(target) as weight:
                gradient = target.grad.reshape(-1)
                for start in range(0, len(weight), BLOCK_CPU):
                    part = slice(start, min(start + BLOCK_CPU, len(weight)))
                    moments = (_moment_part(state[name], part) for name in ("exp_avg", "exp_avg_sq"))
                    adam.single_param_adam(weight[part], gradient[part], state["step"], *moments, *settings)

    return Quantised


def _moment_part(moment: Any, part: slice) -> torch.Tensor:
    """View of a slice of a moment; of a quantised moment, the slice must consist of whole blocks."""
    if type(moment) is torch.Tensor:
        return moment.view(-1)[part]
    codes, scale = (
        tensor.view(-1)[part.start * tensor.numel() // moment.numel() : part.stop * tensor.numel() // moment.numel()]
        for tensor in (moment.codes, moment.scale)
    )
    packed = (
        () if moment.codes.numel() == moment.numel() else ((part.stop - part.start,),)
    )  # the 4-bit class packs two entries per byte and takes the shape as well
    return type(moment)(codes, scale, moment.qmap, moment.signed, *packed, dtype=moment.dtype)


def _plain(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Plain tensors that make up ``value``, by name suffix: itself, or the parts of a quantised subclass."""
    if type(value) is torch.Tensor:
        return {"": value}
    names, _ = value.__tensor_flatten__()
    return {f".{name}": getattr(value, name) for name in names}
