"""Tables and a figure of a run on a pretrained model: what was kept and forgotten, and what attacks of several budgets bring back.

    python bench/study_budgets.py configs/gemma-3-270m.yaml --model.path=CHECKPOINT --data.retain='[english.txt]' \\
        --data.forget='[korean.txt]'

The arguments are those of ``undo run``. Reads the finished stages, so it also works while the run goes on; what is missing is left
out of the figure and shown as a dash in the tables. The worst case of a budget is the lowest loss on forget text over every attack and
learning rate that was evaluated at that step. Intervals are 95 %, over test sequences, of one seed. Writes ``table.md``,
``points.csv`` and ``budgets.png`` into docs/results/NAME, or the folder that ``--into`` names.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from summaries import markdown

from undo_core.cli.parser import run_config
from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.graph import Graph, Model, attacked_models, graph_of
from undo_core.pipeline.run import evaluation
from undo_core.pipeline.store import Store
from undo_core.report.style import COLOURS, LINES, MARKERS, STYLE, new_figure, png

ROOT = Path(__file__).resolve().parents[1]
BLUES = ("#9ecae1", "#6baed6", "#3182bd", "#08519c", "#08306b")
DASH = "–"

Score = dict[str, float]


@dataclass
class Curve:
    """One attack on one model: its name, learning rate and points, each with ``step``, ``forget`` and ``retain``."""

    attack: str
    rate: float
    points: list[dict[str, Any]]


@dataclass
class Found:
    """What is known of a model.

    Attributes:
        model: the model in the graph.
        own: scores on test text without an attack; None while the model is not finished.
        facts: manifest of the stage that made it; None while it is not finished.
        curves: finished attacks.
        missing: number of attacks that are not finished.
    """

    model: Model
    own: dict[str, Score] | None = None
    facts: dict[str, Any] | None = None
    curves: list[Curve] = field(default_factory=list)
    missing: int = 0

    def worst(self, budget: int) -> tuple[Curve, dict[str, Any]] | None:
        """The attack with the lowest loss on forget text after ``budget`` steps, and its point there."""
        points = [(curve, point) for curve in self.curves for point in curve.points if point["step"] == budget]
        return min(points, key=lambda pair: pair[1]["forget"]["value"], default=None)


def collect(config: RunConfig, graph: Graph, store: Store) -> list[Found]:
    """Reads the finished stages of a run."""
    found = {model.name: Found(model) for model in graph.models}
    for one in found.values():
        if store.done(one.model.stage):
            one.facts = store.manifest(one.model.stage)
            one.own = evaluation(store, one.model.stage, graph.prepared)
    for attack, models in attacked_models(config, graph).items():
        for name, attacked in models.items():
            for trial in attacked.config.trials():
                stage = attacked.stage(trial)
                if store.done(stage):
                    found[name].curves.append(Curve(attack, trial.rate or 0.0, store.manifest(stage)["curve"]))
                else:
                    found[name].missing += 1
    return list(found.values())


def scored(score: Score | None) -> str:
    """A loss with its interval."""
    return DASH if score is None else f"{score['value']:.2f} ({score['low']:.2f}–{score['high']:.2f})"


def tables(found: list[Found], budgets: list[int]) -> str:
    """Returns the tables as Markdown."""
    rows, costs = [], []
    for one in found:
        own = one.own or {}
        worst = [one.worst(budget) for budget in budgets]
        cells = [scored(own.get("retain")), scored(own.get("forget"))]
        for pair in worst:
            cells.append(DASH if pair is None else f"{scored(pair[1]['forget'])} at {pair[0].rate:g}")
        last = worst[-1]
        cells.append(scored(None if last is None else last[1]["retain"]))
        pending = f" ({one.missing} attacks to come)" if one.missing and one.model.attacked else ""
        rows.append([one.model.name + pending, *cells])
        if one.facts is not None and "steps" in one.facts:
            facts = one.facts
            target = facts.get("retain_target")
            ended = "all its steps" if target is None else "met it" if facts["stopped"] else "limit, not met"
            met = [DASH if target is None else f"{target:.2f}", ended]
            took = [f"{facts['tokens']:,}", f"{facts['flops'] / 1e12:.0f}", f"{facts['seconds'] / 60:.0f}"]
            costs.append([one.model.name, str(facts["steps"]), *met, *took])
    attacked = [f"forget after {budget} steps" for budget in budgets]
    header = ["model", "retain", "forget", *attacked, f"retain after {budgets[-1]} steps"]
    cost = ["model", "steps", "retain target", "ended by", "tokens", "TFLOP", "minutes"]
    return (
        "Loss in nats per token on test text, with 95 % intervals; after an attack, the worst case over its learning rates, with that "
        f"rate.\n\n{markdown(header, rows)}\n\nWhat the training of each model took; minutes are elapsed time and depend on what "
        f"else the machine did.\n\n{markdown(cost, costs)}\n"
    )


def look(model: Model, order: int) -> dict[str, Any]:
    """Colour, line and marker of a model; students of UNDO are darker with alpha."""
    colour = BLUES[min(order, len(BLUES) - 1)] if model.kind == "undo" else COLOURS[model.kind]
    return {"color": colour, "marker": MARKERS[model.kind], "linestyle": LINES.get(model.kind, "-")}


def figure(found: list[Found], budgets: list[int]) -> bytes:
    """Draws the worst case over the budget: left the forget text, right the retain text of the same attack."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        drawn, panels = new_figure(10.5, 4.4, columns=2)
        places = list(range(len(budgets) + 1))
        students = [one.model.name for one in found if one.model.kind == "undo"]
        for axes, part, title in zip(panels, ("forget", "retain"), ("forget text", "retain text"), strict=True):
            for one in found:
                scores = [one.own, *(pair and pair[1] for pair in map(one.worst, budgets))]
                known = [(place, score[part]) for place, score in zip(places, scores, strict=True) if score is not None]
                if not known or not one.model.attacked:
                    continue
                at, values = [place for place, _ in known], [score["value"] for _, score in known]
                spread = [[s["value"] - s["low"] for _, s in known], [s["high"] - s["value"] for _, s in known]]
                style = look(one.model, students.index(one.model.name) if one.model.kind == "undo" else 0)
                axes.errorbar(at, values, spread, label=one.model.name, capsize=2.5, elinewidth=1, markersize=6, **style)
            for one in found:
                if one.model.kind == "original" and one.own:
                    axes.axhline(
                        one.own[part]["value"], color=COLOURS["original"], linewidth=1.2, label="original, not attacked"
                    )
            axes.set_xticks(places, ["before", *map(str, budgets)])
            axes.set_xlabel("attack steps (worst learning rate at each)")
            axes.set_ylabel(f"loss on {title}, nats/token")
        if panels[1].get_legend_handles_labels()[0]:
            panels[1].legend(fontsize=9)
        return png(drawn)


