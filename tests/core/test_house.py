"""Rules of the house: imports go one way, and the repository shadows nobody's package."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A module may import modules of its own rank (where they are one concern) and of lower ranks.
RANKS = [
    {"undo_core.cli", "undo_core.__main__"},
    {"undo_core.commands", "undo_core.hints"},
    {"undo_core.sweep"},
    {"undo_core.pipeline", "undo_core.plan", "undo_core.doctor"},
    {"undo_core.workers", "undo_core.graph", "undo_core.costs", "undo_core.sweep_config", "undo_core.attacked"},
    {"undo_core.stages", "undo_core.report", "undo_core.config", "undo_core.memory", "undo_core.fit", "undo_core.storages"},
    {
        "undo_core.unlearning",
        "undo_core.noise",
        "undo_core.noise_checkpoint",
        "undo_core.damage",
        "undo_core.distillation",
        "undo_core.relearning",
        "undo_core.attacks",
    }
    | {"undo_core.evaluation", "undo_core.multiple_choice", "undo_core.store", "undo_core.gate"},
    {"undo_core.teacher", "undo_core.teacher_cache"},
    {"undo_core.streaming"},
    {
        "undo_core.training",
        "undo_core.data",
        "undo_core.ops",
        "undo_core.models",
        "undo_core.heads",
        "undo_core.adapters",
        "undo_core.files",
        "undo_core.checkpoint_files",
        "undo_core.checkpoint_edit",
        "undo_core.parameters",
        "undo_core.initialisation",
    },
    {"undo_core.config_files"},
    {"undo_core.version", "undo_core.quiet", "undo_core.text_files"},
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
    if module == "undo_core":  # the public face names everything, lazily
        return
    own = rank(module)
    assert own is not None, f"{module} has no rank: add it to RANKS"
    for name in imports(path):
        other = rank(name)
        assert other is None or other >= own, f"{module} imports {name}, which stands above it"


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
    """Left out, transformers asks on a terminal whether the checkpoint's own code may run."""
    for path in (ROOT / "undo_core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("trust_remote_code") == "False", f"{path.name}:{node.lineno}"


def test_the_ops_load_no_model_library():
    code = "import sys; from undo_core import ops; print(*[name for name in ('transformers', 'matplotlib') if name in sys.modules])"
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
