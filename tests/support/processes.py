"""Processes that tests leave behind."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import psutil


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """Kill those of the processes that have not ended by themselves meanwhile."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
