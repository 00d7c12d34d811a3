"""Building the wheel of a plan, and installing it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from hvdtrain.native import cache, installed, mend, source
from hvdtrain.native.log import first_error, run_logged
from hvdtrain.native.patches import apply_patches, read_patches
from hvdtrain.native.plan import Plan
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.system.progress import Report

BUILD_SECONDS = 3600  # a build takes one to five minutes; this ends one that hangs
COMPILERS = ("c++", "g++", "clang++")
# What would steer the build behind the key's back.
STEERING = re.compile(r"(HOROVOD|CMAKE|CCL|NCCL|CUDA|MPI)_|(MAKEFLAGS|CUDAFLAGS|CUDACXX)$")


def build(plan: Plan, folder: Path, jobs: int, report: Report) -> Path:
    """Build the plan's wheel.

    Args:
        folder: the key's folder, where the wheel goes and the log is kept.
        jobs: how many files are compiled at once.

    Returns:
        the wheel's path.

    Raises:
        UserError: there is no C++ compiler.
        RunError: a step failed; the message has the first error and the log's path.
    """
    compiler = find_compiler()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    log.write_text(json.dumps(plan.ingredients(), indent=2) + "\n")
    with tempfile.TemporaryDirectory(prefix="hvdtrain-horovod-") as name:
        work = Path(name)
        env = build_environment(plan, work, compiler, jobs)
        report("fetching the build tools", 0)
        source.fetch_tools(work / "tools", log, env)
        report("fetching Horovod's source", 0)
        tree = source.fetch_source(work / "source", log, env)
        apply_patches(tree, read_patches())
        mend.apply(tree, plan.mends())
        record = {"key": plan.key(), **plan.ingredients()}
        (tree / "horovod" / installed.RECORD).write_text(json.dumps(record, indent=2) + "\n")
        report("configuring Horovod", 0)
        # -q: else setup.py hands Ninja an option that only make knows.
        command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(work / "wheel")]
        run_logged(
            "building Horovod",
            command,
            log=log,
            env=env,
            cwd=tree,
            timeout=BUILD_SECONDS,
            on_line=lambda line: report_compiling(line, report),
        )
        wheel = cache.find_wheel(work / "wheel")
        if wheel is None:
            raise RunError(f"building Horovod gave no wheel; log: {log}")
        return cache.store(wheel, folder)


def find_compiler() -> str:
    """The C++ compiler: $CXX, or the first there is.

    Raises:
        UserError: there is none.
    """
    chosen = os.environ.get("CXX")
    if chosen:
        if shutil.which(chosen) is None:
            raise UserError(f"CXX={chosen} is not a command: set it to a C++ compiler, or unset it")
        return chosen
    for name in COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise UserError("no C++ compiler found (c++, g++ or clang++): apt-get install g++, or dnf install gcc-c++")


def build_environment(plan: Plan, work: Path, compiler: str, jobs: int) -> dict[str, str]:
    """The environment in which Horovod's setup.py builds exactly the plan."""
    env = {name: value for name, value in os.environ.items() if not STEERING.match(name)}
    tools = work / "tools"
    path = [str(tools / "bin")]
    env |= {
        "PYTHONPATH": os.pathsep.join([str(tools), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "CXX": compiler,
        "CMAKE_GENERATOR": "Ninja",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
        "MAKEFLAGS": f"-j{jobs}",  # else setup.py asks for 8
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # what the bundled Gloo asks for, CMake 4 refuses
        "HOROVOD_CMAKE": str(tools / "bin" / "cmake"),
        "HOROVOD_BUILD_ARCH_FLAGS": plan.cpu_flags,
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITHOUT_NVTX": "1",
    }
    if plan.mpi:
        env |= {"HOROVOD_WITH_MPI": "1", "MPI_HOME": str(plan.mpi.home)}
        path.append(str(plan.mpi.home / "bin"))
    else:
        env["HOROVOD_WITHOUT_MPI"] = "1"
    if plan.nccl and plan.toolkit:
        cuda = source.cuda_home(plan.toolkit, work / "cuda")
        env |= {
            "CUDA_HOME": str(cuda),
            "HOROVOD_CUDA_HOME": str(cuda),
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_NCCL_HOME": str(source.nccl_home(plan.nccl, work / "nccl")),
            "HOROVOD_NCCL_LINK": "SHARED",
            "HOROVOD_BUILD_CUDA_CC_LIST": ",".join(plan.archs),
        }
        path.append(str(cuda / "bin"))
    env["PATH"] = os.pathsep.join([*path, os.environ.get("PATH", os.defpath)])
    return env


def report_compiling(line: str, report: Report) -> None:
    """Show the progress that a line of Ninja's names, such as "[12/84] Building ..."."""
    found = re.match(r"\[(\d+)/(\d+)\] ", line)
    if found:
        report("compiling Horovod", 100 * int(found[1]) // int(found[2]))


def install(wheel: Path) -> None:
    """Install a wheel into the running environment, with what it requires, and see that it can be loaded.

    Raises:
        RunError: pip failed, or the library does not load.
    """
    # First Horovod alone, always anew; then what it requires and is not there. pip does not touch what fits.
    pip([*source.PIP, "install", "--quiet", "--force-reinstall", "--no-deps", str(wheel)], os.environ)
    pip([*source.PIP, "install", "--quiet", str(wheel)], os.environ)
    loaded = subprocess.run(
        [sys.executable, "-c", "import horovod.torch"], capture_output=True, text=True, timeout=300, cwd=sys.prefix
    )
    if loaded.returncode:
        why = (loaded.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"Horovod is installed from {wheel} but does not load: {why}")


def pip(command: list[str], env: Mapping[str, str]) -> None:
    """Run pip.

    Raises:
        RunError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    if done.returncode:
        raise RunError(f"pip cannot install Horovod:\n{first_error(done.stdout + done.stderr)}")
