"""A full /dev/shm is named with its host and the way out."""

from __future__ import annotations

import errno
import re
import socket

import pytest

from hvdtrain.system.errors import RunError
from hvdtrain.system.recipe_errors import in_recipe
from hvdtrain.system.shared_memory import explain_full_shared_memory


@pytest.mark.parametrize(
    "text",
    [
        "unable to allocate shared memory(shm) for file </torch_8551_990122488_0>: No space left on device (28)",
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        "RuntimeError: unable to write to file </torch_1_2_3>: No space left on device (28)",
    ],
)
def test_a_full_shared_memory_is_named(text: str) -> None:
    error = explain_full_shared_memory(RuntimeError(text))
    assert error is not None
    room = r"\([\d,]+ of [\d,]+ KiB free\)"
    assert re.match(rf"/dev/shm on {socket.gethostname()} is full {room}: .* \(--workers 0\)$", str(error))


def test_other_errors_are_left_alone() -> None:
    for text in ("No space left on device", "unable to mmap 9 bytes: Permission denied (13)", ""):
        assert explain_full_shared_memory(RuntimeError(text)) is None


def test_a_full_shared_memory_is_not_the_recipe_s_error() -> None:
    text = "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
    with pytest.raises(RunError, match=r"^/dev/shm on "), in_recipe(object(), "collate()"):
        raise RuntimeError(text)


def test_semaphores_of_loader_processes_that_find_no_room() -> None:
    error = explain_full_shared_memory(OSError(errno.ENOSPC, "No space left on device"), starting=True)
    assert str(error).startswith("/dev/shm on ")
    assert explain_full_shared_memory(OSError(errno.EMFILE, "Too many open files"), starting=True) is None
