"""The comparison page: one HTML file with inlined figures, without scripts or network access."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from undo_core.report.compare_table import methods_table
from undo_core.report.over_seeds import ABOUT, compared, differences_table, medians_table, order_sentences
from undo_core.report.page import claims_html, document, figure_html, table_html
from undo_core.report.points import Setting

_TITLES = {
    "overview": "Overview",
    "oracle": "Oracle matching",
    "methods": "Retain against forget",
    "envelopes": "Relearning",
    "robustness": "Robustness against compute",
    "labels": "Robustness over the label budget",
}


def render(title: str, settings: Sequence[Setting], figures: Mapping[str, bytes], said: Mapping[str, Sequence[str]]) -> str:
    """Renders the page as one HTML string; ``figures`` are PNGs by name, ``said`` are sentences on the claims by setting."""
    explained = captions(settings)
    several = len(settings) > 1
    sentences = [f"{label}: {text}" if several else text for label, texts in said.items() for text in texts]
    seeds = sorted({seed for setting in settings for seed in setting.report.seeds})
    named = f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{len(settings)} {"methods" if several else "method"} · {escape(named)}</p>',
        "<h2>Before and after UNDO</h2>",
        table_html(methods_table(settings)),
        '<p class="soft">Means over seeds, smallest and largest seed. The same in methods.md, methods.tex and methods.csv.</p>',
        claims_html(sentences),
    ]
    comparisons = compared(settings)
    if (medians := medians_table(settings)).rows:
        orders = order_sentences(settings[0].report, comparisons)
        parts.append(f"<h2>Over the seeds</h2>{table_html(medians)}")
        parts.append(f'<p class="soft">{escape(ABOUT)}</p>{table_html(differences_table(settings[0].report, comparisons))}')
        parts.append(f'<ul class="notes">{"".join(f"<li>{escape(text)}</li>" for text in orders)}</ul>')
    parts += [figure_html(_TITLES[name], png, explained[name]) for name, png in figures.items()]
    rows = "".join(f"<dt>{escape(s.label)}</dt><dd>{escape(', '.join(s.runs))}</dd>" for s in settings)
    parts.append(f"<h2>Runs</h2><p>Every plotted value with its run folder and stage: points.csv.</p><dl>{rows}</dl>")
    commands = dict.fromkeys(result.get("command", "") for setting in settings for result in setting.report.results)
    parts.append(f"<h2>To repeat it</h2><pre>{escape(chr(10).join(commands))}</pre>")
    return document(title, parts)


def captions(settings: Sequence[Setting]) -> dict[str, str]:
    """Returns a caption for each figure."""
    report = settings[0].report
    alphas = sorted({s.report.strongest.alpha or 0.0 for s in settings if s.report.strongest})
    stands = (
        f"UNDO is shown at the largest α at which the students of all seeds recovered ({', '.join(f'{a:g}' for a in alphas)})."
    )
    stands = stands if alphas else ""
    worst = "The worst case is taken over all attacks and learning rates"
    return {
        "overview": f"Each method alone and after UNDO, before and after {report.headline} attack steps; {worst[4:].lower()}, "
        f"each attack at its own headline step. {stands} "
        "Means; lines from the smallest to the largest seed.",
        "oracle": "A model that behaves like data filtering is not always as robust: the data-filtered model was distilled into "
        "the original one and, if configured, into random weights. Lines show the worst case at every step, as means over seeds.",
        "methods": f"Each method from unlearning alone (square) to UNDO (circle), before the attack and after "
        f"{report.headline} attack steps. {stands} Means; bars from the smallest to the largest seed.",
        "envelopes": f"{worst}, separately at every step (line); the edge of the band is the weakest attack at that step. "
        f"Each attack is drawn at its own steps. Means over seeds. {stands}",
        "robustness": "Robustness R on the scale from unlearn only (0) to data filtering (1), against compute C, the training "
        "over data filtering's, with a point for each α: means, bars from the smallest to the largest seed. C includes the "
        "unlearning, and in FLOPs the teacher's forward passes. Numbers give α if there is room. Models that did not recover "
        "have neither R nor C.",
        "labels": f"The same method with fewer labelled forget tokens. {stands} Means; bars from the smallest to the largest "
        "seed.",
    }
