"""A rank's share of its host's cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

USABLE = frozenset(os.sched_getaffinity(0))  # by this process, before `bind` gave it its share
GPU_DRIVER = Path("/dev/nvidiactl")


def per_rank(local_size: int) -> int:
    """How many cores each of `local_size` ranks on this host has to itself; 1 where there are fewer cores."""
    return max(1, len(USABLE) // local_size)


def bind(local_rank: int, local_size: int) -> None:
    """Keep this thread, and those that it starts, to this rank's share of the cores.

    Ranks that the scheduler moves about get into each other's way, and all wait for the one that lost
    (tests/benchmarks/exchange.py, +unbound). Left as it is where somebody has chosen cores already (taskset, Slurm, a
    container), where ranks outnumber the cores, and beside GPUs, whose nearest cores are better than even shares.
    """
    if local_size > 1 and local_size <= len(USABLE) == os.cpu_count() and not GPU_DRIVER.exists():
        os.sched_setaffinity(0, share(sorted(USABLE, key=place), local_rank, local_size))


def share(cores: Sequence[int], local_rank: int, local_size: int) -> Sequence[int]:
    """The cores of one of `local_size` ranks: neighbours, as many as the others have or one more."""
    return cores[local_rank * len(cores) // local_size : (local_rank + 1) * len(cores) // local_size]


def place(cpu: int) -> tuple[int, int, int]:
    """Where a CPU of Linux is, (package, core, CPU): in this order those that share a core are neighbours."""
    folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return int((folder / "physical_package_id").read_text()), int((folder / "core_id").read_text()), cpu
    except OSError:  # not told in some virtual machines
        return 0, cpu, cpu
