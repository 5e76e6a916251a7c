"""An error of a library about a file becomes one line that names the file; what is no fault of the file stays what it is."""

import errno
import os
import sys

import pytest
import torch

from undo_core.io.untrusted import lacks_memory, refused


class NeedsMore(OSError):
    """As errors of huggingface_hub, which cannot be made from a message alone."""

    def __init__(self, message: str, *, response: object) -> None:
        super().__init__(message)
        self.response = response


def test_an_error_of_a_library_names_the_file():
    with pytest.raises(ValueError, match=r"^a\.json: KeyError: 'x'$"), refused("a.json"):
        {}["x"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("mmap"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("can't start new thread"),
    ],
)
def test_a_lack_of_memory_is_no_fault_of_the_file(error):
    with pytest.raises(type(error)) as caught, refused("a.json"):
        raise error
    assert caught.value is error


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of the address space is enforced on Linux only")
def test_a_file_for_which_there_is_no_address_is_no_fault_of_the_file(tmp_path):
    import resource

    path, (soft, hard) = tmp_path / "a.bin", resource.getrlimit(resource.RLIMIT_AS)
    path.touch()
    os.truncate(path, 1 << 33)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 33, hard))  # of which the process has taken some
    try:
        with pytest.raises(RuntimeError, match="unable to mmap") as caught, refused("a.bin"):
            torch.UntypedStorage.from_file(str(path), False, 1 << 33)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert lacks_memory(caught.value)


def test_an_error_of_the_system_keeps_its_number_and_kind():
    with pytest.raises(OSError, match=r"^a\.json: .*No space left") as full, refused("a.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.errno == errno.ENOSPC
    with pytest.raises(FileNotFoundError, match=r"^a\.json: no such thing"), refused("a.json"):
        raise FileNotFoundError("no such thing")


def test_an_error_that_takes_more_than_a_message_is_still_named():
    with pytest.raises(OSError, match=r"^a\.json: not found"), refused("a.json"):
        raise NeedsMore("not found", response=None)
