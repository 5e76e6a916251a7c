"""What a worker process inherits from the one that starts it."""

import errno
import multiprocessing
import os
import signal

import pytest

from undo_core.pipeline import workers
from undo_core.pipeline.store import Store


@pytest.mark.parametrize("device", [None, "3"])
def test_a_worker_imports_no_file_of_the_current_folder_and_leaves_ctrl_c_to_its_leader(device, tmp_path, monkeypatch):
    for name in ("types", "random", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    process = multiprocessing.get_context("spawn").Process(target=os.getpid)
    with workers._inherited(device):
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == (device or before.get("CUDA_VISIBLE_DEVICES"))
        process.start()
    if hasattr(signal, "pthread_sigmask"):
        os.kill(process.pid, signal.SIGINT)
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    process.join()
    assert process.exitcode == 0 and dict(os.environ) == before


def test_semaphores_that_find_no_room_are_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workers, "ProcessPoolExecutor", full)
    with pytest.raises(OSError, match="/dev/shm"):
        workers._side_by_side(Store(tmp_path), {"key": None}, 2, print, None)
