"""Counts the operators that compute: each is at least one launch on a GPU."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {
    "_unsafe_view", "alias", "detach", "expand", "permute", "select", "slice", "squeeze", "t", "transpose", "unsqueeze", "view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts what runs within it.

    Attributes:
        count: operators so far, without views.
    """

    count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.count += operator.overloadpacket.__name__ not in VIEWS
        return operator(*arguments, **(options or {}))
