"""Every op's backends and the choice between them.

A backend module registers its implementation of an op under one name::

    @register("linear_kl_div", "reference")
    def linear_kl_div(...): ...

and a face asks for it with ``implementation("linear_kl_div", device)``. The preference is Triton on GPUs, C++ on CPUs and
the plain-PyTorch reference everywhere. ``UNDO_BACKEND=triton|cpu|reference`` or ``with backend("reference"):`` override it;
an op that cannot follow the override, or whose preferred backend could not be built, falls back to the reference and says
so once, loudly.
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
    """An op runs on another backend than the one that was asked for or preferred."""


def register(op: str, backend: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as ``op``'s implementation on ``backend``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted one of {BACKENDS}")

    def decorate(function: Callable) -> Callable:
        _implementations.setdefault(op, {})[backend] = function
        return function

    return decorate


def mark_unavailable(backend: str, reason: str) -> None:
    """Record why ``backend`` cannot be used in this process; fallbacks quote the reason."""
    _unavailable[backend] = reason


def requested_backend() -> str | None:
    """The backend asked for by the context manager or ``UNDO_BACKEND``; None when the preference decides."""
    name = _override.get() or os.environ.get("UNDO_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"UNDO_BACKEND: got {name!r}, wanted one of {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the ``with`` block on backend ``name`` ("triton", "cpu" or "reference")."""
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, wanted one of {', '.join(BACKENDS)}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def backends_of(op: str) -> tuple[str, ...]:
    """The backends that implement ``op`` in this process, in order of preference."""
    return tuple(name for name in BACKENDS if name in _implementations.get(op, {}))


def registered() -> tuple[str, ...]:
    """Returns the names of all ops that a backend implements, sorted."""
    return tuple(sorted(_implementations))


def unavailable() -> dict[str, str]:
    """Backends that cannot be used in this process, with the reason."""
    return dict(_unavailable)


def choose(op: str, device: torch.device) -> str:
    """The backend that runs ``op`` on tensors of ``device``: the requested one, else the preferred one, else the reference.

    The reference of the vocabulary losses is not registered: it is plain PyTorch, which autograd differentiates at the face.
    """
    available = _implementations[op]
    wanted = requested_backend()
    if wanted == "reference":
        return wanted
    preferred = wanted or ("cpu" if device.type == "cpu" else "triton")
    if preferred == "cpu" and device.type not in ("cpu", "meta"):  # it is handed addresses; on meta nothing is
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
    """The function that runs ``op`` on tensors of ``device``; see :func:`choose`."""
    return _implementations[op][choose(op, device)]


def implementation_on(op: str, backend: str) -> Callable:
    """``op``'s function on ``backend``."""
    return _implementations[op][backend]


def _warn_once(op: str, name: str, reason: str) -> None:
    if (op, name) not in _warned:
        _warned.add((op, name))
        warnings.warn(f"undo_kernels: {op} runs on the reference backend, not {name}: {reason}", BackendWarning, stacklevel=3)
