"""The report page: one HTML file with inlined figures, without scripts or network access."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from html import escape

from undo_core.report import words
from undo_core.report.alpha_search import PREDICTED, RULE, alpha_sentences, alpha_table
from undo_core.report.attack_costs import ABOUT as ABOUT_COSTS
from undo_core.report.attack_costs import attack_cost_table
from undo_core.report.claims import PUBLISHED, claims
from undo_core.report.correlation import correlation_table
from undo_core.report.inside import measure_table
from undo_core.report.metrics import Report
from undo_core.report.over_seeds import ABOUT, between_alphas, differences_table, order_sentences
from undo_core.report.search import search_table
from undo_core.report.slowdown import explanation, missing_line, slowdown_table
from undo_core.report.table import Table, attack_table, cost_table, group_table, order_sentence, results_table

_CSS = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #626a75; --paper: #fff; --line: #dfe3e8; --tint: #f5f7f9;
  --mark: #b35900; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ae; --paper: #15181c; --line: #333a42; --tint: #1d2126; --mark: #f0a24f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 1.2rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .2rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, dl, figcaption { max-width: 46rem; }
.soft, figcaption, small { color: var(--soft); }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .4rem .5rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; background: var(--tint); vertical-align: bottom; line-height: 1.3; white-space: normal;
  min-width: 3.9rem; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--tint); font-weight: 600; }
td small, th small { display: block; font-size: .74rem; font-weight: 400; line-height: 1.3; }
sup { color: var(--mark); font-weight: 600; margin-left: .12em; line-height: 0; }
.notes { font-size: .86rem; margin: .5rem 0; padding: 0; list-style: none; }
figure { margin: 1.2rem 0 1.8rem; }
figure div { overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: .6rem;
  max-width: 46rem; }
figure img { display: block; width: 100%; height: auto; min-width: 27rem; }
figcaption { font-size: .9rem; margin-top: .5rem; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem; color: var(--soft); }
pre { overflow-x: auto; background: var(--tint); border: 1px solid var(--line); border-radius: 8px; padding: .7rem;
  font-size: .8rem; }
details { margin: .8rem 0; } summary { cursor: pointer; font-weight: 600; }
"""

