"""Building the wheel of a plan, and installing it."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from hvdtrain.native import cache, source
from hvdtrain.native.log import BuildStep, first_error, run_logged
from hvdtrain.native.patches import apply_patches
from hvdtrain.native.plan import Plan, local_version
from hvdtrain.native.record import RECORD_NAME
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.system.limits import NativeLimits
from hvdtrain.system.processes import run_process
from hvdtrain.system.progress import ReportStage

COMPILERS = ("c++", "g++", "clang++")
# Variables that change a build in ways that its key does not include.
STEERING = re.compile(r"(HOROVOD|CMAKE|CCL|NCCL|CUDA|MPI)_|(MAKEFLAGS|CUDAFLAGS|CUDACXX)$")


def build_wheel(plan: Plan, folder: Path, jobs: int, report: ReportStage) -> Path:
    """Build the wheel of a plan.

    Args:
        plan: What to build.
        folder: The folder of the plan's key, where the wheel and the log are stored.
        jobs: Number of files to compile at once.
        report: Called with each stage and its percentage.

    Returns:
        The wheel's path.

    Raises:
        UserError: There is no C++ compiler.
        RunError: A step failed; the message has the first error and the log's path.
    """
    compiler = find_compiler()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    record = plan.make_record().to_json()
    log.write_text(record)
    with tempfile.TemporaryDirectory(prefix="hvdtrain-horovod-") as name:
        work = Path(name)
        env = build_environment(plan, work, compiler, jobs)
        report("downloading the build tools", 0)
        source.fetch_tools(work / "tools", log, env)
        report("downloading Horovod's source", 0)
        tree = source.fetch_source(work / "source", log, env)
        apply_patches(tree, plan.required_patches())
        (tree / "horovod" / RECORD_NAME).write_text(record)
        report("configuring Horovod", 0)
        # -q: else setup.py passes an option to Ninja that only make has.
        command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(work / "wheel")]
        env["HOROVOD_LOCAL_VERSION"] = local_version()  # not before: pip asks the source for exactly 0.28.1
        step = BuildStep("building Horovod", command, env, tree, NativeLimits.build)
        run_logged(step, log, on_line=lambda line: report_compiling(line, report))
        wheel = cache.find_wheel(work / "wheel")
        if wheel is None:
            raise RunError(f"building Horovod created no wheel; log: {log}")
        return cache.store_wheel(wheel, folder)


def find_compiler() -> str:
    """Return the C++ compiler: $CXX, or the first of COMPILERS that is installed.

    Raises:
        UserError: There is none.
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
    """Return the environment in which Horovod's setup.py builds exactly the plan."""
    env = {name: value for name, value in os.environ.items() if not STEERING.match(name)}
    tools = work / "tools"
    path = [str(tools / "bin")]
    env |= {
        "PYTHONPATH": os.pathsep.join([str(tools), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "CXX": compiler,
        "CMAKE_GENERATOR": "Ninja",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
        "MAKEFLAGS": f"-j{jobs}",  # else setup.py asks for 8
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # the bundled Gloo requires older policies than CMake 4 has
        "HOROVOD_CMAKE": str(tools / "bin" / "cmake"),
        "HOROVOD_BUILD_ARCH_FLAGS": plan.cpu_flags or " ",  # if empty, CMake asks gcc instead
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITHOUT_NVTX": "1",
        # Read by the patched CMake files (patches 60 and 64).
        "HVDTRAIN_CXX_STANDARD": plan.torch.standard,
        "HVDTRAIN_RPATH": ";".join(plan.run_path()),
    }
    if plan.mpi:
        env |= {"HOROVOD_WITH_MPI": "1", "MPI_HOME": str(plan.mpi.home)}
        path.append(str(plan.mpi.home / "bin"))
    else:
        env["HOROVOD_WITHOUT_MPI"] = "1"
    if plan.nccl and plan.toolkit:
        cuda = source.link_cuda(plan.toolkit, work / "cuda")
        env |= {
            "CUDA_HOME": str(cuda),
            "HOROVOD_CUDA_HOME": str(cuda),
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_NCCL_HOME": str(source.link_nccl(plan.nccl, work / "nccl")),
            "HOROVOD_NCCL_LINK": "SHARED",
            "HOROVOD_BUILD_CUDA_CC_LIST": ",".join(plan.archs),
        }
        path.append(str(cuda / "bin"))
    env["PATH"] = os.pathsep.join([*path, os.environ.get("PATH", os.defpath)])
    return env


def report_compiling(line: str, report: ReportStage) -> None:
    """Report the progress in a line of Ninja's output, such as "[12/84] Building ..."."""
    found = re.match(r"\[(\d+)/(\d+)\] ", line)
    if found:
        report("compiling Horovod", 100 * int(found[1]) // int(found[2]))


def install_wheel(wheel: Path) -> None:
    """Install a wheel and its requirements into this Python environment, and load it once.

    Raises:
        RunError: pip failed, or the library does not load.
    """
    # Horovod alone first, even if the same version is installed; then requirements, without changing those that fit.
    run_pip([*source.PIP, "install", "--quiet", "--force-reinstall", "--no-deps", str(wheel)], os.environ)
    run_pip([*source.PIP, "install", "--quiet", str(wheel)], os.environ)
    loaded = run_process([sys.executable, "-I", "-c", "import horovod.torch"], NativeLimits.load)
    if loaded.exit_code:
        why = (loaded.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"Horovod is installed from {wheel} but does not load: {why}")


def run_pip(command: list[str], env: Mapping[str, str]) -> None:
    """Run pip.

    Raises:
        RunError: It failed.
    """
    done = run_process(command, NativeLimits.install, env=env)
    if done.exit_code:
        raise RunError(f"pip cannot install Horovod:\n{first_error(done.stdout + done.stderr)}")
