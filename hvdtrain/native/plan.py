"""What to build on this machine, and why: decided before anything is downloaded."""

from __future__ import annotations

import os
import platform
import re
import sys
import sysconfig
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.native import installed
from hvdtrain.native.cuda import Nccl, Toolkit, find_nccl, find_toolkit
from hvdtrain.native.mpi import Mpi, choose_mpi
from hvdtrain.native.patches import SourcePatch, read_revision, select_patches
from hvdtrain.native.record import IN_ENVIRONMENT, BuildRecord
from hvdtrain.native.torchinfo import Torch, TorchBuild, ask_torch, require_torch
from hvdtrain.system.errors import RunError, UserError

VERSION = "0.28.1"  # the last release
SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
CPU_FEATURES = ("f16c", "avx", "fma")  # of x86: what Horovod's fp16 arithmetic can use


@dataclass(frozen=True)
class Plan:
    """What is built, and the reasons.

    Attributes:
        torch: The installed torch.
        torch_build: How it was built.
        mpi: The MPI to build with, None to build without.
        mpi_why: Why, in words.
        toolkit: The CUDA toolkit, None to build without NCCL.
        nccl: NCCL, None to build without.
        nccl_why: Why, in words.
        archs: GPU architectures to compile for.
        cpu_flags: Compiler flags for this CPU's instructions.
    """

    torch: Torch
    torch_build: TorchBuild
    mpi: Mpi | None
    mpi_why: str
    toolkit: Toolkit | None
    nccl: Nccl | None
    nccl_why: str
    archs: tuple[str, ...]
    cpu_flags: str

    def required_patches(self) -> list[SourcePatch]:
        """Return the changes to Horovod's source that this build needs."""
        return select_patches(nccl=self.nccl is not None)

    def run_path(self) -> list[str]:
        """Return the folders in which the library looks for MPI and NCCL, so that it needs no LD_LIBRARY_PATH."""
        folders = []
        if self.mpi:
            libs = [lib for lib in (self.mpi.home / "lib", self.mpi.home / "lib64") if any(lib.glob("libmpi*.so*"))]
            folders += libs[:1]
        if self.nccl:
            folders.append(self.nccl.library.parent)
        return [relocatable_path(folder) for folder in folders]

    def make_record(self) -> BuildRecord:
        """Return all that the build depends on."""
        return BuildRecord(
            horovod=VERSION,
            revision=read_revision()[0],
            sdist_sha256=SHA256,
            python=sysconfig.get_config_var("SOABI"),
            platform=f"{sysconfig.get_platform()} {'-'.join(platform.libc_ver())}",
            torch=self.torch.version,
            torch_git=self.torch.git,
            torch_archs=self.torch_build.archs,
            cxx_standard=self.torch.standard,
            cxx11_abi=self.torch_build.cxx11_abi,
            gloo=True,
            mpi=self.mpi.version if self.mpi else None,
            mpi_home=None if not self.mpi else IN_ENVIRONMENT if self.mpi.in_environment else str(self.mpi.home),
            nccl=self.nccl.version if self.nccl else None,
            nccl_from=self.nccl.source if self.nccl else None,
            cuda=self.toolkit.version if self.toolkit else None,
            archs=self.archs,
            cpu_flags=self.cpu_flags,
            compiler_flags={name: os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS")},
            rpath=tuple(self.run_path()),
            patches={patch.name: patch.hash_changes() for patch in self.required_patches()},
        )

    def describe_parts(self) -> str:
        """Return the plan, part by part, as human-readable text."""
        gpu = f", for GPUs sm_{', sm_'.join(self.archs)}" if self.archs else ""
        python = sysconfig.get_config_var("SOABI")
        flags = self.cpu_flags
        cpu = f"{flags}: hosts that use this wheel must have them" if flags else "no special instructions"
        lines = [
            f"Horovod {wheel_version()} for torch {self.torch.version} (C++{self.torch.standard}), {python}",
            "  Gloo  yes  bundled with Horovod",
            f"  MPI   {'yes' if self.mpi else 'no '}  {self.mpi_why}",
            f"  NCCL  {'yes' if self.nccl else 'no '}  {self.nccl_why}{gpu}",
            f"  CPU        {cpu}",
            f"  key        {self.make_record().cache_key()}",
        ]
        return "\n".join(lines)


def wheel_version() -> str:
    """Return the version of the wheels that are built, such as "0.28.1+hvdtrain.1"."""
    return f"{VERSION}+{local_version()}"


def local_version() -> str:
    """Return the local part of the wheels' version, which tells them from upstream's: "hvdtrain.N"."""
    return f"hvdtrain.{read_revision()[0]}"


def make_plan(without: Collection[str] = (), mpi_prefix: str | None = None) -> Plan:
    """Look at this machine and decide what to build.

    Args:
        without: Parts to leave out: "mpi", "nccl".
        mpi_prefix: The prefix of the MPI to build with, "none", or None to search for one.

    Raises:
        UserError: torch is not installed, or `mpi_prefix` is not that of an MPI.
        RunError: torch cannot report how it was built, or has no architecture in common with the toolkit.
    """
    torch = require_torch()
    torch_build = installed.recorded_torch_build(torch) or ask_torch()
    mpi, mpi_why = plan_mpi(without, mpi_prefix)
    toolkit, nccl, nccl_why = plan_nccl(torch, without)
    archs: tuple[str, ...] = ()
    if toolkit and nccl:
        archs = tuple(arch for arch in torch_build.archs if arch in toolkit.archs)
        if not archs:
            raise RunError(
                f"nvcc in {toolkit.home} compiles for none of torch's GPU architectures "
                f"({', '.join(torch_build.archs) or 'none'}): use another toolkit, or --without nccl"
            )
    return Plan(torch, torch_build, mpi, mpi_why, toolkit, nccl, nccl_why, archs, select_cpu_flags(read_cpuinfo()))


def plan_mpi(without: Collection[str], mpi_prefix: str | None) -> tuple[Mpi | None, str]:
    """Return the MPI to build with, or None, and why.

    Raises:
        UserError: `mpi_prefix` is not that of an MPI, or MPI is to be left out as well.
    """
    if "mpi" not in without:
        return choose_mpi(mpi_prefix)
    if mpi_prefix not in (None, "none"):
        raise UserError(f"--mpi {mpi_prefix} and --without mpi: expected only one of them")
    return None, "--without mpi"


def plan_nccl(torch: Torch, without: Collection[str]) -> tuple[Toolkit | None, Nccl | None, str]:
    """Return NCCL and the toolkit to build with, if torch has CUDA and both are found, and why."""
    if "nccl" in without:
        return None, None, "--without nccl"
    if torch.cuda is None:
        return None, None, f"torch {torch.version} has no CUDA"
    toolkit, toolkit_why = find_toolkit(torch.cuda)
    if toolkit is None:
        return None, None, toolkit_why
    nccl = find_nccl(torch.cuda)
    if nccl is None:
        return None, None, f"no NCCL: pip install nvidia-nccl-cu{torch.cuda.split('.')[0]}"
    return toolkit, nccl, f"NCCL {nccl.version} ({nccl.source}), {toolkit_why}"


def relocatable_path(folder: Path) -> str:
    """Return a run path of horovod/torch/*.so: relative inside this environment, so that the wheel fits others."""
    if not folder.is_relative_to(sys.prefix):
        return str(folder)
    home = Path(sysconfig.get_path("platlib")) / "horovod" / "torch"
    return "$ORIGIN/" + os.path.relpath(folder, home)


def select_cpu_flags(cpuinfo: str) -> str:
    """Return the compiler flags for those of CPU_FEATURES that the CPU has: "" on other than x86, without `flags`."""
    found = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    present = set(found[1].split()) if found else set()
    return " ".join(f"-m{feature}" for feature in CPU_FEATURES if feature in present)


def read_cpuinfo() -> str:
    """Return the kernel's description of the CPU, "" if it has none."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""
