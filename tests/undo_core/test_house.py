"""Rules of the code: imports go one way, and the repository shadows no other package."""

import ast
import graphlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from stage_kinds import KINDS

ROOT = Path(__file__).resolve().parents[2]

# A module may import modules of its own rank and of lower ranks.
RANKS = [
    {"undo_core.cli", "undo_core.__main__"},
    {"undo_core.planning"},
    {"undo_core.pipeline"},
    {"undo_core.report"},
    {"undo_core.unlearning"},
    {"undo_core.attacks", "undo_core.distillation"},
    {"undo_core.evaluation", "undo_core.training", "undo_core.noise"},
    {"undo_core.distributed"},
    {"undo_core.data", "undo_core.ops", "undo_core.checkpoints"},
    {"undo_core.models", "undo_core.io"},
    {"undo_core.version"},
    {"undo_kernels"},
]


def rank(module: str) -> int | None:
    for index, names in enumerate(RANKS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return index
    return None


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> list[tuple[str, Path]]:
    files = [(ROOT, path) for path in (ROOT / "undo_core").rglob("*.py")]
    files += [(ROOT / "kernels", path) for path in (ROOT / "kernels" / "undo_kernels").rglob("*.py")]
    return [(".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"), path) for base, path in files]


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_go_one_way(module, path):
    if module == "undo_core":  # the public package names everything, but imports lazily
        return
    own = rank(module)
    assert own is not None, f"{module} has no rank: add it to RANKS"
    for name in imports(path):
        other = rank(name)
        assert other is None or other >= own, f"{module} imports {name}, which stands above it"


def test_no_module_imports_itself_on_a_detour():
    """There are no import cycles, even if imports inside functions and for type checkers count."""
    files = {module: path for module, path in modules() if module.startswith("undo_core.")}
    graph = {module: set() for module in files}
    for module, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[module] |= {alias.name for alias in node.names} & set(files)
            elif isinstance(node, ast.ImportFrom):  # imports a module by name, or a name that a package defines
                named = [f"{node.module}.{alias.name}" for alias in node.names]
                graph[module] |= {name if name in files else node.module for name in named} & set(files)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def handled(path: Path) -> list[str]:
    """Returns the places where a file decides by a stage's kind: a comparison, a match, a table, or a test of a class."""
    kinds, classes = {kind.kind for kind in KINDS}, {kind.__name__ for kind in KINDS}

    def of_a_kind(node: ast.expr | None) -> bool:
        parts = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]
        return any(isinstance(part, ast.Constant) and part.value in kinds for part in parts)

    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            by_kind = any(map(of_a_kind, (node.left, *node.comparators)))
        elif isinstance(node, ast.MatchValue):
            by_kind = of_a_kind(node.value)
        elif isinstance(node, ast.Dict):
            by_kind = sum(map(of_a_kind, node.keys)) > 1
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
            by_kind = bool({part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)} & classes)
        else:
            by_kind = isinstance(node, ast.MatchClass) and ast.unparse(node.cls) in classes
        if by_kind:
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_stages_alone_know_their_kinds(tmp_path):
    """Each kind is defined in one file; the graph composes stages, and all other code treats them alike."""
    base = ROOT / "undo_core"
    files = [path for part in ("pipeline", "planning", "cli") for path in (base / part).rglob("*.py")]
    outside = [path for path in files if path.parent != base / "pipeline" / "stages"]
    assert len(outside) > 15 and [line for path in outside for line in handled(path)] == []
    (tmp_path / "branches.py").write_text(
        "stage.kind == 'noise'\n"
        "stage.kind in ('cache', 'x')\n"
        "{'noise': f, 'prepare': g}[stage.kind]\n"
        "isinstance(stage, (Noise, int))\n"
        "match stage.kind:\n  case 'probe': pass\n"
        "match stage:\n  case Probe(): pass\n"
        "inputs['noise'], {'noise': 1}, stage.kind == other.kind\n"
    )
    assert [int(line.split(":")[1]) for line in sorted(handled(tmp_path / "branches.py"))] == [1, 2, 3, 4, 6, 8]


def test_kernels_import_without_the_method():
    program = """
        import sys
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {"transformers", "undo_core", "safetensors", "tokenizers", "jsonargparse", "rich"}:
                    raise ImportError(f"{name} is not for the kernels")
        sys.meta_path.insert(0, Refuse())
        import undo_kernels
        assert undo_kernels.registered()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, cwd=ROOT)


def test_no_kernels_package_is_shadowed(tmp_path):
    stand_in = tmp_path / "kernels"
    stand_in.mkdir()
    (stand_in / "__init__.py").write_text("STAND_IN = True\n")
    program = "import kernels, sys; sys.exit(0 if getattr(kernels, 'STAND_IN', False) else 1)"
    for extra in ([], ["-m", "undo_core", "--help"]):
        command = [sys.executable, *extra] if extra else [sys.executable, "-c", program]
        environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "/usr/bin:/bin"}
        subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def test_nothing_is_unpickled():
    for module, path in modules():
        assert not imports(path) & {"pickle", "joblib", "dill", "shelve"}, module
        assert "torch.load" not in path.read_text(), module


def test_remote_code_is_refused_wherever_a_checkpoint_is_read():
    """Without the argument, transformers asks on a terminal whether the checkpoint's code may run."""
    for path in (ROOT / "undo_core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("trust_remote_code") == "False", f"{path.name}:{node.lineno}"


def test_the_ops_load_no_model_library():
    code = "import sys; from undo_core import ops; print(*{'transformers', 'matplotlib'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_every_public_name_is_what_its_module_defines():
    import undo_core

    assert set(undo_core.__all__) == {*undo_core._HOMES, "ops", "__version__"}
    for name, home in undo_core._HOMES.items():
        value = getattr(undo_core, name)
        assert callable(value) and value.__name__ == name, home
    with pytest.raises(AttributeError, match="distil"):
        getattr(undo_core, "distil")  # noqa: B009
