"""Comparison report over several runs: results grouped by setting, the paper's figures, and a table of the methods."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from undo_core.io.files import hash_json, read_json, write_bytes, write_json, write_text
from undo_core.report import compare_figures, compare_page, compare_table
from undo_core.report.claims import claims
from undo_core.report.derivation import derive
from undo_core.report.points import FIGURES, Setting, csv_text, plot_points
from undo_core.report.results import read_results, settings_of
from undo_core.report.words import method_name
from undo_core.version import __version__

FORMAT = 2
Loaded = tuple[str, dict[str, Any]]  # folder of a run, and the contents of its results file


def load(paths: Sequence[Path]) -> list[Loaded]:
    """Reads results from files, run folders and sweep folders; each file is read once.

    Raises:
        FileNotFoundError: a path has no results.
        ValueError: a file does not hold results of a run or of an attack. The message names it.
    """
    files: dict[str, Path] = {}
    for path in paths:
        found = (
            [path]
            if path.is_file()
            else sorted([*path.glob("results-seed*.json"), *path.glob("runs/*/results-seed*.json")], key=_by_number)
        )
        if not found:
            raise FileNotFoundError(
                f"results: got {path}, which has no results-seedN.json; wanted what undo run or undo sweep wrote"
            )
        files.update({os.path.realpath(file): file for file in found})
    return [(str(file.parent), read_results(file)) for file in files.values()]


def write_comparison(loaded: Sequence[Loaded], folder: Path, title: str) -> Path:
    """Writes ``comparison.html``, its figures as PNG, their values in ``points.csv``, and ``methods`` as md, tex and csv.

    Args:
        loaded: run folders and their results.
        folder: output folder, created if missing; a report of the same results is not written again.
        title: heading of the page.

    Returns:
        The path of ``comparison.html``.

    Raises:
        ValueError: as in :func:`~undo_core.report.derive`, or settings whose metrics or headline steps differ.
    """
    sources = [{"folder": run, "seed": values["seed"], "sha256": hash_json(values)} for run, values in loaded]
    known, page = folder / "comparison.json", folder / "comparison.html"
    made_of = {"format": FORMAT, "version": __version__, "title": title, "sources": sources}
    if known.exists():
        before = read_json(known)
        there = all((folder / name).exists() for name in (page.name, *before.get("files", [page.name])))
        if there and all(before.get(name) == value for name, value in made_of.items()):
            return page
    settings = compare(loaded, title)
    points = plot_points(settings)
    drawn = compare_figures.draw(settings, points)
    table = compare_table.methods_table(settings)
    said = {setting.label: claims(setting.report) for setting in settings}
    html = compare_page.render(title, settings, drawn, said)
    numbers = [{"label": s.label, "runs": s.runs, **s.report.to_json(), "claims": said[s.label]} for s in settings]
    folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        if name in drawn:
            write_bytes(folder / f"{name}.png", drawn[name])
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)  # left by an earlier report
    write_text(folder / "points.csv", csv_text([point for point in points if point.figure in drawn]))
    write_text(folder / "methods.md", compare_table.methods_markdown(title, settings, table, said))
    write_text(folder / "methods.tex", compare_table.latex(table))
    write_text(folder / "methods.csv", compare_table.methods_csv(settings))
    write_text(page, html)
    files = [*(f"{name}.png" for name in drawn), "points.csv", "methods.md", "methods.tex", "methods.csv"]
    write_json(known, {**made_of, "files": files, "settings": numbers})  # written last, so that it marks a complete report
    return page


def comparison_table(loaded: Sequence[Loaded]) -> RenderableType:
    """Returns the table of the methods for ``rich``; ``loaded`` and errors as in :func:`write_comparison`."""
    return compare_table.terminal(compare_table.methods_table(compare(loaded, "")))


def compare(loaded: Sequence[Loaded], title: str) -> list[Setting]:
    """Groups results by setting; runs that differ only in their seed and in their list of alphas are one setting."""
    groups: dict[str, list[Loaded]] = {}
    for run, values in loaded:
        derive([values], title)  # raises if these are not the results of a run
        groups.setdefault(hash_json(sorted(_varied(values).items())), []).append((run, values))
    labels = _labels(list(groups.values()))
    merged = [_merge(group) for group in groups.values()]
    origins = [_origins(group) for group in groups.values()]
    settings = []
    for label, results, origin, group in zip(labels, merged, origins, groups.values(), strict=True):
        donor, lent = _lender(results, merged)
        for values in results if donor is not None else ():
            if values["seed"] in lent:
                origin = {**origin, ("filter", values["seed"]): origins[donor]["filter", values["seed"]]}
        own = [{**values, "models": values["models"] + lent.get(values["seed"], [])} for values in results]
        lender = None if donor is None else labels[donor]
        settings.append(Setting(label, derive(own, label), origin, sorted({run for run, _ in group}), lender))
    first = settings[0].report
    for setting in settings[1:]:
        for name in ("kind", "headline"):
            if getattr(setting.report, name) != getattr(first, name):
                raise ValueError(
                    f"results: {settings[0].label} and {setting.label} differ in metric.{name}; wanted runs with one metric "
                    "and one headline step"
                )
    return settings


def _by_number(path: Path) -> list[list[tuple[str, int]]]:
    """Sort key that compares numbers in paths by value: rows=300 comes before rows=1000."""
    parts = [re.findall(r"(\D+|^)(\d*)", part) for part in path.parts]
    return [[(text, int(number or 0)) for text, number in part] for part in parts]


def _varied(values: dict[str, Any]) -> dict[str, Any]:
    """Settings that distinguish runs, as a flat dictionary with dotted keys."""
    return {key: value for key, value in settings_of(values).items() if key != "noise.alphas"}


def _merge(group: Iterable[Loaded]) -> list[dict[str, Any]]:
    """Merges runs of one setting into one results value per seed, with the models of all runs."""
    merged: dict[int, dict[str, Any]] = {}
    alphas: set[float] = set()
    for run, values in group:
        alphas |= set(((values.get("config") or {}).get("noise") or {}).get("alphas", ()))
        known = merged.setdefault(values["seed"], {**values, "models": []})
        there = {entry["name"]: entry["stage"] for entry in known["models"]}
        entries = {entry["name"]: entry for entry in values["models"]}
        for name in (name for name in entries if there.get(name, entries[name]["stage"]) != entries[name]["stage"]):
            raise ValueError(
                f"results: got two models {name} of seed {values['seed']} from runs whose settings agree, {run} among them; "
                "wanted one"
            )
        known["models"] = known["models"] + [entry for name, entry in entries.items() if name not in there]
    for values in merged.values():
        config = values.get("config") or {}
        if "alphas" in (config.get("noise") or {}):
            values["config"] = {**config, "noise": {**config["noise"], "alphas": sorted(alphas)}}
    return list(merged.values())


def _lender(
    results: Sequence[dict[str, Any]], merged: Sequence[list[dict[str, Any]]]
) -> tuple[int | None, dict[int, list[dict[str, Any]]]]:
    """Finds data filtering for a setting that trained none: that of the first setting for which ``_controlled`` gives the same.

    Returns the index of that setting, or None, and the entries of data filtering by seed.
    """
    if not any(_filter_of(values) for values in results):
        for index, others in enumerate(merged):
            lent = {
                values["seed"]: [_to_target(entry, values["metric"]) for entry in _filter_of(other)]
                for values in results
                for other in others
                if other["seed"] == values["seed"] and _filter_of(other) and _controlled(other) == _controlled(values)
            }
            if lent:
                return index, lent
    return None, {}


def _filter_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in values["models"] if entry["kind"] == "filter"]


def _to_target(entry: dict[str, Any], metric: dict[str, Any]) -> dict[str, Any]:
    """Entry of data filtering with its training counted only up to the evaluation that first met this run's retain target."""
    training, target = entry.get("training"), metric.get("retain_target")
    if training is None or target is None or not training.get("stop_step"):
        return entry
    sign = 1 if metric["kind"] == "accuracy" else -1
    met = (e["step"] for e in training["history"] if "retain" in e and sign * (e["retain"] - target) >= 0)
    step = next(met, None)
    if step is None:
        return {**entry, "training": {**training, "short_of_target": True}}
    share = step / training["stop_step"]
    counted = {name: training[name] * share for name in ("stop_tokens", "stop_flops")}
    return {**entry, "training": {**training, **counted, "stop_step": step}}


