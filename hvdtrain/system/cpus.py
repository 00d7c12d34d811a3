"""Divide a host's cores among its ranks: how many there are, which a rank gets, how many threads it uses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

USABLE_CPUS = frozenset(os.sched_getaffinity(0))  # by this process, before `bind_to_cores`
GPU_DRIVER_FILE = Path("/dev/nvidiactl")
CGROUP_MOUNT = Path("/sys/fs/cgroup")
OWN_CGROUPS_FILE = Path("/proc/self/cgroup")
THREADS_VARIABLE = "OMP_NUM_THREADS"
THREADS_SOURCE_VARIABLE = "HVDTRAIN_THREADS_SOURCE"  # set with THREADS_VARIABLE if hvdtrain chose the number


@dataclass(frozen=True)
class ThreadCount:
    """How many threads a rank uses, and what determined the number."""

    count: int
    source: str


def cpu_quota(own: Path = OWN_CGROUPS_FILE, mounted: Path = CGROUP_MOUNT) -> float | None:
    """Return how many cores' worth of time this process's control groups allow it; None if they set no limit.

    Reads `cpu.max` (cgroup v2) or `cpu.cfs_quota_us` and `cpu.cfs_period_us` (v1) of its group and of all groups that
    contain it; the smallest counts. A container sees its own group as the root, or at the host's path, which
    is not mounted in it.
    """
    quotas = []
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                hierarchies = [mounted, mounted / "unified"]
            elif "cpu" in controllers.split(","):
                hierarchies = [mounted / controllers, mounted / "cpu"]
            else:
                continue
            for root in hierarchies:
                group = root / path.strip("/").removeprefix("../")
                for folder in (group, *group.parents):
                    if folder.is_relative_to(root) and (quota := read_group_quota(folder)) is not None:
                        quotas.append(quota)
    return min(quotas, default=None)


def read_group_quota(folder: Path) -> float | None:
    """Return the cores that one control group allows; None if it sets no limit or does not exist."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return int(quota) / int(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


CPU_QUOTA = cpu_quota()


def available_cores() -> float:
    """Return how many cores this process may use, by its affinity mask and its control groups' quota."""
    return len(USABLE_CPUS) if CPU_QUOTA is None else min(len(USABLE_CPUS), CPU_QUOTA)


def has_cpu_quota() -> bool:
    """Return whether this process may use less than all of its cores' time."""
    return available_cores() < len(USABLE_CPUS)


def cores_per_rank(local_size: int) -> int:
    """Return how many cores each of `local_size` ranks on this host has to itself; 1 if there are fewer cores."""
    return max(1, int(available_cores() / local_size))


def choose_threads(local_size: int, environ: Mapping[str, str] = os.environ) -> ThreadCount:
    """Return how many threads each of `local_size` ranks on this host uses, unless --threads gives a number.

    OMP_NUM_THREADS counts first, then SLURM_CPUS_PER_TASK if all ranks' tasks fit into the cores, else an even share.
    """
    given = environ.get(THREADS_VARIABLE, "").split(",")[0].strip()
    if given.isascii() and given.isdigit() and int(given) > 0:
        return ThreadCount(int(given), environ.get(THREADS_SOURCE_VARIABLE, THREADS_VARIABLE))
    per_task = environ.get("SLURM_CPUS_PER_TASK", "")
    if per_task.isascii() and per_task.isdigit() and 0 < int(per_task) * local_size <= available_cores():
        return ThreadCount(int(per_task), "SLURM_CPUS_PER_TASK")
    what = (
        f"the CPU quota of {available_cores():g} cores" if has_cpu_quota() else f"the host's {len(USABLE_CPUS)} cores"
    )
    shared = f", shared by {local_size} ranks" if local_size > 1 else ""
    return ThreadCount(cores_per_rank(local_size), f"{what}{shared}")


def set_threads(local_size: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set OMP_NUM_THREADS to what `choose_threads` returns, and record what determined it."""
    chosen = choose_threads(local_size, environ)
    if chosen.source != THREADS_VARIABLE:
        environ[THREADS_SOURCE_VARIABLE] = chosen.source
    environ[THREADS_VARIABLE] = environ[THREADS_VARIABLE] if chosen.source == THREADS_VARIABLE else str(chosen.count)


def bind_to_cores(local_rank: int, local_size: int) -> None:
    """Bind this thread, and those that it starts, to this rank's share of the cores.

    Unbound ranks are moved to each other's cores by the scheduler, and all wait for the one that is slowed down
    (tests/benchmarks/exchange.py, +unbound). Nothing is bound if cores were chosen already (taskset, Slurm, a
    container), under a CPU quota (which does not say which cores), if ranks outnumber the cores, and with GPUs, whose
    nearest cores are better than even shares.
    """
    if 1 < local_size <= len(USABLE_CPUS) == os.cpu_count() and not has_cpu_quota() and not GPU_DRIVER_FILE.exists():
        os.sched_setaffinity(0, select_cores(sorted(USABLE_CPUS, key=read_cpu_topology), local_rank, local_size))


def select_cores(cores: Sequence[int], local_rank: int, local_size: int) -> Sequence[int]:
    """Return the cores of one of `local_size` ranks: neighbours, as many as the others have or one more."""
    return cores[local_rank * len(cores) // local_size : (local_rank + 1) * len(cores) // local_size]


def read_cpu_topology(cpu: int) -> tuple[int, int, int]:
    """Return a CPU's (package, core, CPU) on Linux: sorted by it, CPUs that share a core are neighbours."""
    folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return int((folder / "physical_package_id").read_text()), int((folder / "core_id").read_text()), cpu
    except OSError:  # absent in some virtual machines
        return 0, cpu, cpu