def write_points(found: list[Found], path: Path) -> None:
    """Writes every measured point."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(["model", "attack", "rate", "step", "part", "loss", "low", "high", "sequences"])
        for one in found:
            rows = [("", "", "", one.own)] if one.own else []
            rows += [(curve.attack, curve.rate, point["step"], point) for curve in one.curves for point in curve.points]
            for attack, rate, step, scores in rows:
                for part in ("retain", "forget"):
                    values = [f"{scores[part][name]:.5g}" for name in ("value", "low", "high")]
                    out.writerow([one.model.name, attack, rate, step, part, *values, scores[part]["n"]])


def main() -> None:
    """Writes the tables and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, help="folder for the results")
    own, rest = parser.parse_known_args()
    config = run_config(["--config", *rest])
    if config.data.metric != "loss":
        sys.exit("study_budgets: wanted a run on text that is scored by its cross-entropy")
    graph = graph_of(config)
    found = collect(config, graph, Store(Path(config.output) / "stages"))
    budgets = sorted({step for attack in (config.relearn, *config.attacks.values()) for step in attack.evaluate_at if step})
    into = own.into or ROOT / "docs" / "results" / config.name
    into.mkdir(parents=True, exist_ok=True)
    text = tables(found, budgets)
    (into / "table.md").write_text(f"# {config.name}\n\n{text}", encoding="utf-8")
    (into / "budgets.png").write_bytes(figure(found, budgets))
    write_points(found, into / "points.csv")
    print(text)


if __name__ == "__main__":
    main()
