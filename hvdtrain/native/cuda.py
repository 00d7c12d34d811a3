"""Finding what a build with NCCL requires: a CUDA toolkit that fits torch, and NCCL itself."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.native.torchinfo import parse_archs
from hvdtrain.system.limits import NativeLimits
from hvdtrain.system.processes import run_process


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit.

    Attributes:
        home: Its folder, which holds bin/nvcc.
        version: Such as "13.0.88".
        archs: GPU architectures that its nvcc can compile for.
    """

    home: Path
    version: str
    archs: tuple[str, ...]


@dataclass(frozen=True)
class Nccl:
    """An NCCL.

    Attributes:
        version: Such as "2.30.7".
        header: Its nccl.h.
        library: Its libnccl.so or libnccl.so.2.
        source: Where it was found: the pip package's name, NCCL_HOME, or "system".
    """

    version: str
    header: Path
    library: Path
    source: str


def find_toolkit(cuda: str) -> tuple[Toolkit | None, str]:
    """Find the first CUDA toolkit of torch's major version.

    The major version must match: the built library loads the libcudart.so.MAJOR that torch brings.

    Args:
        cuda: The CUDA version torch was built with, such as "13.0".

    Returns:
        The toolkit or None; and in words why it was chosen, or why there is none.
    """
    refused = []
    for home in toolkit_homes(cuda):
        if not (home / "bin" / "nvcc").is_file() or not (home / "include" / "cuda_runtime.h").is_file():
            continue
        toolkit = read_toolkit(home)
        if toolkit.version.split(".")[0] == cuda.split(".")[0]:
            return toolkit, f"CUDA {toolkit.version} in {home}"
        refused.append(f"{home} has CUDA {toolkit.version}")
    seen = f" ({'; '.join(refused)})" if refused else ""
    return None, f"no CUDA {cuda.split('.')[0]} toolkit for torch's CUDA {cuda}{seen}: set CUDA_HOME to one"


def toolkit_homes(cuda: str) -> list[Path]:
    """Return the folders where a toolkit may be, in the order of preference, each once."""
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    homes += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob(f"cuda-{cuda.split('.')[0]}*"), reverse=True)]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(Path(nvcc).resolve().parent.parent)
    homes.append(Path(sysconfig.get_path("platlib")) / "nvidia" / f"cu{cuda.split('.')[0]}")  # pip's nvidia-cuda-nvcc
    unique: dict[Path, Path] = {}
    for home in homes:
        unique.setdefault(home.resolve(), home)
    return list(unique.values())


def read_toolkit(home: Path) -> Toolkit:
    """Ask a toolkit's nvcc for its version and its architectures."""
    return Toolkit(
        home,
        toolkit_version(ask_nvcc(home, "--version")),
        parse_archs(ask_nvcc(home, "--list-gpu-code")),
    )


def ask_nvcc(home: Path, option: str) -> str:
    """Return the output of a toolkit's nvcc with one option."""
    return run_process([str(home / "bin" / "nvcc"), option], NativeLimits.ask_nvcc).stdout


def toolkit_version(text: str) -> str:
    """Return the version in the output of `nvcc --version`."""
    found = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    return found[1] if found else "0"


def find_nccl(cuda: str) -> Nccl | None:
    """Find NCCL in NCCL_HOME, in the pip package that torch depends on, or in the system."""
    major = cuda.split(".")[0]
    package = f"nvidia-nccl-cu{major}"
    folders = [(Path(os.environ["NCCL_HOME"]), "NCCL_HOME")] if os.environ.get("NCCL_HOME") else []
    try:
        files = importlib.metadata.distribution(package).locate_file("nvidia/nccl")
        folders.append((Path(str(files)), package))
    except importlib.metadata.PackageNotFoundError:
        pass
    folders += [(Path("/usr"), "system"), (Path("/usr/local"), "system")]
    for folder, source in folders:
        header = folder / "include" / "nccl.h"
        libraries = [*folder.glob("lib*/libnccl.so*"), *folder.glob("lib/*-linux-gnu/libnccl.so*")]
        if header.is_file() and libraries:
            return Nccl(nccl_version(header.read_text(errors="replace")), header, sorted(libraries)[0], source)
    return None


def nccl_version(header: str) -> str:
    """Return the version that the text of nccl.h defines."""
    parts = (re.search(rf"#define NCCL_{part} (\d+)", header) for part in ("MAJOR", "MINOR", "PATCH"))
    return ".".join(part[1] if part else "0" for part in parts)
