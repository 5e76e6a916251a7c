"""The locks agree with pyproject.toml and constraints.txt, and what the code imports is declared."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest
import supply
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
IMPORTED_AS = {"pyyaml": "yaml"}  # where the module has another name than its package
LOCKS = {name: supply.locked(path) for name, path in supply.LOCKS.items()}
WANTED = {
    "core": PROJECT["dependencies"],
    "all": [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)],
}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_version_has_hashes(lock):
    lines = [line for line in supply.LOCKS[lock].read_text().splitlines() if line and line[0] not in " #"]
    assert len(LOCKS[lock]) == len(lines) > 50
    assert all(one.hashes and all(len(digest) == len("sha256:") + 64 for digest in one.hashes) for one in LOCKS[lock])


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_every_declared_dependency_in_a_version_that_is_allowed(lock):
    versions = {}
    for one in LOCKS[lock]:
        versions.setdefault(one.name, []).append(one.version)
    for requirement in map(Requirement, WANTED[lock]):
        name = canonicalize_name(requirement.name)
        if name == "undo-core":
            assert requirement.extras <= set(EXTRAS)
            continue
        assert name in versions, f"{requirement}: not in {lock}.txt; make lock"
        assert all(requirement.specifier.contains(version) for version in versions[name]), f"{requirement}: make lock"


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_the_versions_of_the_constraints(lock):
    pinned = {canonicalize_name(name): version for name, version in PINNED.items()}
    wrong = {(one.name, one.version) for one in LOCKS[lock] if one.version != pinned.get(one.name, one.version)}
    assert not wrong
    if lock == "all":
        assert set(pinned) <= {one.name for one in LOCKS[lock]}


def test_every_declared_dependency_has_one_version_in_the_constraints():
    named = {canonicalize_name(Requirement(line).name) for line in WANTED["all"]} - {"undo-core"}
    assert named <= {canonicalize_name(name) for name in PINNED}


def test_both_locks_name_the_same_files():
    everything = {(one.name, one.version): set(one.hashes) for one in LOCKS["all"]}
    assert all(set(one.hashes) == everything[one.name, one.version] for one in LOCKS["core"])


@pytest.mark.parametrize("folder", ["undo_core", "kernels/undo_kernels"])
def test_what_is_imported_is_declared(folder):
    """A package that only another one brings may be gone with that one's next version."""
    modules = {path.stem for path in (ROOT / "kernels").iterdir()} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    known = set(sys.stdlib_module_names) | modules
    declared = {canonicalize_name(Requirement(line).name) for line in WANTED["all"]}
    declared = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in declared}
    undeclared = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.partition(".")[0] for name in names} - known - declared:
                undeclared.setdefault(name, path.relative_to(ROOT).as_posix())
    assert not undeclared
