"""Sets what torch and Triton read on import: the number of threads of a test process, the folder of Inductor's cache, and,
without a GPU, Triton's interpreter, which runs its kernels on CPU tensors."""

import getpass
import os
import tempfile
from pathlib import Path

_TESTS = Path(__file__).parent
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:  # side by side; threads that wait for each other's core would spin
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))
if "ATEN_CPU_CAPABILITY" in os.environ:  # Inductor finds code that it made for other vector units, which then does not compile
    _cache = Path(tempfile.gettempdir()) / f"torchinductor-{getpass.getuser()}-{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_cache))

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Files of few tests that take long, longest first: begun last, one would go on alone on its core.
_LONG = (
    "undo_core/pipeline/test_pipeline.py",
    "bench/test_bench_small.py",
    "undo_kernels/triton/test_vocab_loss_numerics.py",
    "undo_kernels/triton/test_vocab_loss_options.py",
    "undo_kernels/triton/test_aot.py",
    "undo_core/pipeline/test_memory.py",
    "undo_core/pipeline/test_goldens.py",
    "undo_core/pipeline/test_sweep.py",
    "bench/test_bench.py",
    "undo_core/planning/test_table.py",
    "undo_core/unlearning/test_rmu.py",
    "undo_core/pipeline/test_published.py",
    "undo_core/pipeline/test_configs.py",
    "bench/test_activations.py",
    "bench/test_regressions.py",
    "undo_core/noise/test_noise_sharding.py",
)
assert all((_TESTS / name).is_file() for name in _LONG)


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        name = item.path.relative_to(_TESTS).as_posix()
        return _LONG.index(name) if name in _LONG else len(_LONG)

    items.sort(key=place)  # stable: the others keep their order
