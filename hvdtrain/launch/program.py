"""A program that is not a recipe: what each rank runs of it, and what can be known to be wrong before any starts.

hvdtrain launch          launcher           each rank
===============          ========           =========
launch_program  ------>  horovodrun ... ->  python -m hvdtrain.launch.program_rank -- COMMAND ...
store  <----------------------------------  addresses and ports of all ranks, as signed HTTP
report  <--- standard output -------------  started, failed, finished (hvdtrain.system.messages)
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.doctor.host_facts import FactsRequest
from hvdtrain.system.errors import EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, CommandError

# What a user's own environment may hold from elsewhere; ranks get the launch's unless --env names the variable.
CHOSEN_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "JAX_COORDINATOR_ADDRESS", "TF_CONFIG")


MPI_IMPORT = re.compile(rb"^\s*(?:import|from)\s+mpi4py\b", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Program:
    """A command that each rank runs.

    Attributes:
        command: the program and its arguments.
        gpu_per_rank: whether a rank sees one GPU of its host only, by CUDA_VISIBLE_DEVICES.
        relaunches: how often a job that failed is started again.
    """

    command: Sequence[str]
    gpu_per_rank: bool = False
    relaunches: int = 0

    def rank_command(self, forward_env: Iterable[str] = (), *, elastic: bool = False) -> list[str]:
        """Return what the launcher starts in each slot.

        Args:
            forward_env: the variables that the user named with --env: a rank keeps their values.
            elastic: ranks come and go, so that none has a number or a world that holds for the program's life.
        """
        options = ["--elastic"] if elastic else []
        options += ["--gpu-per-rank"] if self.gpu_per_rank else []
        for name in sorted({*CHOSEN_VARIABLES, "CUDA_VISIBLE_DEVICES"} & set(forward_env)):
            options += ["--keep", name]
        return [sys.executable, "-m", "hvdtrain.launch.program_rank", *options, "--", *self.command]

    def check_command(self, environ: Mapping[str, str]) -> None:
        """Raise CommandError if this host cannot start the command: exit code 127 or 126, as of a shell."""
        name = self.command[0]
        found = find_command(name, environ.get("PATH", ""))
        if found is None:
            where = "there is no such file" if "/" in name else "there is no such command on PATH"
            raise CommandError(f"cannot start {name!r}: {where}", EXIT_NOT_FOUND)
        if Path(found).is_dir() or not os.access(found, os.X_OK):
            what = "it is a folder" if Path(found).is_dir() else f"it is not executable: chmod +x {found}"
            raise CommandError(f"cannot start {name!r}: {what}", EXIT_NOT_EXECUTABLE)

    def request_files(self, environ: Mapping[str, str]) -> FactsRequest:
        """Return the request for the files that each host must have: the command, and a script that it runs.

        A script is its first argument that is not an option, if this host has a file of that name.
        """
        command = find_command(self.command[0], environ.get("PATH", "")) or self.command[0]
        script = next((arg for arg in self.command[1:] if not arg.startswith("-")), None)
        files = [script] if script and Path(script).is_file() else []
        return FactsRequest(programs=[sys.executable, command], files=files)

    def describe_lone_ranks(self, controller: str) -> str:
        """Return a line of warning if a script of this host imports mpi4py, and its ranks do not start MPI; else "".

        Args:
            controller: how the launch's ranks communicate: each is alone in MPI.COMM_WORLD unless it is `mpi`.
        """
        script = next((arg for arg in self.command[1:] if not arg.startswith("-")), "")
        if controller == "mpi" or not script.endswith(".py") or not Path(script).is_file():
            return ""
        if MPI_IMPORT.search(Path(script).read_bytes()) is None:
            return ""
        return (
            f"{script} imports mpi4py, and without MPI each rank is alone in MPI.COMM_WORLD; "
            "--launcher mpirun starts them as one MPI job"
        )


def find_command(name: str, path: str) -> str | None:
    """Return the file that a shell would start, also if it must not be executed; None if there is none."""
    if "/" in name:
        return name if Path(name).exists() else None
    found = shutil.which(name, path=path)
    if found:
        return found
    there = (Path(folder or ".") / name for folder in path.split(os.pathsep))
    return next((str(file) for file in there if file.is_file()), None)


def find_replaced_variables(environ: Mapping[str, str], forward_env: Iterable[str]) -> list[str]:
    """Return the variables of the environment whose values ranks do not get, as the launch chooses its own."""
    return [name for name in CHOSEN_VARIABLES if environ.get(name) and name not in set(forward_env)]
