"""Pages from strangers' results: every text is text, nothing is loaded from elsewhere, and a browser is told so."""

import csv
import io
import json
from html.parser import HTMLParser
from typing import Any

import pytest
from sweep_results import results

from undo_core.cli import main
from undo_core.io.progress import console
from undo_core.report import compare_page, derive, markdown_tables, page, style, terminal_table, write_report
from undo_core.report.compare import compare, comparison_table, write_comparison
from undo_core.report.compare_table import latex, methods_csv, methods_markdown, methods_table
from undo_core.report.points import csv_text, plot_points

EVIL = [
    "<script>alert(1)</script>",
    "</td></table><img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(1)>",
    "</style><style>@import url(//evil.example/x.css)",
    "</pre></details><iframe src=//evil.example>",
    "[click](javascript:alert(1)) | `x`\n# heading",
    "$\\frac{$ 100% \\input{/etc/passwd}",
    '=HYPERLINK("http://evil.example")',
    "[/red][bold]x",
    "\x1b[2J\x1b]0;title\x07",
    "{title} {body} %s",
]
TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "p",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "small",
    ),
    *("sup", "ul", "li", "figure", "figcaption", "img", "dl", "dt", "dd", "pre", "details", "summary"),
}


class Page(HTMLParser):
    """The tags of a page with their attributes, and its texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def everywhere(value: Any, text: str) -> Any:
    """Puts ``text`` after every text of a result that names something, as a stranger could choose it."""
    chosen = ("name", "command", "device", "stage", "torch", "system", "output", "groups", "path")
    if isinstance(value, list):
        return [everywhere(entry, text) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: entry + text if isinstance(entry, str) and key in chosen else everywhere(entry, text)
        for key, entry in value.items()
    }


def hostile(text: str, seed: int = 0) -> dict[str, Any]:
    found = results("run" + text, seed=seed, strength=1.0)
    found = everywhere({**found, "machine": {"device": "cpu"}, "versions": {"torch": "2"}}, text)
    found["config"] = {**(found.get("config") or {}), text: text, "nested": {text: [text]}}
    for model in found["models"]:
        model["metrics"] = {key: {**score, "groups": {text: score}} for key, score in model["metrics"].items()}
        if model.get("attack"):
            model["attacks"] = {text: {**model["attack"], "headline_step": 100}}
    return found


def check(html: str) -> None:
    parsed = Page(html)
    assert {tag for tag, _ in parsed.tags} <= TAGS
    for tag, attributes in parsed.tags:
        assert set(attributes) <= {"charset", "name", "content", "http-equiv", "lang", "class", "alt", "src"}, (tag, attributes)
        assert "src" not in attributes or attributes["src"].startswith("data:image/png;base64,")
    at = [
        index for index, (_, attributes) in enumerate(parsed.tags) if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(at) == 1 and parsed.tags[at[0] - 1] == ("meta", {"charset": "utf-8"}), "the policy comes before what it governs"
    policy = dict(part.strip().split(" ", 1) for part in parsed.tags[at[0]][1]["content"].split(";"))
    assert policy == {
        "default-src": "'none'",  # no script, frame, font, object or connection
        "style-src": "'unsafe-inline'",  # the page's own style sheet
        "img-src": "data:",  # pictures that are in the page
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert [tag for tag, _ in parsed.tags].count("style") == 1
    assert "@import" not in (sheet := html.partition("<style>")[2].partition("</style>")[0]) and "url(" not in sheet


@pytest.mark.parametrize("text", EVIL, ids=range(len(EVIL)))
def test_every_text_of_a_report_is_text(text, account, capsys):
    found = hostile(text)
    report, title = derive([found], f"title {text}"), f"title {text}"
    html = page.render(report, {})
    check(html)
    assert any(text in said for said in Page(html).texts), "the text itself is still shown"
    settings = compare([(f"runs/{text}", found), ("runs/b", hostile(text, seed=1))], text)
    table = methods_table(settings)
    check(compare_page.render(title, settings, {}, {setting.label: [text] for setting in settings}))
    for said in (
        markdown_tables(report),
        methods_markdown(title, settings, table, {setting.label: [text] for setting in settings}),
    ):
        assert "<" not in said and " [click]" not in said and "\n# heading" not in said
    tex = latex(table)
    assert "\\input" not in tex and "\\frac" not in tex
    for content in (methods_csv(settings), csv_text(plot_points(settings))):
        for row in csv.reader(io.StringIO(content)):
            assert not any(cell.startswith(("=", "+", "@")) for cell in row)
    for shown in (terminal_table([found]), comparison_table([("runs/a", found)]), f"line {text}"):
        console.print(shown)  # brackets are no markup, so that none of them is an error
    assert "[/red]" not in text or text in capsys.readouterr().out
    account("text in a report", tried=1, survived=1)


def test_figures_and_folders_of_hostile_results(tmp_path, monkeypatch):
    """All texts at once, with figures in few pixels; nothing is written outside the folder of the report."""
    monkeypatch.setattr(style, "DPI", 20)
    found = hostile(" ".join(EVIL))
    check(write_report([found], tmp_path / "one", "../../x").read_text(encoding="utf-8"))
    check(write_comparison([("runs/../../x", found)], tmp_path / "many", "/x").read_text(encoding="utf-8"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one"]


def test_the_command_says_one_line_without_control_characters(tmp_path, capsys):
    """A message that quotes a file cannot move the terminal's cursor."""
    path = tmp_path / "results-seed0.json"
    path.write_text(json.dumps({"format": 1, "metric": {"kind": "\x1b[2J", "headline_step": 1}, "models": [], "seed": 0}))
    assert main(["report", str(path), "--output", str(tmp_path / "\x1b[31mout")]) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1 and "\x1b" not in error and error.startswith("undo: error: ") and f"{path}: got metric" in error
    )
