"""Evaluations whose stop rule cannot be asked yet: each keeps its weights, so that training can go on and come back to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from undo_core.io.files import write_bytes
from undo_core.io.untrusted import NUMBER, checked_object, refused
from undo_core.training.training_state import load_weights, weights

ROOM = 1 << 30  # bytes of weights that are kept

RESULT = {  # of a training, as JSON holds it
    **{"steps": int, "tokens": {str: int}, "positions": {str: int}, "history": [{str: NUMBER}]},
    **{"stopped": (bool, type(None)), "seconds": NUMBER},
}


class KeptEvaluations:
    """The undecided evaluations of a training run, in the order of their steps; they survive a kill.

    Args:
        stop: the stop rule, a predicate on the metrics.
        known: whether the rule can answer without waiting.
        model: the trained model.
        folder: folder of the weights, one file for each evaluation.
        step: the step from which the run continues, 0 for a new one; what a killed run kept later is removed.
    """

    def __init__(
        self, stop: Callable[[dict[str, float]], bool], known: Callable[[], bool], model: nn.Module, folder: Path, step: int
    ) -> None:
        self.stop, self.known, self.model, self.folder = stop, known, model, folder
        for at, path in self._files():
            if at > step or step == 0:
                path.unlink()

    def keep(self, result: dict[str, Any], metrics: dict[str, float]) -> bool:
        """Keeps the model's weights if the rule cannot be asked yet and there is room for them; returns whether it did.

        Args:
            result: the run up to this evaluation, as JSON values.
            metrics: the metrics of this evaluation.
        """
        used = sum(path.stat().st_size for _, path in self._files())
        if self.known() or used + sum(parameter.nbytes for parameter in self.model.parameters()) > ROOM:
            return False
        self.folder.mkdir(exist_ok=True)
        content = save(weights(self.model), {"result": json.dumps(result), "metrics": json.dumps(metrics)})
        write_bytes(self.folder / f"{result['steps']}.safetensors", content)
        return True

    def first(self) -> dict[str, Any] | None:
        """Loads the weights of the first evaluation that satisfies the rule and returns its result; None if none does.

        The files then stay, because a run that is killed now goes on from a later checkpoint and comes back to them.
        """
        for _, path in self._files():
            with refused(f"{path}: not a kept evaluation"), safe_open(path, "pt") as file:
                saved = {name: json.loads(text) for name, text in file.metadata().items()}
                checked_object(saved, f"{path}", metrics={str: NUMBER}, result=RESULT)
            if self.stop(saved["metrics"]):
                load_weights(path, self.model)
                return {name: saved["result"][name] for name in RESULT} | {"stopped": True}
        shutil.rmtree(self.folder, ignore_errors=True)
        return None

    def _files(self) -> list[tuple[int, Path]]:
        return sorted((int(path.stem), path) for path in self.folder.glob("*.safetensors") if path.stem.isdigit())
