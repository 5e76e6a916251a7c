"""The forms of the kernels that are launched, collected by running the drivers on tensors without memory.

The drivers themselves choose each form, so this list cannot differ from what is launched on a GPU. A GPU is not needed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from undo_kernels.noise_segments import Segment
from undo_kernels.problem import DENSE, SPARSE, Problem
from undo_kernels.projection import GivenLogits, Projection
from undo_kernels.triton import noise, rmu
from undo_kernels.triton.chunk import Chunks
from undo_kernels.triton.products import Workspace
from undo_kernels.triton.recompute import Recompute
from undo_kernels.triton.run import Run

GPUS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_META = torch.device("meta")
_TOKENS, _VOCABULARY, _KNOWN = 2048, 32_768, 100
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Form:
    """One kernel with the types and constants of one launch, which is compiled once.

    Attributes:
        kernel: the jitted function.
        arguments: positional arguments of the launch.
        options: its keyword arguments and launch options.
        constants: values of the compile-time constants, by name.
        types: dtypes of the tensors, by name.
        key: what Triton's cache tells it apart by.
    """

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    constants: dict[str, Any]
    types: dict[str, str]
    key: str

    @property
    def name(self) -> str:
        """Kernel, flags that are on, tile or block, and dtypes."""
        constants, words = self.constants, [self.kernel.__name__]
        if "TARGET" in constants:
            words.append(("own", "forward", "reverse", "jsd")[constants["TARGET"]])
        on = [name for name, value in constants.items() if value is True and not name.endswith(("EVEN", "TOGETHER"))]
        both = [name.removeprefix("student.") for name in on if f"teacher.{name.removeprefix('student.')}" in on]
        words += [name.lower() for name in both]
        words += [name.lower().replace(".", " ") for name in on if name.split(".")[-1] not in both]
        words += [constants["DTYPE"]] if "DTYPE" in constants else []
        words += ["uneven"] * any(value is False for name, value in constants.items() if name.endswith("EVEN"))
        sizes = [str(constants[f"BLOCK_{d}"]) for d in "TVDKP" if f"BLOCK_{d}" in constants]
        words += ["x".join(sizes)] * bool(sizes) + [f"{self.options['num_warps']} warps"]
        read = [name for name in ("student.hidden_ptr", "student.z_ptr", "hidden_ptr", "z_ptr") if name in self.types]
        words += [self.types[name] for name in read[:1]]
        written = [name for name in ("dz_ptr", "gradient_ptr") if name in self.types]
        if written and constants.get("GRADIENT", True):
            words.append(f"to {self.types[written[0]]}")
        return " ".join(words)

    @property
    def elements(self) -> int:
        """Pairs or elements that a program processes at a time; its threads for kernels that are not over either."""
        shape = {"tiles": ("BLOCK_T", "BLOCK_V"), "loss_rows": ("BLOCK_V",), "stats_rows": ("BLOCK_V",)}
        shape |= {"noise_blocks": ("BLOCK",), "rmu_rows": ("BLOCK_D",), "pick_labels": ("BLOCK_D",)}
        name = self.kernel.__name__
        sizes = [self.constants[size] for size in shape.get("tiles" if name.endswith("_tiles") else name, ())]
        return math.prod(sizes) if sizes else self.threads

    @property
    def threads(self) -> int:
        return 32 * self.options["num_warps"]

    def compile(self) -> Any:
        """Returns the compiled kernel; inside :func:`compiling_for`."""
        return self.kernel.run(*self.arguments, grid=None, warmup=True, **self.options)


class _Driver:
    """Stands in for the driver of a GPU that is not there."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUS[self.target]

    def get_current_device(self) -> str:
        return self.target  # only a key of the kernels' caches

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """Makes Triton compile for a target inside the block, whatever this machine has."""
    config = triton.runtime.driver
    before = config._active
    config.set_active(_Driver(target))
    try:
        yield
    finally:
        config._active = before


