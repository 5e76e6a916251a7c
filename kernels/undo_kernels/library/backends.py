"""The backends of each op, and the choice between them.

A backend registers its implementation of an op under the op's name::

    @register("noise_", "reference")
    def noise_(...): ...

Callers get it with ``implementation("noise_", device)``. Triton is preferred on GPUs, C++ on CPUs and plain PyTorch elsewhere.
``UNDO_BACKEND=triton|cpu|reference`` and ``with backend("reference"):`` override the preference. An op that cannot follow the override,
or whose preferred backend could not be built, runs on the reference and warns once.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import warnings
from collections.abc import Callable, Iterator

import torch

BACKENDS = ("triton", "cpu", "reference")

_implementations: dict[str, dict[str, Callable]] = {}
_unavailable: dict[str, str] = {}  # backend -> why it cannot be used in this process
_warned: set[tuple[str, str]] = set()
_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("undo_backend", default=None)


class BackendWarning(UserWarning):
    """Warns that an op runs on another backend than the requested or preferred one."""


def register(op: str, backend: str) -> Callable[[Callable], Callable]:
    """Registers the decorated function as ``op``'s implementation on ``backend``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted one of {BACKENDS}")

    def decorate(function: Callable) -> Callable:
        _implementations.setdefault(op, {})[backend] = function
        return function

    return decorate


def mark_unavailable(backend: str, reason: str) -> None:
    """Records why ``backend`` cannot be used in this process; the warning of a fallback quotes the reason."""
    _unavailable[backend] = reason


def requested_backend() -> str | None:
    """Returns the backend that the context manager or ``UNDO_BACKEND`` requests; None if the preference decides."""
    name = _override.get() or os.environ.get("UNDO_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"UNDO_BACKEND: got {name!r}, wanted one of {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs the ops inside the ``with`` block on backend ``name`` ("triton", "cpu" or "reference")."""
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, wanted one of {', '.join(BACKENDS)}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def backends_of(op: str) -> tuple[str, ...]:
    """Returns the backends that implement ``op``, one of :func:`registered`, in this process, in order of preference.

    The losses over the vocabulary are one op, ``vocab_loss``. Their reference is not registered; see :func:`choose`.

    Raises:
        ValueError: no backend implements an op of this name.
    """
    return tuple(name for name in BACKENDS if name in _of(op))


def registered() -> tuple[str, ...]:
    """Returns the names of all ops that a backend implements, sorted."""
    return tuple(sorted(_implementations))


def unavailable() -> dict[str, str]:
    """Returns the backends that cannot be used in this process, each with the reason."""
    return dict(_unavailable)


def choose(op: str, device: torch.device) -> str:
    """Returns the backend that runs ``op`` on tensors of ``device``: the requested one, else the preferred one, else the reference.

    The reference of the losses over the vocabulary is not registered, because autograd differentiates it where it is called.
    """
    available = _of(op)
    wanted = requested_backend()
    if wanted == "reference":
        return wanted
    preferred = wanted or ("cpu" if device.type == "cpu" else "triton")
    if preferred == "cpu" and device.type not in (
        "cpu",
        "meta",
    ):  # C++ gets addresses; meta tensors have none, and are only planned
        _warn_once(op, preferred, f"it works on CPU tensors, not on {device.type}")
        return "reference"
    if preferred in available and preferred not in _unavailable:
        return preferred
    if wanted is not None or (preferred in available and preferred in _unavailable):
        _warn_once(op, preferred, _unavailable.get(preferred, "this op has no such implementation"))
    return "reference"


# A compiled graph keeps the choice that was made when it was traced (torch.compiler.assume_constant_result, without its imports).
choose._dynamo_marked_constant = True


def implementation(op: str, device: torch.device) -> Callable:
    """Returns the function that runs ``op`` on tensors of ``device``; see :func:`choose`."""
    return _of(op)[choose(op, device)]


def implementation_on(op: str, backend: str) -> Callable:
    """Returns the implementation of ``op`` on ``backend``."""
    return _of(op)[backend]


def _of(op: str) -> dict[str, Callable]:
    """Returns the implementations of ``op`` by backend."""
    if op not in _implementations:
        raise ValueError(
            f"op: got {op!r}, wanted one of {', '.join(registered())} (every loss over the vocabulary is vocab_loss)"
        )
    return _implementations[op]


def _warn_once(op: str, name: str, reason: str) -> None:
    if (op, name) not in _warned:
        _warned.add((op, name))
        warnings.warn(f"undo_kernels: {op} runs on the reference backend, not {name}: {reason}", BackendWarning, stacklevel=3)
