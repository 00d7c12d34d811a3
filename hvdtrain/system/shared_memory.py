"""Explain the errors of a full /dev/shm: torch's own name neither the folder nor what to do."""

from __future__ import annotations

import contextlib
import errno
import shutil
import socket
from pathlib import Path

from hvdtrain.system.errors import RunError

SHARED_MEMORY = Path("/dev/shm")
# Parts of the texts of torch's errors.
OPERATIONS = ("unable to allocate shared memory(shm)", "unable to write to file </torch_", "unable to mmap")
CAUSES = ("No space left on device", "Cannot allocate memory")


def explain_full_shared_memory(error: BaseException, *, starting: bool = False) -> RunError | None:
    """Return the error to raise instead of one that a full /dev/shm has caused; None if that is not its cause.

    Args:
        error: what was raised.
        starting: whether loader processes were being started: their semaphores are in /dev/shm too, and the error of
            creating them does not name it.
    """
    text = str(error)
    semaphore = starting and isinstance(error, OSError) and error.errno == errno.ENOSPC
    if not semaphore and not (any(part in text for part in OPERATIONS) and any(part in text for part in CAUSES)):
        return None
    free = ""
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(SHARED_MEMORY)
        free = f" ({usage.free >> 10:,} of {usage.total >> 10:,} KiB free)"
    return RunError(
        f"{SHARED_MEMORY} on {socket.gethostname()} is full{free}: loader processes pass their batches through it. "
        "Enlarge it (docker run --shm-size=8g), or load without loader processes (--workers 0)"
    )
