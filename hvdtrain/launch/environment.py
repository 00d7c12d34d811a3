"""The environment that a launcher runs in, and what of it ranks get: over hosts, only what is on a list.

The run's secret is in it (hvdtrain/system/signed_http.py). No launcher writes values on a command line: horovodrun
hands them on by ssh's standard input, mpirun and srun by their own ways.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from hvdtrain.native.installed import find_site_mpi
from hvdtrain.native.mpi import DEFAULT_FOLDERS
from hvdtrain.system import signed_http
from hvdtrain.system.errors import UserError

# For ranks, on whichever host.
FORWARDED_PREFIXES = (
    *("HVDTRAIN_", "HOROVOD_", "NCCL_", "GLOO_", "UCX_"),
    *("OMP_", "MKL_", "MALLOC_", "PYTHON", "PYTORCH_", "TORCH_"),
)
FORWARDED_NAMES = {"PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "GLIBC_TUNABLES", "CUBLAS_WORKSPACE_CONFIG"}
# For the launcher on this host, and the programs that it starts. horovodrun hands these on as well.
BASE_PREFIXES = ("LC_",)
BASE_NAMES = {"HOME", "USER", "LOGNAME", "SHELL", "TERM", "TZ", "TMPDIR", "LANG", "LANGUAGE"}
BASE_NAMES |= {"SSH_AUTH_SOCK", "KRB5CCNAME", "CUDA_VISIBLE_DEVICES"}
# Settings of mpirun, and by which it and srun know their Slurm job.
MPI_PREFIXES = ("OMPI_", "PMIX_", "PRTE_")
SLURM_PREFIXES = ("SLURM_", "SLURMD_", "SRUN_")


def rank_environment(
    environ: Mapping[str, str], launcher: str, controller: str, *, away: bool = False, extra: Iterable[str] = ()
) -> dict[str, str]:
    """The environment for the launcher and its ranks, from this process's.

    away: some ranks may run on other hosts, so that only what is on the list, and the names in `extra`, goes with them.
    Raises UserError for a name in `extra` that is not set.
    """
    for name in extra:
        if name not in environ:
            hint = "; give the name alone, its value is taken from the environment" if "=" in name else ""
            raise UserError(f"--env {name}: there is no such variable in the environment{hint}")
    env = {
        name: value
        for name, value in environ.items()
        if not away or name in extra or is_forwarded(name, launcher, controller)
    }
    # This Python's tools come first: the virtual environment need not be active.
    env["PATH"] = os.pathsep.join([str(bin_folder()), *filter(None, [env.get("PATH")])])
    if controller == "mpi" and (mpi := find_site_mpi()) and mpi.mpirun.parent not in DEFAULT_FOLDERS:
        # horovodrun takes the first mpirun on PATH.
        env["PATH"] = f"{mpi.mpirun.parent}{os.pathsep}{env['PATH']}"
    env["HVDTRAIN_LAUNCH"] = "1"
    env["PYTHONUNBUFFERED"] = "1"
    if (launcher, controller) == ("horovodrun", "gloo"):
        # horovodrun sets it for the ranks; itself unbuffered, it would mix long lines of different ranks.
        del env["PYTHONUNBUFFERED"]
    # horovodrun stops reading a rank whose output is not UTF-8, whatever the locale of the rank's host.
    env["PYTHONIOENCODING"] = "utf-8:backslashreplace"
    # A rank whose peer died says so in a line of C++; that is no news where the cause is shown.
    env.setdefault("HOROVOD_LOG_LEVEL", "fatal")
    # With LSF's job id, horovodrun asks LSF for things that it does not need here, and fails.
    env.pop("LSB_JOBID", None)
    signed_http.give_secret(env)
    return env


def is_forwarded(name: str, launcher: str, controller: str) -> bool:
    """Whether a variable goes with a run over hosts."""
    ranks = name in FORWARDED_NAMES or name.startswith(FORWARDED_PREFIXES)
    base = name in BASE_NAMES or name.startswith(BASE_PREFIXES)
    mpi = controller == "mpi" and name.startswith((*MPI_PREFIXES, *SLURM_PREFIXES))
    return ranks or base or mpi or (launcher == "srun" and name.startswith(SLURM_PREFIXES))


def forwarded_variables(environ: Mapping[str, str], extra: Iterable[str] = ()) -> list[str]:
    """The names of the variables that mpirun is to give to ranks on other hosts."""
    listed = {*FORWARDED_NAMES, *extra}
    return sorted(name for name in environ if name in listed or name.startswith(FORWARDED_PREFIXES))


def bin_folder() -> Path:
    """The folder of this Python: a virtual environment's own, not that of the Python that it links to."""
    return Path(sys.executable).parent
