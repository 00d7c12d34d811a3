"""Processes in Linux namespaces that have no name: what has no name cannot collide, or be left behind.

`start_first` starts a process in new namespaces, `start_in` one in those of another process. Both are children of this
process like any other, so signals and exit codes are theirs (nsenter(1) stands in between, and passes on neither).
The kernel takes the namespaces away, with interfaces, mounts and all processes in them, when the first process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

CLONE_FS = 0x00000200
NETWORK = 0x40000000
# Mounts, hostname, System V memory, processes, network: all that makes a host one of its own, but for the disk.
HOST = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | NETWORK

LIBC = ctypes.CDLL(None, use_errno=True)


def start_first(name: str) -> subprocess.Popen[bytes]:
    """The first process of new namespaces: it waits, and reaps, until its standard input or this process ends."""
    command = [sys.executable, "-S", "-E", str(Path(__file__).with_name("first.py")), name]
    return start(lambda: call("unshare", HOST), command, stdin=subprocess.PIPE)


def start_in(pid: int, command: Sequence[str], kinds: int = HOST, **options: Any) -> subprocess.Popen[Any]:
    """Start a command in the namespaces of process `pid`, and on its cores; `options` are Popen's."""

    cores = os.sched_getaffinity(pid)

    def enter() -> None:
        # A thread that shares its working directory with others may not change its mounts.
        call("unshare", CLONE_FS)
        target = os.pidfd_open(pid)
        try:
            call("setns", target, kinds)
        finally:
            os.close(target)
        os.sched_setaffinity(0, cores)

    options.setdefault("cwd", os.getcwd())  # noqa: PTH109 - as text; entering mounts leads to their root
    return start(enter, command, **options)


def start(before: Callable[[], None], command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a command from a thread that has changed its namespaces, and then ends: no other thread is changed."""

    def change_and_start() -> subprocess.Popen[Any]:
        before()
        return subprocess.Popen(list(command), **options)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(change_and_start).result()


def call(name: str, *arguments: int) -> None:
    """Call the C library's function of that name.

    Raises OSError if the kernel refuses.
    """
    if LIBC[name](*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def members(first: int) -> list[psutil.Process]:
    """The living processes in the process namespace that began with process `first`, but not that one itself."""
    try:
        space = (Path("/proc") / str(first) / "ns" / "pid").stat().st_ino
    except OSError:
        return []  # it has ended, and so have all
    return [process for process in living_in({space}) if process.pid != first]


def living_in(spaces: set[int]) -> list[psutil.Process]:
    """The living processes in process namespaces that are told by their inode numbers."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            inside = (Path("/proc") / str(process.pid) / "ns" / "pid").stat().st_ino in spaces
            if inside and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
