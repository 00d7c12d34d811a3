"""Run Horovod's own tests of its torch binding on the installed wheel.

    git clone --branch v0.28.1 --depth 1 https://github.com/horovod/horovod DIR
    python -m tests.builds.horovods_own_tests DIR [-k EXPRESSION]

They are run as Horovod's own CI does, by pytest on two ranks, once over Gloo and once over MPI. Nothing of theirs is
kept here, and its tests of `join` are left out. The results of the last time are in docs/builds.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from hvdtrain.native.check import remove_job_variables
from hvdtrain.native.installed import find_horovods_mpi

# test_horovod_join_broadcast never ends over Gloo, in the release either; after it, ranks wait for each other.
LEFT_OUT = ("-k", "not join")
TEST_FILE = Path("test", "parallel", "test_torch.py")
THEIR_PACKAGES = ("mock",)  # that the tests import, and nothing here does
TIME_LIMIT = 1800.0  # seconds for one transport
SUMMARY = re.compile(r"^(?:\[\S+<stdout>:)?=*\s*(.*\b(?:passed|failed|error)\b.* in [\d.]+s.*?)\s*=*$", re.MULTILINE)
FAILED = re.compile(r"^(?:\[\S+<stdout>:)?((?:FAILED|ERROR) \S+.*)$", re.MULTILINE)


def launch_commands() -> dict[str, list[str]]:
    """Return for each transport the command that starts what follows it on two ranks."""
    commands = {"Gloo": [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", "2"]}
    mpi = find_horovods_mpi()
    if mpi:
        commands["MPI"] = [str(mpi.mpirun), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "2"]
    return commands


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("pytest_arguments", nargs=-1, type=click.UNPROCESSED)
def main(folder: Path, pytest_arguments: tuple[str, ...]) -> None:
    """Run the tests of a clone of Horovod at FOLDER, and print which failed on each rank."""
    file = folder / TEST_FILE
    if not file.is_file():
        raise click.UsageError(f"{file} does not exist: expected a clone of Horovod's release v0.28.1")
    with tempfile.TemporaryDirectory(prefix="hvdtrain-horovods-tests-") as name:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", name, *THEIR_PACKAGES], check=True)
        failed = [run_tests(transport, file, name, pytest_arguments) for transport in launch_commands()]
    sys.exit(any(failed))


def run_tests(transport: str, file: Path, packages: str, pytest_arguments: tuple[str, ...]) -> bool:
    """Run a file of tests over one transport, print what it came to, and return whether any failed."""
    environ = remove_job_variables(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": packages}
    environ |= {"HOROVOD_GLOO_TIMEOUT_SECONDS": "300"}  # one rank may import much later than the other
    pytest = [sys.executable, "-m", "pytest", "-q", "--timeout=120", "--color=no", "-p", "no:cacheprovider", "-rfE"]
    # From the folder of the test: its clone has a package `horovod` too, which is not built.
    command = [*launch_commands()[transport], *pytest, "-c", os.devnull, *LEFT_OUT, *pytest_arguments, file.name]
    done = subprocess.run(
        command, cwd=file.parent, env=environ, text=True, errors="replace", timeout=TIME_LIMIT, capture_output=True
    )
    lines = [*SUMMARY.findall(done.stdout), *sorted(set(FAILED.findall(done.stdout)))]
    print(
        f"{transport}: exit code {done.returncode}", *(lines or done.stdout.splitlines()[-5:]), sep="\n  ", flush=True
    )
    return done.returncode != 0


if __name__ == "__main__":
    main()
