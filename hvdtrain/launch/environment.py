"""The environment that a launcher runs in, and what of it ranks get: over several hosts, only what is on a list.

The run's secret is in it (hvdtrain/system/signed_http.py). No launcher writes values on a command line: horovodrun
passes them on by ssh's standard input, mpirun and srun by their own ways.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from hvdtrain.launch.launcher import Launcher, bin_folder
from hvdtrain.system import signed_http
from hvdtrain.system.errors import UserError

# For ranks, on whichever host.
FORWARDED_PREFIXES = (
    *("HVDTRAIN_", "HOROVOD_", "NCCL_", "GLOO_", "UCX_"),
    *("OMP_", "MKL_", "MALLOC_", "PYTHON", "PYTORCH_", "TORCH_", "KERAS_", "JAX_", "XLA_", "TF_"),
)
FORWARDED_NAMES = {"PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "GLIBC_TUNABLES", "CUBLAS_WORKSPACE_CONFIG", "NPROC"}
# For the launcher on this host, and the programs that it starts. horovodrun passes these on as well.
BASE_PREFIXES = ("LC_",)
BASE_NAMES = {"HOME", "USER", "LOGNAME", "SHELL", "TERM", "TZ", "TMPDIR", "LANG", "LANGUAGE"}
BASE_NAMES |= {"SSH_AUTH_SOCK", "KRB5CCNAME", "CUDA_VISIBLE_DEVICES"}
# Settings of Open MPI, and the variables by which it knows its Slurm job.
MPI_PREFIXES = ("OMPI_", "PMIX_", "PRTE_", "SLURM_", "SLURMD_", "SRUN_")


def rank_environment(
    environ: Mapping[str, str],
    launcher: Launcher,
    controller: str,
    *,
    multi_host: bool = False,
    forward_env: Iterable[str] = (),
) -> dict[str, str]:
    """Return the environment for a launcher and its ranks.

    Args:
        environ: this process's environment.
        launcher: what starts the ranks.
        controller: `gloo` or `mpi`.
        multi_host: some ranks may run on other hosts: only what is on the list, and `forward_env`, is passed on.
        forward_env: the names of further variables for the ranks.

    Raises:
        UserError: a variable in `forward_env` is not set.
    """
    names = set(forward_env)
    for name in sorted(names - set(environ)):
        hint = "; give the name alone, its value is taken from the environment" if "=" in name else ""
        raise UserError(f"--env {name}: there is no such variable in the environment{hint}")
    prefixes = (
        *FORWARDED_PREFIXES,
        *BASE_PREFIXES,
        *launcher.environment_prefixes,
        *(MPI_PREFIXES if controller == "mpi" else ()),
    )
    names |= FORWARDED_NAMES | BASE_NAMES
    env = {
        name: value for name, value in environ.items() if not multi_host or name in names or name.startswith(prefixes)
    }
    # This Python's tools come first: the virtual environment need not be active.
    env["PATH"] = os.pathsep.join([str(bin_folder()), *filter(None, [env.get("PATH")])])
    env["HVDTRAIN_LAUNCH"] = "1"
    env["PYTHONUNBUFFERED"] = "1"
    # horovodrun stops reading a rank whose output is not UTF-8, whatever the locale of the rank's host.
    env["PYTHONIOENCODING"] = "utf-8:backslashreplace"
    # A rank that lost another one reports it in a line of C++, which is noise next to the cause.
    env.setdefault("HOROVOD_LOG_LEVEL", "fatal")
    # With LSF's job id, horovodrun asks LSF for things that it does not need here, and fails.
    env.pop("LSB_JOBID", None)
    launcher.prepare_environment(env, controller)
    signed_http.give_secret(env)
    return env


def forwarded_variables(environ: Mapping[str, str], forward_env: Iterable[str] = ()) -> list[str]:
    """Return the names of the variables that mpirun must give to ranks on other hosts."""
    listed = {*FORWARDED_NAMES, *forward_env}
    return sorted(name for name in environ if name in listed or name.startswith(FORWARDED_PREFIXES))
