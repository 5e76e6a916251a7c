"""Searches the settings of the strongest attack on a model; the only output is the manifest, with all trials."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from undo_core import distributed
from undo_core.attacks.config import AttackConfig
from undo_core.attacks.search import HELD, TRIAL, SearchConfig, search
from undo_core.evaluation.metrics import SCORE
from undo_core.io.files import write_json
from undo_core.io.untrusted import NUMBER, Shape, checked, read_object
from undo_core.models import forward_flops
from undo_core.pipeline.model_stage import TrainingStage
from undo_core.pipeline.needs import Cost, Memory, Scene
from undo_core.pipeline.prepared import load_split
from undo_core.pipeline.stage import Folder, Stage, Work
from undo_core.pipeline.stages.relearn import Relearn
from undo_core.training import TrainConfig
from undo_core.training.optimizers import bytes_per_parameter

if TYPE_CHECKING:
    from undo_core.pipeline.memory.meta import Meta

KEPT = {"curve": [{"step": int, "forget": SCORE, "retain": SCORE}], "steps": int, "flops": NUMBER}  # of a finished trial


@dataclass(frozen=True, kw_only=True)
class Search(TrainingStage):
    """Tries settings of an attack one after another, each chosen from the results of those before.

    Each finished trial is a file in the scratch folder. After an interruption the proposals are made again with these results,
    so that the search goes on where it stopped, within an unfinished trial too.

    Attributes:
        config: the search, with the attack that it is ``like``, and a seed.
        model: the attacked model.
    """

    kind = "search"
    entries: ClassVar[Shape] = {"trials": [TRIAL], "best": int, "flops": NUMBER}
    time_from = "attacks"
    config: SearchConfig
    model: Stage | Folder

    def _json(self) -> dict[str, Any]:
        return self.config.settings()

    def trial(self, attack: AttackConfig, title: str = "") -> Relearn:
        """The stage of one trial, as it would be alone."""
        return Relearn(config=attack, prepared=self.prepared, model=self.model, title=title)

    @property
    def heaviest(self) -> Relearn:
        """A trial that needs the most memory: of all weights, or of the largest adapters, with the most optimizer states."""
        corners = map(self.config.attack, self.config.corners())

        def size(attack: AttackConfig) -> tuple[bool, int, float]:
            return attack.kind != "lora", attack.lora.rank, sum(bytes_per_parameter(attack.training(1.0)).values())

        return self.trial(max(corners, key=size))

    @property
    def training(self) -> TrainConfig:
        return self.heaviest.training

    def retrained(self, **settings: Any) -> Self:
        """The search with other settings of ``like``; those that are searched do not change."""
        held = {name: value for name, value in settings.items() if name in HELD}
        like = dataclasses.replace(self.config.held, **held)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, like=like).along(like))

    def flag(self, name: str) -> str:
        return name

    def possible(self, name: str, value: Any) -> bool:
        return name in HELD and super().possible(name, value)

    def check_ranks(self, count: int) -> None:
        for point in self.config.corners():
            smallest = {**point, "batch_size": min(self.config.batch_sizes)}
            for share in self.config.retain_shares:
                self.trial(self.config.attack({**smallest, "retain_share": share})).check_ranks(count)

    def run(self, work: Work) -> dict[str, Any]:
        facts: list[dict[str, Any]] = []

        def attempt(number: int, attack: AttackConfig) -> list[dict[str, Any]]:
            facts.append(self._facts(number, attack, work))
            return facts[-1]["curve"]

        higher = load_split(work.inputs["prepared"], "valid_retain").answer_mask is not None
        tried = search(self.config, attempt, higher)
        trials = []
        for own, one in zip(facts, tried, strict=True):
            curve = {name: [point[name] for point in one.curve] for name in ("forget", "retain")}
            steps = [point["step"] for point in one.curve]
            flops = [own["flops"] * step / own["steps"] for step in steps]
            trials.append({"point": one.point, "steps": steps, "flops": flops, "best": one.best, **curve})
        best = max(range(len(tried)), key=lambda index: tried[index].score(higher))
        chosen = tried[best].curve[tried[best].best]
        shown = {name: chosen[name] for name in ("forget", "retain")}
        curve = [{"step": self.config.evaluations[-1], **shown}]
        spent = sum(own["flops"] for own in facts)
        return {"curve": curve, "best": best, "trials": trials, "flops": spent, "optuna": importlib.metadata.version("optuna")}

    def _facts(self, number: int, attack: AttackConfig, work: Work) -> dict[str, Any]:
        """The curve of a trial and what it took, from its file if it is finished, else computed."""
        title = f"{work.title} {number}"
        file, scratch = work.scratch / f"trial-{number}.json", work.scratch / f"trial-{number}"
        trial = self.trial(attack, title)
        known = distributed.on_first(lambda: read_object(file, settings=dict, facts=dict) if file.exists() else None)
        if known is not None:
            if known["settings"] != trial.settings:
                raise ValueError(
                    f"{file}: got settings that this search does not propose, perhaps by another version of optuna; wanted that "
                    f"version, or remove {work.scratch} to begin again"
                )
            return checked(known["facts"], KEPT, str(file), "facts")
        scratch.mkdir(exist_ok=True)
        found = trial.run(dataclasses.replace(work, scratch=scratch, title=title))
        facts = {name: found[name] for name in ("curve", "steps", "flops")}

        def keep() -> None:
            write_json(file, {"settings": trial.settings, "facts": facts})
            shutil.rmtree(scratch)

        distributed.on_first(keep)
        return facts

    def results(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        trials = [{"setting": f"trial-{number}", **trial} for number, trial in enumerate(facts["trials"])]
        return {"best": facts["best"], "spent_flops": facts["flops"], "trials": trials}

    def memory(self, meta: Meta) -> list[Memory]:
        return self.heaviest.memory(meta)

    def cost(self, scene: Scene) -> Cost:
        """The budget, as steps of the heaviest trial."""
        one = self.heaviest.config
        passes, sequences = one.passes, one.batch_size
        steps = -(-self.config.compute // (passes * sequences))
        flops = float(self.config.compute * scene.length) * forward_flops(scene.model, scene.length)
        checkpoint = self.heaviest.cost(scene).checkpoint
        return Cost(0, steps, sequences, passes, steps * sequences * scene.length, flops, checkpoint=checkpoint)
