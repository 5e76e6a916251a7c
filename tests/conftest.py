"""Said before torch and Triton are imported: how many threads a test process has, and that Triton's kernels run on CPU tensors under
its interpreter, unless there is a GPU."""

import os

_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:  # side by side; threads that wait for each other's core would spin
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
