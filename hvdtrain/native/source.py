"""Fetching what a build is made from: Horovod's released source, the build tools, and folders for CUDA and NCCL."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tarfile
from collections.abc import Collection, Mapping
from pathlib import Path

from hvdtrain.native.cuda import Nccl, Toolkit
from hvdtrain.native.log import BuildStep, run_logged
from hvdtrain.native.plan import SHA256, VERSION
from hvdtrain.system.errors import RunError
from hvdtrain.system.limits import NativeLimits

# setuptools 81 removes what Horovod's setup.py imports. Ninja is faster than make, and a pip package.
TOOLS = ("setuptools<81", "wheel", "packaging", "cmake>=3.21", "ninja")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")


def fetch_tools(folder: Path, log: Path, env: Mapping[str, str]) -> None:
    """Install the build tools into a separate folder: the user's environment does not change."""
    command = [*PIP, "install", "--target", str(folder), *TOOLS]
    run_logged(BuildStep("downloading the build tools", command, env, folder.parent, NativeLimits.download), log)


def fetch_source(folder: Path, log: Path, env: Mapping[str, str]) -> Path:
    """Download the released source through pip and unpack it.

    pip checks the hash before it runs any code of the package; `unpack_source` checks it again.

    Args:
        folder: A folder to create and download into.
        log: File to which pip's output is appended.
        env: Environment with the build tools on PYTHONPATH: pip asks the source for its name.

    Returns:
        The folder of the unpacked source.
    """
    folder.mkdir()
    pinned = folder / "requirements.txt"
    pinned.write_text(f"horovod=={VERSION} --hash=sha256:{SHA256}\n")
    command = [*PIP, "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes"]
    command += ["--requirement", str(pinned), "--dest", str(folder)]
    run_logged(BuildStep("downloading Horovod's source", command, env, folder, NativeLimits.download), log)
    return unpack_source(folder / f"horovod-{VERSION}.tar.gz", folder)


def unpack_source(archive: Path, folder: Path) -> Path:
    """Unpack Horovod's source after checking that it is the release.

    Raises:
        RunError: It is another file.
    """
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise RunError(f"{archive.name} has SHA-256 {found}, expected {SHA256}: not the released Horovod {VERSION}")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / f"horovod-{VERSION}"


def link_nccl(nccl: Nccl, folder: Path) -> Path:
    """Create a folder in which CMake finds NCCL: the pip package has no libnccl.so, only libnccl.so.2."""
    (folder / "lib").mkdir(parents=True)
    (folder / "include").symlink_to(nccl.header.parent)
    (folder / "lib" / "libnccl.so").symlink_to(nccl.library)
    return folder


def link_cuda(toolkit: Toolkit, folder: Path) -> Path:
    """Create a folder in which CMake finds the toolkit: the pip packages have no lib64 and no libcudart.so.

    Returns:
        The toolkit's own folder if it is complete, else `folder`, filled with links to it.
    """
    home = toolkit.home
    if any((home / name / "libcudart.so").exists() for name in ("lib64", "lib")):
        return home
    for name in ("bin", "lib64"):
        (folder / name).mkdir(parents=True)
    link_all(home, folder, leave=("bin", "lib", "lib64"))
    link_all(home / "bin", folder / "bin", leave=("nvcc",))
    shutil.copy2(home / "bin" / "nvcc", folder / "bin" / "nvcc")  # nvcc resolves links, then looks around itself
    link_all(home / "lib", folder / "lib64")
    for library in (home / "lib").glob("lib*.so.*"):
        plain = folder / "lib64" / (library.name.split(".so.")[0] + ".so")
        if not plain.exists():
            plain.symlink_to(library)
    return folder


def link_all(source: Path, target: Path, leave: Collection[str] = ()) -> None:
    """Create links in `target` to everything in `source`, except the names in `leave`."""
    for entry in source.iterdir():
        if entry.name not in leave:
            (target / entry.name).symlink_to(entry)