def _controlled(values: dict[str, Any]) -> list[Any]:
    """Settings that data filtering and the attack on it depend on, except the retain target at which it stops."""
    config = values.get("config") or {}
    distill = config.get("distill") or {}
    train = distill.get("train") or {}
    own = [config.get(name) for name in ("data", "model", "pretrain", "relearn", "attacks")]
    return [
        *own,
        distill.get("recover"),
        train.get("batch_size"),
        train.get("eval_every"),
        values["metric"].get("headline_step"),
    ]


def _origins(group: Iterable[Loaded]) -> dict[tuple[str, int], str]:
    """Run folder of each model and seed."""
    origins: dict[tuple[str, int], str] = {}
    for run, values in group:
        for entry in values["models"]:
            origins.setdefault((entry["name"], values["seed"]), run)
    return origins


def _labels(groups: list[list[Loaded]]) -> list[str]:
    """Returns a distinct label for each setting.

    A label comes from the runs' names or their common part, or from the method; settings are added where labels are equal.
    """
    labels = []
    for group in groups:
        names = [str(values.get("name") or "") for _, values in group]
        common = [part for part in names[0].split(",") if all(part in name.split(",") for name in names)]
        unlearn = (group[0][1].get("config") or {}).get("unlearn") or {}
        method = "+".join(name for name in (unlearn.get("method"), unlearn.get("robust")) if name not in (None, "none"))
        labels.append(method_name(method if len(groups) == 1 and method else ",".join(common) or method or "results"))
    settings = [_varied(group[0][1]) for group in groups]
    return [_told_apart(index, labels, settings) for index in range(len(labels))]


def _told_apart(index: int, labels: Sequence[str], settings: Sequence[dict[str, Any]]) -> str:
    """Returns a label, with the settings in which it differs from others that have the same label."""
    own, alike = settings[index], [other for label, other in zip(labels, settings, strict=True) if label == labels[index]]
    differing = sorted(key for key in set().union(*alike) if any(other.get(key) != own.get(key) for other in alike))
    if not differing:
        return labels[index]
    named = ", ".join(f"{key.rpartition('.')[2]}={own.get(key)}" for key in differing)
    return f"{labels[index]} ({named})"
