"""How much memory this process takes at most in a part of its time (Linux)."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

RESET_PEAK = "5"  # for /proc/PID/clear_refs: set the peak of the resident set to its present size (proc(5))


class PeakMemory:
    """Measures the peak of this process's resident set, as what it exceeds the size at the beginning by."""

    def __init__(self) -> None:
        """Give freed memory back to the system, and begin."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        self._begin = read_peak_bytes()

    def measure_bytes(self) -> int:
        """Return the bytes by which the peak since the beginning exceeds the size then."""
        return max(0, read_peak_bytes() - self._begin)


def read_peak_bytes() -> int:
    """Return the peak of the resident set (VmHWM)."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
