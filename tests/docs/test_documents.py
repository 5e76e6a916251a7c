"""The documents: every link has a target, every block of Python compiles, and all named commands and files exist."""

import ast
import contextlib
import functools
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(language):
    found = [(path, block) for path in DOCUMENTS for kind, block in BLOCK.findall(path.read_text()) if kind == language]
    assert found
    return [pytest.param(path, block, id=f"{name_of(path)}-{number}") for number, (path, block) in enumerate(found)]


def anchors(path):
    """Returns the anchors that MkDocs and GitHub make from headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
    for link in LINK.findall(text):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        if there.parts[-2:-1] in [("api",), ("cli",)] and there.suffix == ".md":  # made when the site is built
            assert there.stem in {"undo_core", "undo_core.ops", "undo_kernels"} | commands(), link
            continue
        assert there.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(there), f"{link}: no such heading"


@pytest.mark.parametrize(("path", "block"), blocks("python"))
def test_python_blocks_compile_and_import_what_is_there(path, block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
    attributes = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Attribute)]
    for node in attributes:
        if isinstance(node.value, ast.Name) and node.value.id in ("ops", "undo_kernels"):
            module = importlib.import_module({"ops": "undo_core.ops"}.get(node.value.id, node.value.id))
            assert hasattr(module, node.attr), f"{node.value.id} has no {node.attr}"


def test_the_block_that_explains_a_plan_runs(capsys):
    (block,) = [p.values[1] for p in blocks("python") if "ops.explain(" in p.values[1]]
    exec(block, {})
    assert "workspace" in capsys.readouterr().out


@pytest.mark.parametrize(("path", "block"), blocks("bash"))
def test_commands_exist(path, block):
    """Every command and flag of ``undo``, every target of ``make`` and every named file exists."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert set(words[1:2]) <= targets, line
        if words[:1] == ["undo"] and words[1] != "--help":
            assert words[1] in commands(), line
            flags = [word[2:].split("=")[0].replace("-", "_") for word in words[2:] if word.startswith("--")]
            known = help_of(words[1])
            assert all(re.search(rf"--{re.escape(flag)}\b", known) for flag in flags), line
        if words[:1] == ["python"]:
            assert (ROOT / words[1]).is_file(), line
        assert all((ROOT / word).is_file() for word in words if re.fullmatch(r"(configs|examples)/[\w/-]+\.\w+", word)), line


def test_named_tests_exist():
    named = {found for path in DOCUMENTS for found in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", path.read_text())}
    assert len(named) > 50
    for path, test in sorted(named):
        defined = (ROOT / path).read_text() if (ROOT / path).is_file() else ""
        assert defined and (not test or re.search(rf"^def {test}\(", defined, re.M)), f"{path}::{test} does not exist"


def test_yaml_is_yaml():
    for path in (*ROOT.glob("*.cff"), *(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


def test_versions_agree():
    """Tools installed by hand or by pre-commit have the versions of ``constraints.txt``; the citation has the version."""
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    hooks = {
        r["repo"].rsplit("/", 1)[1]: r["rev"] for r in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    }
    assert hooks["ruff-pre-commit"] == f"v{pinned['ruff']}" and hooks["mirrors-clang-format"] == f"v{pinned['clang-format']}"
    version = importlib.import_module("undo_core.version").__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


def test_every_page_is_in_the_navigation():
    """MkDocs checks this too, but only if it is installed."""
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"([\w/.-]+\.md)$", text, re.M))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= listed
    assert {page for page in listed - pages} == {"contributing.md", "changelog.md"}


def test_the_readme_is_a_door():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@functools.cache
def commands():
    return set(re.search(r"\{([a-z,]+)\}", help_of())[1].split(","))


@functools.cache
def help_of(*command):
    from undo_core.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return printed.getvalue()