# What a browser may load for the page: its own style sheet and the pictures that are inlined; no script, nothing from elsewhere.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
{body}
</body>
</html>
"""

TITLES = {
    "relearning": "Relearning",
    "slowdown": "Forget performance against attack FLOPs",
    "compute": "Robustness against compute",
    "tradeoff": "Retain against forget",
    "training": "Training",
    "rates": "The attack, rate by rate",
    "search": "The search, trial by trial",
    "students": "Further students",
    "interventions": "Interventions",
    "inside": "What is left inside",
}


def render(report: Report, figures: dict[str, bytes]) -> str:
    """Renders the page as one HTML string; ``figures`` are PNGs by name."""
    first = report.results[0]
    seeds = f"seed {report.seeds[0]}" if len(report.seeds) == 1 else f"seeds {', '.join(map(str, report.seeds))}"
    device = (first.get("machine") or {}).get("device")
    captions = words.captions(report)
    orders = [order for order in report.orders if order.holds is not None]
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="soft">{escape(" · ".join(filter(None, [first.get("name"), seeds, device])))}</p>',
        *(f"<p>{escape(paragraph)}</p>" for paragraph in words.opening(report)),
        "<h2>Results</h2>",
        table_html(results_table(report)),
    ]
    if orders:
        text = "".join(f"<li>{escape(order_sentence(order, report))}</li>" for order in orders)
        parts.append(f'<p>Does the attack get harder with α? After {report.headline} steps:</p><ul class="notes">{text}</ul>')
    if (differences := differences_table(report, comparisons := between_alphas(report))).rows:
        text = "".join(f"<li>{escape(sentence)}</li>" for sentence in order_sentences(report, comparisons))
        parts.append(f"<h2>Between alphas</h2>{table_html(differences)}")
        parts.append(f'<p class="soft">{escape(ABOUT)}</p><ul class="notes">{text}</ul>')
    parts.append(claims_html(claims(report)))
    if (tried := alpha_table(report)).rows:
        sentences = [*alpha_sentences(report), RULE, PREDICTED]
        parts.append(f"<h2>The search for an alpha</h2>{table_html(tried)}")
        parts += [f"<p>{escape(sentence)}</p>" for sentence in sentences]
    attacks = attack_table(report)
    if attacks.rows:
        parts.append(f"<h2>By attack</h2>{table_html(attacks)}")
        parts.append('<p class="soft">Each attack counts at its own headline step, with the worst trial of its grid.</p>')
    if (searches := search_table(report)).rows:
        parts.append(f"<h2>What the search found</h2>{table_html(searches)}")
    slowdowns = slowdown_table(report)
    if slowdowns.rows:
        parts.append(f"<h2>Compute slowdown</h2>{table_html(slowdowns)}")
        parts.append(f'<p class="soft">{escape(explanation(report))}</p>')
    elif why := missing_line(report):
        parts.append(f'<p class="soft">{escape(why)}</p>')
    for name, png in figures.items():
        parts.append(figure_html(TITLES[name], png, captions[name]))
    measures = measure_table(report)
    if measures.rows:
        parts.append(f"<h2>Measures</h2>{table_html(measures)}")
    if (predictions := correlation_table(report)).rows:
        parts.append(f"<h2>Does a measure predict relearning?</h2>{table_html(predictions)}")
    costs, groups = cost_table(report), group_table(report)
    if costs.rows:
        parts.append(f"<h2>What it took</h2>{table_html(costs)}")
    if (attacking := attack_cost_table(report)).rows:
        parts.append(f'<h2>What each attack took</h2>{table_html(attacking)}<p class="soft">{escape(ABOUT_COSTS)}</p>')
    if groups.rows:
        parts.append(f"<details><summary>By group, before the attack</summary>{table_html(groups)}</details>")
    terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in words.definitions(report))
    parts.append(f"<h2>Terms</h2><dl>{terms}</dl><h2>To repeat it</h2>")
    commands = "\n".join(dict.fromkeys(result.get("command", "") for result in report.results))
    parts.append(f"<pre>{escape(commands)}</pre>")
    kept = {key: first.get(key) for key in ("versions", "machine")}
    parts.append(_details("Versions and machine", kept))
    parts.append(_details("Sequences evaluated", first["metric"].get("eval_splits") or {}))
    parts.append(
        _details("Configuration" + (f" (of seed {report.seeds[0]})" if len(report.seeds) > 1 else ""), first.get("config"))
    )
    return document(report.title, parts)


def document(title: str, parts: Iterable[str]) -> str:
    """Wraps the parts of a page in an HTML document."""
    return _PAGE.format(title=escape(title), policy=POLICY, css=_CSS, body="\n".join(parts))


def figure_html(title: str, png: bytes, caption: str) -> str:
    """Renders a figure with its heading and caption; the image is inlined."""
    source = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    image = f'<div><img alt="{escape(caption)}" src="{source}"></div>'
    return f"<h2>{escape(title)}</h2><figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def claims_html(sentences: Iterable[str]) -> str:
    """Renders the sentences on the published claims; empty without sentences."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<p>{escape(PUBLISHED)}</p><ul class="notes">{items}</ul>' if items else ""


def table_html(table: Table) -> str:
    """Renders the table with its footnotes and the sentences below it."""
    heads = "".join(
        f"<th>{escape(name)}{f'<small>{escape(unit)}</small>' if unit else ''}</th>" for name, unit in table.headers
    )
    rows = []
    for row in table.rows:
        cells = []
        for cell in row:
            marks = f"<sup>{escape(','.join(sorted(cell.marks)))}</sup>" if cell.marks else ""
            small = "".join(f"<small>{escape(text)}</small>" for text in (cell.spread, cell.remark) if text)
            cells.append(f"<td>{escape(cell.main)}{marks}{small}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f"<li><sup>{escape(mark)}</sup> {escape(text)}</li>" for mark, text in table.notes.items())
    html = f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    below = "".join(f'<p class="soft">{escape(text)}</p>' for text in table.below)
    return html + (f'<ul class="notes soft">{notes}</ul>' if notes else "") + below


def _details(title: str, value: object) -> str:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
