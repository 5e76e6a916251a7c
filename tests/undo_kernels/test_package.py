"""The package as a whole: imports go one way inside it, and importing it loads torch, numpy and triton alone."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "kernels"


def modules():
    files = sorted((ROOT / "undo_kernels").rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imported(path, known):
    """Names of the package's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known or name == "undo_kernels._cpu" else node.module for name in names]
        else:
            continue
        found.update(name for name in names if name in known)
    return found


def test_no_module_imports_itself_by_way_of_others():
    known = modules()
    graph = {name: imported(path, known) - {name} for name, path in known.items()}
    assert len(graph) > 30 and graph["undo_kernels.cpu.vocab_loss"] >= {"undo_kernels.cpu.plan", "undo_kernels.problem"}
    order = list(TopologicalSorter(graph).static_order())  # a circle is a CycleError that names its modules
    assert order[-1] == "undo_kernels"


def test_packages_import_each_other_one_way():
    """Importing a module runs its package first, so the packages must have an order, too."""
    known = modules()
    packages = {name for name, path in known.items() if path.name == "__init__.py"} - {"undo_kernels"}
    of = lambda name: next((p for p in packages if name == p or name.startswith(p + ".")), name)  # noqa: E731
    graph = {}
    for name, path in known.items():
        if name != "undo_kernels":
            graph.setdefault(of(name), set()).update({of(other) for other in imported(path, known)} - {of(name)})
    assert len(packages) >= 4
    TopologicalSorter(graph).prepare()


def test_the_package_loads_nothing_but_torch_numpy_and_triton():
    program = """
import sys, time, importlib.util
start = time.process_time()
import numpy, torch
if importlib.util.find_spec("triton"):
    import triton
theirs, before = time.process_time() - start, set(sys.modules)
start = time.process_time()
import undo_kernels
own = time.process_time() - start
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(own, theirs, *sorted(new))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    own, theirs, *loaded = run.stdout.split()
    assert loaded == ["undo_kernels"]
    assert float(own) < 0.5 * float(theirs)  # a twentieth, where this was written


def test_an_extension_that_other_sources_made_is_not_used(tmp_path):
    """After ``git pull`` the old binary may lack what the Python code asks of it, or compute something else."""
    from undo_kernels.cpu import extension
    from undo_kernels.cpu.sources import digest

    sources = ROOT.parent / "csrc"
    if extension.kernels is not None:
        assert digest(sources) == extension.kernels.SOURCES
    assert not extension._outdated(digest(sources)) and extension._outdated("0" * 64) and extension._outdated(None)
    for name in ("a.cpp", "b.h", "notes.txt"):
        (tmp_path / name).write_text(name)
    before = digest(tmp_path)
    (tmp_path / "notes.txt").write_text("not compiled")
    assert digest(tmp_path) == before
    (tmp_path / "b.h").write_text("changed")
    assert digest(tmp_path) != before


def test_the_package_and_its_plans_work_without_triton():
    program = """
import sys
sys.modules["triton"] = None  # as on a Mac
import torch, undo_kernels
shapes = {"student_hidden": (64, 32), "student_weight": (4096, 32), "teacher_hidden": (64, 32), "teacher_weight": (4096, 32)}
print(undo_kernels.ops.explain("linear_kl_div", shapes, torch.float32, "cpu"), undo_kernels.unavailable()["triton"])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "triton cannot be imported" in run.stdout
