"""What a Horovod was built from: stored inside its wheel, and hashed into its key in the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any, cast

RECORD_NAME = "hvdtrain_build.json"  # file in the package `horovod`
IN_ENVIRONMENT = "environment"  # mpi_home of an MPI that belongs to the Python environment, wherever that is


@dataclass(frozen=True, kw_only=True)
class BuildRecord:
    """Everything that a build depends on: if any of it differs, it is another wheel.

    Attributes:
        horovod: Version of the released source.
        revision: Number of hvdtrain's patches (patches/REVISIONS); 0 in wheels from before they were numbered.
        sdist_sha256: SHA-256 of the released source.
        python: Python's ABI, such as "cpython-311-x86_64-linux-gnu".
        platform: Operating system and C library.
        torch: torch's version with its local part, such as "2.14.1+cu130".
        torch_git: The commit that torch was built from.
        torch_archs: GPU architectures torch has code for.
        cxx_standard: C++ standard of torch's headers, such as "20".
        cxx11_abi: Whether torch uses the C++11 ABI.
        gloo: Whether Gloo is built in (always, so far).
        mpi: Name and version of the MPI, None if built without.
        mpi_home: Its prefix, or IN_ENVIRONMENT.
        nccl: Version of NCCL, None if built without.
        nccl_from: Where NCCL was found: the name of a package, NCCL_HOME or "system".
        cuda: Version of the CUDA toolkit.
        archs: GPU architectures that were compiled.
        cpu_flags: Compiler flags for the CPU's instructions.
        compiler_flags: CXXFLAGS and LDFLAGS of the environment.
        rpath: Folders in which the library looks for MPI and NCCL.
        patches: Name and digest of each patch that was applied.
    """

    horovod: str
    revision: int = 0
    sdist_sha256: str
    python: str
    platform: str
    torch: str
    torch_git: str
    torch_archs: tuple[str, ...]
    cxx_standard: str
    cxx11_abi: bool
    gloo: bool
    mpi: str | None
    mpi_home: str | None
    nccl: str | None
    nccl_from: str | None
    cuda: str | None
    archs: tuple[str, ...]
    cpu_flags: str
    compiler_flags: dict[str, str]
    rpath: tuple[str, ...] = ()
    patches: dict[str, str] = field(default_factory=dict)

    def cache_key(self) -> str:
        """Return the name of this build in the cache: the main facts in words, and a hash of all of them."""
        words = [f"horovod{self.horovod}", f"torch{self.torch}", self.python.split("-linux")[0]]
        words += [self.mpi or "nompi", f"nccl{self.nccl}" if self.nccl else "nonccl"]
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return "-".join(re.sub(r"[^\w.+-]", "", word).lower() for word in [*words, digest])

    def to_json(self) -> str:
        """Return the record as a JSON object, with its key as the first entry."""
        return json.dumps({"key": self.cache_key(), **dataclasses.asdict(self)}, indent=2) + "\n"


def parse_build_record(text: str) -> BuildRecord:
    """Read a record, also one of an older hvdtrain: entries that are unknown now are ignored.

    Raises:
        ValueError: The text is not a JSON object, or entries are missing.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    known = {item.name for item in dataclasses.fields(BuildRecord)}
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items() if name in known
    }
    try:
        return BuildRecord(**cast(Any, values))
    except TypeError as error:
        raise ValueError(str(error)) from None
