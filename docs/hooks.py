"""Extends MkDocs: pages generated from the program, and links that work both in the repository and on the site.

- ``cli/NAME.md``: the help of each command, as the program prints it at build time.
- ``api/*.md``: a section for each public name of the packages, which mkdocstrings fills from the docstrings.
- ``contributing.md`` and ``changelog.md``: the files of the repository's root.
- A link that leaves ``docs/`` names a file of the repository: it becomes a page of the site, or the file is copied to
  ``files/``.
- A finished page that would load anything from another host fails the build.
"""

from __future__ import annotations

import contextlib
import functools
import html
import importlib
import io
import os
import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
API = {  # page: package, and the text above the names
    "undo_core": "The method. Every name is loaded on first use.",
    "undo_core.ops": "The fused ops. They know tensors and no models, and import neither transformers nor a configuration.",
    "undo_kernels": "The implementations of the ops, and how to choose and to observe them.",
}
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
ROLE = re.compile(r":(?:func|class|data|meth|mod):<code>(?:~[\w.]+\.)?")
LOADED = re.compile(r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//|<link[^>]+rel=["']?(?:stylesheet|preload|preconnect|icon)[^>]+href=["']?(?:https?:)?//""")  # fmt: skip


def on_config(config):
    """Lists the generated pages at ``cli`` and ``api`` in the navigation of mkdocs.yml."""
    made = {"cli": {name: f"cli/{name}.md" for name in _commands()}, "api": {name: f"api/{name}.md" for name in API}}
    for section in config["nav"]:
        for entries in section.values():
            for entry in entries if isinstance(entries, list) else []:
                for title, place in entry.items() if isinstance(entry, dict) else []:
                    if place in made:
                        entry[title] = [{name: page} for name, page in made[place].items()]
    return config


def on_files(files: Files, config) -> Files:
    linked = set()
    for name, page in PAGES.items():
        if page != "index.md":
            files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    for page in files.documentation_pages():
        linked |= {
            target for target in map(_repository_path(page.src_uri), _targets(page.content_string)) if _is_outside(target)
        }
    for target in linked:
        files.append(
            File.generated(config, f"files/{target}", abs_src_path=str(ROOT / target), inclusion=InclusionLevel.NOT_IN_NAV)
        )
    for name in _commands():
        files.append(File.generated(config, f"cli/{name}.md", content=_command_page(name)))
    for package, text in API.items():
        files.append(File.generated(config, f"api/{package}.md", content=_api_page(package, text)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    resolve = _repository_path(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        target = resolve(match[2])
        if target in PAGES:
            site = PAGES[target]
        elif _is_outside(target):
            site = f"files/{target}"
        else:
            site = posixpath.relpath(target, "docs")
        return f"{match[1]}{posixpath.relpath(site, here or '.')}{match[3] or ''}{match[4]}"

    def changed(text: str) -> str:
        return LINK.sub(rewritten, text).replace("] [", "] \\[")  # two footnote marks in a row are not a reference link

    return _outside_code(changed, markdown)


def on_page_content(content: str, page, config, files: Files) -> str:
    """Removes the roles of references in docstrings, which are meant for editors: ``:func:`name` `` is shown as ``name``."""
    return ROLE.sub("<code>", content)


def on_post_build(config) -> None:
    for path in Path(config["site_dir"]).rglob("*.html"):
        if found := LOADED.search(path.read_text()):
            raise PluginError(f"{path}: loads from another host: {found[0]}")


def _outside_code(change, markdown: str) -> str:
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.S | re.M)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


def _targets(markdown: str) -> list[str]:
    found: list[str] = []
    _outside_code(lambda text: found.extend(match[2] for match in LINK.finditer(text)) or text, markdown)
    return found


def _repository_path(src_uri: str):
    """Returns the target of a relative link of the page ``src_uri``, from the root of the repository."""
    from_root = src_uri in PAGES.values() and src_uri != "index.md"
    folder = "" if from_root else posixpath.dirname(f"docs/{src_uri}")
    return lambda link: posixpath.normpath(posixpath.join(folder, link))


def _is_outside(target: str) -> bool:
    return not target.startswith("docs/") and target not in PAGES and (ROOT / target).is_file()


def _commands() -> list[str]:
    names = re.search(r"\{([a-z,]+)\}", _help())
    if names is None:
        raise PluginError("undo --help lists no commands")
    return names[1].split(",")


@functools.cache
def _help(*command: str) -> str:
    from undo_core.cli import main

    os.environ["COLUMNS"] = "100"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return printed.getvalue().replace(" \b", "")  # as a terminal shows it


def _command_page(name: str) -> str:
    """Renders a command's description as text, and its examples and flags as code."""
    usage, description, flags = re.fullmatch(r"usage: (.*?)\n\n(.*?)\n\n(options:.*)", _help(name), re.S).groups()
    parts = [f"# undo {name}"]
    for part in description.split("\n\n"):
        if part.startswith(" "):
            parts.append("```bash\n" + "\n".join(line.strip() for line in part.splitlines()) + "\n```")
        else:
            parts.append(html.escape(re.sub(r"([*_\[\]`])", r"\\\1", part.replace("-\n", "-")), quote=False))
    return "\n\n".join([*parts, f"```text\n{usage}\n\n{flags}```\n"])


def _api_page(package: str, text: str) -> str:
    module = importlib.import_module(package)
    names = [name for name in module.__all__ if not name.startswith("_") and not hasattr(getattr(module, name), "__path__")]
    return f"# {package}\n\n{text}\n\n" + "\n".join(f"::: {package}.{name}\n" for name in names)
