"""Report of one run, or of several seeds of it: an HTML page, its figures, the numbers, and a table for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from undo_core.io.files import hash_json, read_json, write_bytes, write_json, write_text
from undo_core.report import backend as _backend  # noqa: F401  # before anything imports matplotlib
from undo_core.report import figures, page, words
from undo_core.report.alpha_search import PREDICTED, RULE, alpha_sentences, alpha_table
from undo_core.report.attack_costs import ABOUT as ABOUT_COSTS
from undo_core.report.attack_costs import attack_cost_table
from undo_core.report.claims import PUBLISHED, claims
from undo_core.report.correlation import correlation_table
from undo_core.report.derivation import derive
from undo_core.report.inside import measure_table
from undo_core.report.metrics import Report
from undo_core.report.over_seeds import ABOUT, between_alphas, differences_table, order_sentences
from undo_core.report.search import search_table
from undo_core.report.slowdown import explanation, missing_line, slowdown_table
from undo_core.report.table import attack_table, cost_table, markdown, order_sentence, plain, results_table, terminal


def write_report(results: list[dict[str, Any]], folder: Path, title: str) -> Path:
    """Writes ``report.html`` with everything inlined, the figures as PNG, ``report.json`` and ``table.md``.

    Args:
        results: contents of ``results.json``, one per seed, of runs that differ only in their seed.
        folder: output folder, created if missing. Files of an earlier report are replaced, each atomically; a report of the
            same results is not written again.
        title: heading of the page.

    Returns:
        The path of ``report.html``.

    Raises:
        ValueError: no results, an unknown format, a repeated seed, or runs whose settings differ.
    """
    report = derive(results, title)
    known, done = folder / "report.json", folder / "report.html"
    sources = [{"seed": values["seed"], "sha256": hash_json(values)} for values in report.results]
    if known.exists() and done.exists():
        before = read_json(known)
        if (before["title"], before.get("sources")) == (title, sources):
            return done
    drawn = figures.draw(report)
    html = page.render(report, drawn)
    folder.mkdir(parents=True, exist_ok=True)
    for name in page.TITLES:
        if name not in drawn:
            (folder / f"{name}.png").unlink(missing_ok=True)  # left by an earlier report of other results
    for name, png in drawn.items():
        write_bytes(folder / f"{name}.png", png)
    write_text(folder / "table.md", markdown_tables(report))
    write_text(done, html)
    write_json(known, {**report.to_json(), "sources": sources})  # written last, so that it marks a complete report
    return done


def terminal_table(results: list[dict[str, Any]]) -> RenderableType:
    """Returns the table of results for ``rich``; ``results`` and errors as in :func:`write_report`."""
    report = derive(results, str(results[0].get("name", "results")) if results else "")
    said = words.back(report)
    return Group(terminal(report), *map(Text, [said] if said else []), *map(Text, alpha_sentences(report)))


def markdown_tables(report: Report) -> str:
    """Returns the sentences and tables of a report as Markdown."""
    orders = [f"- {plain(order_sentence(order, report))}" for order in report.orders if order.holds is not None]
    parts = [
        f"# {plain(report.title)}",
        *map(plain, words.opening(report)),
        markdown(results_table(report)).rstrip(),
        *(["\n".join(orders)] if orders else []),
    ]
    if (differences := differences_table(report, comparisons := between_alphas(report))).rows:
        ordered = "\n".join(f"- {plain(sentence)}" for sentence in order_sentences(report, comparisons))
        parts += ["## Between alphas", markdown(differences).rstrip(), ABOUT, ordered]
    said = claims(report)
    if said:
        parts.append(f"{PUBLISHED}\n\n" + "\n".join(f"- {plain(sentence)}" for sentence in said))
    if (tried := alpha_table(report)).rows:
        said = [*alpha_sentences(report), RULE, PREDICTED]
        parts += ["## The search for an alpha", markdown(tried).rstrip(), "\n".join(f"- {plain(one)}" for one in said)]
    attacks, measures, costs = attack_table(report), measure_table(report), cost_table(report)
    if attacks.rows:
        parts += ["## By attack", markdown(attacks).rstrip()]
    if (searches := search_table(report)).rows:
        parts += ["## What the search found", markdown(searches).rstrip()]
    if (slowdowns := slowdown_table(report)).rows:
        parts += ["## Compute slowdown", markdown(slowdowns).rstrip(), plain(explanation(report))]
    elif why := missing_line(report):
        parts.append(plain(why))
    if measures.rows:
        parts += ["## Measures", markdown(measures).rstrip()]
    if (predictions := correlation_table(report)).rows:
        parts += ["## Does a measure predict relearning?", markdown(predictions).rstrip()]
    if costs.rows:
        parts += ["## What it took", markdown(costs).rstrip()]
    if (attacking := attack_cost_table(report)).rows:
        parts += ["## What each attack took", markdown(attacking).rstrip(), ABOUT_COSTS]
    return "\n\n".join(parts) + "\n"


__all__ = ["derive", "terminal_table", "write_report"]
