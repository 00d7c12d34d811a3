"""Small things to read from this host: files, the output of programs, and the disk that a folder is on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from hvdtrain.doctor.host_facts import DiskFacts
from hvdtrain.system.limits import DoctorLimits
from hvdtrain.system.processes import ProcessTimeout, run_process


def read_stripped_text(path: str) -> str | None:
    """Return a small file's text without white space around it, None if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return None


def first_output_line(command: Sequence[str], seconds: float = DoctorLimits.first_line) -> str | None:
    """Return the first line that a program prints, None if there is no such program or it fails."""
    try:
        done = run_process(command, seconds)
    except (OSError, ProcessTimeout):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines and done.exit_code == 0 else None


def read_disk(folder: Path) -> DiskFacts:
    """Return the state of the disk that a folder is on, or will be on when it is made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        usage, state = shutil.disk_usage(folder), os.statvfs(folder)
    except OSError as error:
        return DiskFacts(error=error.strerror)
    problem = None
    if state.f_files and not state.f_favail:
        problem = "no inode is left"
    elif not os.access(folder, os.W_OK):
        problem = os.strerror(errno.EROFS if state.f_flag & os.ST_RDONLY else errno.EACCES)
    return DiskFacts(usage.free, usage.total, problem)