@contextlib.contextmanager
def _recording() -> Iterator[dict[str, Form]]:
    """Collects the forms of the launches inside the block instead of launching them."""
    found: dict[str, Form] = {}

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        *_, binder = kernel.device_caches[triton.runtime.driver.active.get_current_device()]
        bound, specialization, _ = binder(*arguments, debug=False, **options)
        key = f"{kernel.__name__} {specialization} {options['num_warps']} {options.get('num_stages')}"
        if key not in found:
            constants, types = _described(kernel, bound)
            found[key] = Form(kernel, arguments, options, constants, types, key)

    original = triton.JITFunction.run
    triton.JITFunction.run = record
    try:
        yield found
    finally:
        triton.JITFunction.run = original


def _described(kernel: Any, bound: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the compile-time constants and the dtypes of the tensors of a launch."""
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    constants, types = {}, {}

    def describe(name: str, value: Any) -> None:
        if isinstance(value, tuple):
            owner = f"{name}." if name in ("student", "teacher") else ""
            for field, inner in zip(value._fields, value, strict=True):
                describe(owner + field, inner)
        elif isinstance(value, tl.constexpr) or name in constexprs:
            constants[name] = value.value if isinstance(value, tl.constexpr) else value
        elif isinstance(value, torch.Tensor):
            types[name] = _NAMES.get(value.dtype, str(value.dtype))

    for name, value in bound.items():
        describe(name, value)
    return constants, types


def forms(target: str, scope: str) -> list[Form]:
    """Returns the forms that a target's launches have, of a scope that holds those before it.

    ``main``: forward KL with a softcap, for which ``costs.py`` predicts times, and given logits. ``few``: the heaviest of 16-bit
    inputs and a form of every other kernel. ``typical``: the heaviest of float32 inputs. ``all``: every form.
    """
    every, few = scope == "all", scope in ("main", "few")
    with compiling_for(target), _recording() as found, torch.device(_META):
        for problem in _problems(scope, target):
            call = Run(problem, Workspace(_META), target)
            (Recompute if call.plan.name == "recompute" else Chunks)(call).passes()
        for dtype, stochastic in itertools.product(noise.DTYPES, (True, False)) if scope != "main" else ():
            if every or (dtype in (torch.bfloat16, torch.float32) and stochastic == (dtype == torch.bfloat16)):
                parameter = Segment(torch.empty(64, 64, dtype=dtype), "w", "uniform", 0.5, 1e-8)
                noise.launch([(0, parameter)], _META, dtype, 0, stochastic, torch.empty(1, 3, dtype=torch.float64), target)
        for dtype, own, factor, needs in itertools.product(_DTYPES.values(), *[(True, False)] * 3) if scope != "main" else ():
            if every or (own and factor and needs):
                frozen = torch.empty(*((64, 2304) if own else (2304,)), dtype=dtype if own else torch.float32)
                rmu.launch(torch.empty(64, 2304, dtype=dtype), frozen, torch.empty(64) if factor else None, 1.0, needs)
    chosen = list(found.values())
    if few:
        combined = [form.key for form in chosen if form.kernel.__name__ == "combine_rows"]
        chosen = [form for form in chosen if form.constants.get("GRADIENT", True) and form.key not in combined[1:]]
    return chosen


def _problems(scope: str, target: str) -> Iterator[Problem]:
    """Yields problems of full options in the dtypes that have different code; of ``all``, each combination of options."""
    full = {"softcap": True, "bias": True, "labels": True, "masked": True}
    yield _problem("forward", "bf16", "recompute", softcap=True)
    yield _problem("forward", "bf16", "chunk", softcap=True)
    for kind in ("bf16", "fp32"):
        yield _problem("forward", kind, "chunk", given=True)
    yield _problem("forward", "bf16", "recompute", softcap=True, known=True)
    if scope == "main":
        return
    yield _problem("forward", "bf16", "recompute", **full)
    yield _problem("reverse", "bf16", "recompute", statistics=True, **full)
    yield _problem("jsd", "bf16", "recompute", **full)
    yield _problem("reverse", "bf16", "chunk", statistics=True, **full)
    if scope != "few":
        yield _problem("jsd", "fp32", "recompute", **full)
        yield _problem("reverse", "fp32", "recompute", statistics=True, **full)
        yield _problem("jsd", "bf16", "chunk", **full)
    yield _problem("own", "bf16", "recompute", known=True, **full)
    yield _problem("bucket", "bf16", "chunk", **full)
    if scope != "all":
        return
    options = ("softcap", "labels", "masked", "bias")
    for kind, plan, target in itertools.product(("bf16", "fp32"), ("recompute", "chunk"), ("own", "uniform", *DENSE)):
        for flags in itertools.product((False, True), repeat=len(options)):
            chosen = dict(zip(options, flags, strict=True))
            if chosen["bias"] and not all(flags[:3]):  # a bias is one load and one sum, wherever it is
                continue
            yield _problem(target, kind, plan, **chosen)
        for more in (
            {"known": True},
            {"frozen": True},
            {"statistics": True},
            {"ragged": True},
            {"ragged": True, **full},
            {"narrow": True},
            {"tiny": True},
            {"steep": True, **full},
        ):
            if target in DENSE or "statistics" not in more:
                yield _problem(target, kind, plan, **more)
    for target in SPARSE:
        for flags in itertools.product((False, True), repeat=3):
            yield _problem(target, "bf16", "chunk", **dict(zip(options[:3], flags, strict=True)))
    for target, kind, ragged in itertools.product(("own", "uniform", *DENSE, *SPARSE), _DTYPES, (False, True)):
        yield _problem(target, kind, "chunk", given=True, labels=True, ragged=ragged)
    for plan, target in itertools.product(("recompute", "chunk"), ("own", "forward", "jsd")):
        yield _problem(target, "fp16", plan, softcap=True)


def _problem(
    target: str, kind: str, plan: str, softcap: bool = False, bias: bool = False, labels: bool = False, masked: bool = False,
    statistics: bool = False, given: bool = False, known: bool = False, frozen: bool = False,
    ragged: bool = False, narrow: bool = False, tiny: bool = False, steep: bool = False,
) -> Problem:  # fmt: skip
    """Returns a problem on tensors without memory.

    ``ragged``: no size is a multiple of 16; ``narrow``: the width is one, but not of a tile's depth; ``tiny``: every size is 1;
    ``steep``: the softcap is too large for approximate functions.
    """
    dtype = _DTYPES[kind]
    tokens, vocabulary, width = (1, 1, 1) if tiny else (_TOKENS, _VOCABULARY - 7 * ragged, 80 if narrow else 640 - 3 * ragged)

    def side() -> Projection:
        if given:
            hidden = torch.empty(tokens, vocabulary, dtype=dtype)
            return GivenLogits(hidden, hidden)
        offset = torch.empty(vocabulary) if bias else None
        hidden, weight = torch.empty(tokens, width, dtype=dtype), torch.empty(vocabulary, width, dtype=dtype)
        return Projection(hidden, weight, offset, softcap=(200.0 if steep else 30.0) if softcap else None)

    token = torch.empty(tokens)
    problem = Problem(side(), target, token, plan=plan, statistics=statistics and target in DENSE)
    problem = replace(problem, needs=(not frozen, not (frozen or given), bias and not (frozen or given)), inplace=given)
    if target in DENSE:
        problem = replace(problem, teacher=side(), lse_t=token if known else None)
    elif target in SPARSE:
        entries = (tokens, _KNOWN)
        problem = replace(problem, indices=torch.empty(entries, dtype=torch.int64), logprobs=torch.empty(entries))
    elif target == "own":
        problem = replace(problem, label_factor=token, lse_s=token if known else None)
    if labels:
        problem = replace(problem, label_factor=token, labels=torch.empty(tokens, dtype=torch.int64))
    if masked:
        problem = replace(problem, counted=torch.empty(tokens, dtype=torch.bool))
    return problem
