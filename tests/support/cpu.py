"""CPU time, which a busy machine changes less than the time that passes."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup/cpu")  # of version 1
PERIOD = 100_000  # microseconds


def children_cpu_seconds() -> float:
    """Return the CPU time of all processes that this one has started and waited for, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def core_quota(cores: float, name: str) -> Iterator[Path]:
    """Make a control group whose processes have so many cores together; return the file that takes their ids.

    What is in it at the end goes back to all. Needs root.
    """
    group = CGROUPS / f"hvdtrain-{name}"
    group.mkdir()
    try:
        (group / "cpu.cfs_period_us").write_text(str(PERIOD))
        (group / "cpu.cfs_quota_us").write_text(str(int(PERIOD * cores)))
        yield group / "cgroup.procs"
    finally:
        for process in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (CGROUPS / "cgroup.procs").write_text(process)
        group.rmdir()
