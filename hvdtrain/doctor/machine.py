"""The facts of the machine itself: cores, memory, GPUs, limits, and what Horovod is built and started with.

A container may have less than its machine: what its control group leaves it stands beside what the machine has.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil

from hvdtrain.doctor.facts import Facts, disk, first_line, text_of
from hvdtrain.native.cuda import find_nccl
from hvdtrain.native.mpi import find_mpi
from hvdtrain.native.torchinfo import find_torch
from hvdtrain.system import cpus

GROUPS = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # bytes: control groups of the first kind say a number like this for none


def facts() -> Facts:
    """The machine, its devices and its programs."""
    memory, mpi = psutil.virtual_memory(), find_mpi()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cores usable": len(cpus.USABLE),
        "cores allowed": core_limit(),
        "load": os.getloadavg()[0],
        "memory": memory.total,
        "memory free": memory.available,
        "memory allowed": memory_limit(),
        "shared memory": disk(Path("/dev/shm")),
        "limits": limits(),
        "mpi": mpi.version if mpi else None,
        "compiler": first_line([os.environ.get("CXX", "g++"), "--version"]),
        "nccl": nccl(),
        "driver cuda": driver_cuda(),
        "gpus": gpus(),
        "infiniband": sorted(path.name for path in Path("/sys/class/infiniband").glob("*")),
    }


def cpu_model() -> str | None:
    """The name of the CPU."""
    found = re.search(r"^model name\s*:\s*(.*)$", text_of("/proc/cpuinfo") or "", re.MULTILINE)
    return found[1] if found else platform.processor() or None


def core_limit() -> float | None:
    """How many cores' time the control group may use, None for all."""
    found = []
    for folder in group_folders("cpu"):
        quota, _, period = (text_of(str(folder / "cpu.max")) or "max").partition(" ")
        if quota == "max":
            quota = text_of(str(folder / "cpu.cfs_quota_us")) or "-1"
            period = text_of(str(folder / "cpu.cfs_period_us")) or "100000"
        if int(quota) > 0:
            found.append(int(quota) / int(period))
    return min(found, default=None)


def memory_limit() -> int | None:
    """How many bytes the control group may use, None for all."""
    texts = [text_of(str(folder / name)) for folder in group_folders("memory") for name in MEMORY_FILES]
    found = [int(text) for text in texts if text and text != "max"]
    return min((limit for limit in found if limit < NO_LIMIT), default=None)


MEMORY_FILES = ("memory.max", "memory.limit_in_bytes")


def group_folders(controller: str) -> list[Path]:
    """The folders of this process's control group and of those around it, of both kinds of control groups."""
    found = [GROUPS / controller, GROUPS]
    for line in (text_of("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            base = GROUPS / controller if controllers else GROUPS
            group = base / path.lstrip("/")
            found += [folder for folder in (group, *group.parents) if folder.is_relative_to(base)]
    return list(dict.fromkeys(found))


def limits() -> dict[str, int | None]:
    """The soft limits that bite: open files, locked memory in bytes, processes; None for no limit."""
    kinds = {"nofile": resource.RLIMIT_NOFILE, "memlock": resource.RLIMIT_MEMLOCK, "nproc": resource.RLIMIT_NPROC}
    found = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    return {name: None if value == resource.RLIM_INFINITY else value for name, value in found.items()}


def nccl() -> str | None:
    """The version of the NCCL that torch's CUDA comes with."""
    torch = find_torch()
    found = find_nccl(torch.cuda) if torch and torch.cuda else None
    return found.version if found else None


def driver_cuda() -> str | None:
    """The newest CUDA that the driver knows, None without a driver."""
    try:
        library: Any = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def gpus() -> list[str]:
    """Name, memory and driver of each GPU, as nvidia-smi tells them; what it says instead where it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ["nvidia-smi does not answer"]
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines if done.returncode == 0 else [f"nvidia-smi fails: {' '.join(lines)[:200]}"]
