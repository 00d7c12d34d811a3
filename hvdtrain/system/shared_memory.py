"""Errors of a full /dev/shm, which torch reports without the place or the way out."""

from __future__ import annotations

import contextlib
import errno
import shutil
import socket
from pathlib import Path

from hvdtrain.system.errors import RunError

PLACE = Path("/dev/shm")
# In the texts of torch's errors.
SIGNS = ("unable to allocate shared memory(shm)", "unable to write to file </torch_", "unable to mmap")
FULL = ("No space left on device", "Cannot allocate memory")


def explain_full(error: BaseException, *, starting: bool = False) -> RunError | None:
    """What to raise instead of an error, if that is of a full /dev/shm: where, how full, and what to do; else None.

    starting: loader processes, whose semaphores are there as well; their error does not say so.
    """
    text = str(error)
    semaphore = starting and isinstance(error, OSError) and error.errno == errno.ENOSPC
    if not semaphore and not (any(sign in text for sign in SIGNS) and any(sign in text for sign in FULL)):
        return None
    room = ""
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(PLACE)
        room = f" ({usage.free >> 10:,} of {usage.total >> 10:,} KiB free)"
    return RunError(
        f"{PLACE} on {socket.gethostname()} is full{room}, through which loader processes pass their batches: give it "
        "more (docker run --shm-size=8g), or load without them (--workers 0)"
    )
