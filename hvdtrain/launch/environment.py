"""The environment that a launcher runs in, and what of it ranks get: over hosts, only what is on a list.

horovodrun hands all variables that it has to the ranks, on command lines that every user of their hosts can read; so
it gets no more than are on the list. On this host alone ranks get the others from the guard, whose own environment
only its user can read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path

from hvdtrain.errors import UserError

# For ranks, on whichever host.
FORWARDED = (
    *("HVDTRAIN_", "HOROVOD_", "NCCL_", "GLOO_", "UCX_"),
    *("OMP_", "MKL_", "MALLOC_", "PYTHON", "PYTORCH_", "TORCH_"),
)
FORWARDED_NAMES = {"PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "GLIBC_TUNABLES", "CUBLAS_WORKSPACE_CONFIG"}
# For the launcher on this host, and the programs that it starts. horovodrun hands these on as well.
BASE = ("LC_",)
BASE_NAMES = {"HOME", "USER", "LOGNAME", "SHELL", "TERM", "TZ", "TMPDIR", "LANG", "LANGUAGE"}
BASE_NAMES |= {"SSH_AUTH_SOCK", "KRB5CCNAME", "CUDA_VISIBLE_DEVICES"}
# Settings of mpirun, and by which it and srun know their Slurm job.
MPI = ("OMPI_", "PMIX_", "PRTE_")
SLURM = ("SLURM_", "SLURMD_", "SRUN_")
# What is read when a program or a library is loaded, before ranks find what is hidden.
AT_LOADING = ("LD_", "GOMP_", "KMP_", "TCMALLOC_", "COVERAGE_")
HIDDEN = "HVDTRAIN_HIDDEN"  # names that horovodrun must not know, and the file in which ranks find their values
FOUND_IN = "HVDTRAIN_HIDDEN_IN"


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
        name: value for name, value in environ.items() if not away or name in extra or kept(name, launcher, controller)
    }
    # This Python's tools come first: the virtual environment need not be active.
    env["PATH"] = os.pathsep.join([str(bin_folder()), *filter(None, [env.get("PATH")])])
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
    if (launcher, controller) == ("horovodrun", "gloo") and not away and sys.platform == "linux":
        env[HIDDEN] = " ".join(name for name in env if not kept(name, launcher, controller, AT_LOADING))
    return env


def hide(environ: Mapping[str, str]) -> dict[str, str]:
    """The guard's environment for horovodrun: without what is not to be shown, but with where ranks find it."""
    hidden = {HIDDEN, *environ.get(HIDDEN, "").split()}
    env = {name: value for name, value in environ.items() if name not in hidden}
    return env | {FOUND_IN: f"/proc/{os.getpid()}/environ"} if HIDDEN in environ else env


def find_hidden(environ: MutableMapping[str, str]) -> None:
    """Complete a rank's environment by what was hidden from horovodrun. Raises UserError if the guard has ended."""
    if path := environ.pop(FOUND_IN, None):
        if not Path(path).exists():
            raise UserError("the `hvdtrain launch` that started this rank has ended")
        there = dict(pair.split("=", 1) for pair in os.fsdecode(Path(path).read_bytes()).split("\0") if "=" in pair)
        environ.update({name: there[name] for name in there[HIDDEN].split()})


def kept(name: str, launcher: str, controller: str, more: tuple[str, ...] = ()) -> bool:
    """Whether a variable goes with a run over hosts; so do those that begin with one of `more`."""
    ranks = name in FORWARDED_NAMES or name.startswith((*FORWARDED, *more))
    base = name in BASE_NAMES or name.startswith(BASE)
    mpi = controller == "mpi" and name.startswith((*MPI, *SLURM))
    return ranks or base or mpi or (launcher == "srun" and name.startswith(SLURM))


def forwarded(environ: Mapping[str, str], extra: Iterable[str] = ()) -> list[str]:
    """The names of the variables that mpirun is to give to ranks on other hosts."""
    listed = {*FORWARDED_NAMES, *extra}
    return sorted(name for name in environ if name in listed or name.startswith(FORWARDED))


def bin_folder() -> Path:
    """The folder of this Python: a virtual environment's own, not that of the Python that it links to."""
    return Path(sys.executable).parent
