"""Build Horovod for each Python, torch and compiler that this machine can have, and all-reduce with each wheel.

    python -m tests.builds.matrix                       all combinations below: half an hour on two cores
    python -m tests.builds.matrix --torch 2.10 --python 3.12 --compiler g++

Each torch is built with each Python by the first compiler, and the newest torch with this Python by each compiler.
Combinations that cannot be had here are printed by name with the reason. The table that it prints is in docs/builds.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import click

from hvdtrain.native.other_environment import find_python
from hvdtrain.system.errors import UserError

TORCHES = ("2.6", "2.10", "2.14")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
COMPILERS = ("g++", "g++-11", "g++-13", "g++-14", "clang++-15", "clang++-16", "clang++-19", "clang++-22")
THIS_PYTHON = ".".join(map(str, sys.version_info[:2]))
NOT_TO_BE_HAD = re.compile(r"No matching distribution found for torch|Could not find a version .* torch")
TIME_LIMIT = 3600.0  # seconds for one combination


@dataclass(frozen=True)
class Combination:
    """What one wheel is built for, and with what."""

    torch: str
    python: str
    compiler: str

    def describe(self) -> str:
        return f"torch {self.torch}, Python {self.python}, {self.compiler}"


def list_combinations(
    torches: tuple[str, ...], pythons: tuple[str, ...], compilers: tuple[str, ...]
) -> list[Combination]:
    """Return each torch with each Python by the first compiler, then the last torch by each other compiler."""
    combinations = [Combination(torch, python, compilers[0]) for torch in torches for python in pythons]
    python = THIS_PYTHON if THIS_PYTHON in pythons else pythons[0]
    return combinations + [Combination(torches[-1], python, compiler) for compiler in compilers[1:]]


def explain_skip(combination: Combination) -> str:
    """Return why a combination cannot be tried here, "" if it can."""
    if shutil.which(combination.compiler) is None:
        return f"{combination.compiler} is not installed"
    try:
        find_python(combination.python)
    except UserError:
        return f"Python {combination.python} is not installed"
    return ""


def run_combination(combination: Combination) -> str:
    """Build one wheel, and all-reduce with it in an environment of its own; return what the table says of it."""
    with tempfile.TemporaryDirectory(prefix="hvdtrain-matrix-") as folder:
        command = [sys.executable, "-m", "hvdtrain", "horovod", "build", "--without", "nccl", "--wheel-dir", folder]
        command += ["--torch", combination.torch, "--python", combination.python]
        environ = {**os.environ, "CXX": combination.compiler}
        start = time.monotonic()
        done = subprocess.run(command, env=environ, text=True, capture_output=True, timeout=TIME_LIMIT)
        if NOT_TO_BE_HAD.search(done.stderr):
            return f"skipped: there is no torch {combination.torch} for Python {combination.python} here"
        if done.returncode:
            return f"FAILED: {done.stderr.strip()}"
    return f"{read_result(done.stdout)}, {time.monotonic() - start:.0f} s in all"


def read_result(output: str) -> str:
    """Return the exact versions and what the all-reduces took, of the output of build and check."""
    torch = re.search(r"^ +torch +(\S+)$", output, re.MULTILINE)
    python = re.search(r"^ +Python +(\S+)$", output, re.MULTILINE)
    checks = re.findall(r"^ +(Gloo|MPI) +ok +([\d.]+ ms)", output, re.MULTILINE)
    seconds = re.search(r"^ +built .* in (\d+ s)$", output, re.MULTILINE)
    assert torch and python and seconds and len(checks) == 2, output
    found = ", ".join(f"{name} {took}" for name, took in checks)
    return f"torch {torch[1]}, Python {python[1]}, built in {seconds[1]}; all-reduce of 4 MiB: {found}"


def run_all(combinations: list[Combination]) -> Iterator[tuple[Combination, str]]:
    """Yield each combination with its result."""
    for combination in combinations:
        why = explain_skip(combination)
        yield combination, f"skipped: {why}" if why else run_combination(combination)


@click.command()
@click.option("--torch", "torches", multiple=True, default=TORCHES, show_default=True)
@click.option("--python", "pythons", multiple=True, default=PYTHONS, show_default=True)
@click.option("--compiler", "compilers", multiple=True, default=COMPILERS, show_default=True)
def main(torches: tuple[str, ...], pythons: tuple[str, ...], compilers: tuple[str, ...]) -> None:
    """Build and check all combinations, and print a table of them."""
    failed = 0
    print("| torch, Python, compiler | result |\n|---|---|", flush=True)
    for combination, result in run_all(list_combinations(torches, pythons, compilers)):
        failed += result.startswith("FAILED")
        text = result.replace("\n", " ").replace("|", "/")
        print(f"| {combination.describe()} | {text} |", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
