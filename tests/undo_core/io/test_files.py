"""Files on disk are complete even if several processes write them."""

import errno
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from undo_core.io.files import errors_named, publish, read_json, replace_folder, see_changes, write_json


def write_often(path: Path, value: int) -> None:
    for _ in range(150):
        write_json(path, [value] * 50)


def test_two_processes_may_replace_the_same_file(tmp_path):
    path = tmp_path / "results.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(path, value)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert read_json(path) in ([1] * 50, [2] * 50) and [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_machines_whose_processes_have_the_same_number_may_replace_the_same_file(tmp_path, monkeypatch):
    """The second machine writes its file while the first is about to rename its own."""
    path, replace = tmp_path / "results.json", os.replace

    def second_machine(temporary: Path, final: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        write_json(path, "second")
        replace(temporary, final)

    monkeypatch.setattr(os, "replace", second_machine)
    write_json(path, "first")
    assert read_json(path) == "first" and [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_published_weights_can_be_read_by_whom_the_umask_allows(umask, tmp_path):
    before = os.umask(umask)
    try:
        (new := tmp_path / "new").mkdir()
        save_file({"weight": torch.zeros(2)}, new / "model.safetensors")
        publish(new, tmp_path / "final")
    finally:
        os.umask(before)
    assert (tmp_path / "final" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_what_has_no_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        with pytest.raises(ValueError, match=rf"{name}: got a pipe, a socket or a device, wanted a file"):
            read_json(tmp_path / name)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    new, final, rename = tmp_path / "new", tmp_path / "final", os.rename

    def made(value: int) -> Path:
        new.mkdir()
        write_json(new / "value.json", value)
        return new

    replace_folder(made(1), final)
    replace_folder(made(2), final)
    assert read_json(final / "value.json") == 2 and [p.name for p in tmp_path.iterdir()] == ["final"]

    def full(source: Path, target: Path) -> None:
        if source == new:
            raise OSError(errno.ENOSPC, "no space left")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="no space left"):
        replace_folder(made(3), final)
    assert read_json(final / "value.json") == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["final", "new"]


def test_to_see_the_changes_of_others_leaves_none(tmp_path):
    before = tmp_path.stat().st_mtime_ns
    see_changes(tmp_path)
    assert list(tmp_path.iterdir()) == [] and tmp_path.stat().st_mtime_ns > before, "a change that a file server sees"


WITHOUT_POSIX = """
import builtins, os, sys
from pathlib import Path

absent = {"fcntl", "resource", "pwd", "grp", "termios"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
for name in absent:
    sys.modules.pop(name, None)
for name in ("sched_getaffinity", "sysconf", "pwrite"):
    delattr(os, name)

import undo_core, undo_core.cli, undo_core.pipeline.workers, undo_core.cli.doctor
import torch
from undo_core.checkpoints.files import MappedFile, TensorWriter
from undo_core.io.locks import locked
from undo_core.pipeline.store import usable_cores

with TensorWriter(Path(sys.argv[1]), {"a": (torch.float32, (3,))}) as writer:
    writer.write("a", 1, torch.ones(2))
    writer.write("a", 0, torch.ones(1))
assert MappedFile(Path(sys.argv[1])).tensor("a").tolist() == [1.0] * 3
assert usable_cores() >= 1
with locked(Path(sys.argv[1]).with_suffix(".lock"), "free"):
    pass
"""


def test_the_package_works_without_what_only_posix_has(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_POSIX, str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_a_write_that_fails_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, "before")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left on device") as info:
        write_json(path, "after")
    assert (info.value.errno, info.value.filename) == (errno.ENOSPC, str(path))
    assert read_json(path) == "before" and list(tmp_path.iterdir()) == [path]


def test_errors_of_libraries_in_rust_are_those_of_the_system(tmp_path):
    for error in (Exception("File too large (os error 27)"), SafetensorError("I/O error: File too large (os error 27)")):
        with pytest.raises(OSError) as info, errors_named(tmp_path):
            raise error
        assert (info.value.errno, info.value.filename) == (27, str(tmp_path))
    for error in (OSError("no number"), FileNotFoundError(2, "missing", "own"), ValueError("another"), Exception("another")):
        with pytest.raises(type(error)) as info, errors_named(tmp_path):
            raise error
        assert info.value is error
