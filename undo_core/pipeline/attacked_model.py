"""A model under an attack: the stages of the attack's grid, including its extensions, and the entry in the results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from undo_core.attacks.config import AttackConfig, Trial
from undo_core.attacks.grid import Curve, may_grow, next_rate
from undo_core.attacks.interventions import Intervention
from undo_core.attacks.search import SearchConfig
from undo_core.io.untrusted import Facts
from undo_core.pipeline.stage import Folder, Stage
from undo_core.pipeline.stages import Grid, Probe, Relearn, Search
from undo_core.pipeline.stages.intervene import intervene_stage
from undo_core.pipeline.store import Store


@dataclass(frozen=True)
class Attacked:
    """A model under an attack.

    Attributes:
        config: settings of the attack, with a seed.
        prepared: stage of the prepared data.
        model: stage whose folder holds the attacked model.
        title: title shown to the user: the attack and the model.
        higher_is_better: True if performance is an accuracy, False if it is a loss.
        original: stage whose folder holds the model before the unlearning, if it is known.
    """

    config: AttackConfig | Intervention | SearchConfig
    prepared: Stage
    model: Stage
    title: str
    higher_is_better: bool = True
    original: Stage | None = None

    def stage(self, trial: Trial) -> Stage:
        """The stage that runs one trial."""
        label = f"{trial.rate:g}" if trial == Trial(rate=trial.rate) else trial.name
        if isinstance(self.config, Intervention):
            return intervene_stage(self.config.at(trial), self.prepared, self.model, self.original, f"{self.title} {label}")
        if isinstance(self.config, SearchConfig):
            return Search(config=self.config, prepared=self.prepared, model=self.model, title=self.title)
        grid = self._grid(trial) if self.config.together > 1 else None
        return trial_stage(self.config, trial, self.prepared, self.model, f"{self.title} {label}", grid)

    def _grid(self, trial: Trial) -> Stage | None:
        """The stage in which the trial trains beside others, if it does."""
        rates = self.config.rates if trial.rate in self.config.rates else [trial.rate]  # the grid grows by one rate at a time
        (group,) = (group for group in self.config.groups(self.config.trials(rates)) if trial in group)
        if len(group) == 1:
            return None
        inputs = {"prepared": self.prepared, "model": self.model, "title": self.title}
        return Grid(config=self.config, trials=tuple(group), **inputs)

    def stages(self) -> list[Stage]:
        """The stages of the configured grid."""
        return [self.stage(trial) for trial in self.config.trials()]

    def lines(self) -> list[tuple[str, list[Stage]]]:
        """The lines of a plan, each a title and the stages that compute its trials."""
        stages = self.stages()
        if isinstance(self.config, SearchConfig):
            return [(f"{self.title}, {self.config.budget:g} times the grid", stages)]
        grids = {grid.key: grid for stage in stages if (grid := stage.inputs.get("grid"))}
        lines = [(f"{self.title}, {len(grid.trials)} at once", [grid]) for grid in grids.values()]
        alone = [stage for stage in stages if not stage.inputs.get("grid")]
        of = "rate" if self.config.trains and self.config.seeds == 1 else "trial"
        return lines + ([(f"{self.title}, {len(alone)} {of}{'s'[: len(alone) > 1]}", alone)] if alone else [])

    def extension(self, store: Store) -> list[Stage]:
        """The missing stages of the next learning rate, if the worst rate is an end of the grid and the grid may still grow."""
        curves, beyond = self._grown(store)
        if beyond is None or not may_grow(self.config, curves):
            return []
        return [stage for stage in map(self.stage, self.config.trials([beyond])) if not store.done(stage)]

    def entry(self, store: Store) -> dict[str, Any]:
        """The entry of the headline attack in the results: its grid and curves."""
        curves, beyond = self._grown(store)
        ordered = sorted(curves, key=lambda trial: (trial.rate or 0, trial.shots or 0, -(trial.bits or 0), trial.order))
        rates = sorted({trial.rate for trial in curves if trial.rate is not None})
        return {
            "rates": rates,
            "steps": self.config.evaluations,
            "extended": self.config.trains and len(rates) > len(self.config.rates),
            "worst_at_end_of_grid": beyond is not None,
            "curves": [self._curve(trial, curves[trial], store) for trial in ordered],
        }

    def named_entry(self, store: Store) -> dict[str, Any]:
        """The entry of a further attack: as :meth:`entry`, with the kind, the headline step and the setting of each curve."""
        entry = self.entry(store)
        names = {self.stage(trial).name: trial.name for trial in self._grown(store)[0]}
        curves = [{**curve, "setting": names[curve["stage"]]} for curve in entry["curves"]]
        headline = entry["steps"][-1]
        if isinstance(self.config, AttackConfig) and self.config.trains:
            headline = self.config.headline_step
        facts: dict[str, Any] = {}
        if isinstance(self.config, SearchConfig):
            (stage,) = self.stages()
            facts = stage.results(store.manifest(stage))
        if isinstance(self.config, Intervention):
            curves = [{**curve, "point": self.config.point(curve["setting"])} for curve in curves]
            facts = {"needs_original": True} if self.config.needs_original else {}
        return {"kind": self.config.kind, "headline_step": headline, **facts, **entry, "curves": curves}

    def _curve(self, trial: Trial, curve: Curve, store: Store) -> dict[str, Any]:
        stage = self.stage(trial)
        facts = store.manifest(stage)
        order = {"seed": trial.order} if self.config.seeds > 1 and trial.bits is None else {}
        points = {name: [point[name] for point in curve] for name in ("forget", "retain")}
        if facts.get("steps"):  # all steps of an attack that trains cost the same
            points["flops"] = [facts["flops"] * point["step"] / facts["steps"] for point in curve]
        return {"rate": trial.rate, "stage": stage.name, **order, **points}

    def _grown(self, store: Store) -> tuple[dict[Trial, Curve], float | None]:
        """The finished curves of the grid and its extensions, and the next rate, or None if the worst rate lies inside."""
        curves: dict[Trial, Curve] = {}
        trials = self.config.trials()
        while True:
            curves |= {trial: trial_curve(self.config, store.manifest(self.stage(trial))) for trial in trials}
            beyond = next_rate(self.config, curves, self.higher_is_better)
            if beyond is None or not may_grow(self.config, curves):
                return curves, beyond
            trials = self.config.trials([beyond])
            if not all(store.done(self.stage(trial)) for trial in trials):
                return curves, beyond


def trial_curve(config: AttackConfig | Intervention | SearchConfig, facts: Facts) -> Curve:
    """Returns the curve in a trial's manifest.

    Raises:
        ValueError: it has not one evaluation at each of the attack's steps. The message names the file.
    """
    steps = [point["step"] for point in facts["curve"]]
    if steps != config.evaluations:
        raise ValueError(f"{facts.where}: got a curve with the steps {steps}, wanted {config.evaluations}")
    return facts["curve"]


def trial_stage(
    config: AttackConfig, trial: Trial, prepared: Stage | Folder, model: Stage | Folder, title: str, grid: Stage | None = None
) -> Stage:
    """Returns the stage that runs one trial of an attack, or takes it from ``grid``; ``config`` must have a seed."""
    at, inputs = config.at(trial), {"prepared": prepared, "model": model, "title": title}
    if config.trains:
        return Relearn(config=at, grid=grid, **inputs)
    if trial.shots is not None:
        return Probe(attack=config.kind, shots=trial.shots, seed=at.seed, **inputs)
    return Probe(attack=config.kind, bits=trial.bits, group_size=config.group_size if trial.bits < 8 else None, **inputs)
