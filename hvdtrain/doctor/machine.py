"""The facts of the machine itself: cores, memory, GPUs, limits, and what Horovod is built and started with.

A container may use less than its machine has: the limits of its control group are read as well.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import psutil

from hvdtrain.doctor.host_facts import MachineFacts
from hvdtrain.doctor.readings import first_output_line, read_disk, read_stripped_text
from hvdtrain.native.cuda import find_nccl
from hvdtrain.native.mpi import find_mpi
from hvdtrain.native.torchinfo import find_torch
from hvdtrain.system import cpus
from hvdtrain.system.limits import DoctorLimits
from hvdtrain.system.processes import ProcessTimeout, run_process

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_NO_LIMIT = 1 << 60  # bytes: control groups of version 1 have a number like this for no limit
MEMORY_LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")  # of versions 2 and 1


def gather_machine_facts() -> MachineFacts:
    """Return the facts of the machine, its devices and its programs."""
    memory, mpi = psutil.virtual_memory(), find_mpi()
    return MachineFacts(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=cpu_model(),
        cores=os.cpu_count(),
        cores_usable=len(cpus.USABLE_CPUS),
        cores_allowed=core_limit(),
        load=os.getloadavg()[0],
        memory=memory.total,
        memory_free=memory.available,
        memory_allowed=memory_limit(),
        shared_memory=read_disk(Path("/dev/shm")),
        limits=read_resource_limits(),
        mpi=mpi.version if mpi else None,
        compiler=first_output_line([os.environ.get("CXX", "g++"), "--version"]),
        nccl=find_nccl_version(),
        driver_cuda=driver_cuda_version(),
        gpus=query_gpus(),
        infiniband=sorted(path.name for path in Path("/sys/class/infiniband").glob("*")),
    )


def cpu_model() -> str | None:
    """Return the name of the CPU, None if it is unknown."""
    found = re.search(r"^model name\s*:\s*(.*)$", read_stripped_text("/proc/cpuinfo") or "", re.MULTILINE)
    return found[1] if found else platform.processor() or None


def core_limit() -> float | None:
    """Return how many cores' time the control group may use, None for all."""
    found = []
    for folder in cgroup_folders("cpu"):
        quota, _, period = (read_stripped_text(str(folder / "cpu.max")) or "max").partition(" ")
        if quota == "max":
            quota = read_stripped_text(str(folder / "cpu.cfs_quota_us")) or "-1"
            period = read_stripped_text(str(folder / "cpu.cfs_period_us")) or "100000"
        if int(quota) > 0:
            found.append(int(quota) / int(period))
    return min(found, default=None)


def memory_limit() -> int | None:
    """Return how many bytes the control group may use, None for all."""
    texts = [
        read_stripped_text(str(folder / name)) for folder in cgroup_folders("memory") for name in MEMORY_LIMIT_FILES
    ]
    found = [int(text) for text in texts if text and text != "max"]
    return min((limit for limit in found if limit < CGROUP_NO_LIMIT), default=None)


def count_usable_memory() -> int:
    """Return the bytes of memory that this process's control group may use, or the machine has."""
    return min(psutil.virtual_memory().total, memory_limit() or CGROUP_NO_LIMIT)


def cgroup_folders(controller: str) -> list[Path]:
    """Return the folders of this process's control group and of its parents, in both versions of control groups."""
    found = [CGROUP_ROOT / controller, CGROUP_ROOT]
    for line in (read_stripped_text("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            base = CGROUP_ROOT / controller if controllers else CGROUP_ROOT
            group = base / path.lstrip("/")
            found += [folder for folder in (group, *group.parents) if folder.is_relative_to(base)]
    return list(dict.fromkeys(found))


def read_resource_limits() -> dict[str, int | None]:
    """Return soft limits: open files, locked memory in bytes, processes; None for no limit."""
    kinds = {"nofile": resource.RLIMIT_NOFILE, "memlock": resource.RLIMIT_MEMLOCK, "nproc": resource.RLIMIT_NPROC}
    found = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    return {name: None if value == resource.RLIM_INFINITY else value for name, value in found.items()}


def find_nccl_version() -> str | None:
    """Return the version of the NCCL that comes with torch's CUDA."""
    torch = find_torch()
    found = find_nccl(torch.cuda) if torch and torch.cuda else None
    return found.version if found else None


def driver_cuda_version() -> str | None:
    """Return the newest version of CUDA that the driver supports, None without a driver."""
    try:
        library: Any = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def query_gpus() -> list[str]:
    """Return name, memory and driver of each GPU as nvidia-smi prints them; one line with its error if it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = run_process(query, DoctorLimits.gpus)
    except (OSError, ProcessTimeout):
        return ["nvidia-smi does not respond"]
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines if done.exit_code == 0 else [f"nvidia-smi fails: {' '.join(lines)[:200]}"]
