"""Facts about the installed torch, read from its files: importing torch takes seconds."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.system.errors import RunError, UserError
from hvdtrain.system.limits import NativeLimits
from hvdtrain.system.processes import run_process

# Minor versions of torch for which Horovod was built and run, in ascending order.
TESTED_TORCH = ("2.6", "2.11", "2.13", "2.14", "2.15")

# Facts that only torch itself has. A torch without CUDA has no architecture flags.
ASK = """
import json, torch
flags = torch._C._cuda_getArchFlags() if torch.version.cuda else ""
print(json.dumps([flags, torch.compiled_with_cxx11_abi()]))
"""


@dataclass(frozen=True)
class Torch:
    """An installed torch.

    Attributes:
        version: With its local part, such as "2.14.1+cu130".
        cuda: The CUDA it was built with, such as "13.0"; None for a CPU-only torch.
        git: The commit it was built from.
        standard: The C++ standard of its headers, such as "20".
    """

    version: str
    cuda: str | None
    git: str
    standard: str


@dataclass(frozen=True)
class TorchBuild:
    """How a torch was built, as far as its files do not tell.

    Attributes:
        archs: GPU architectures it has code for, such as "80" and "90".
        cxx11_abi: Whether it uses the C++11 ABI.
    """

    archs: tuple[str, ...]
    cxx11_abi: bool


def find_torch() -> Torch | None:
    """Return the torch of this Python environment, or None."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return read_torch(Path(spec.origin).parent)


def explain_untested_torch(torch: Torch) -> str | None:
    """Return one line if a torch is newer than those that Horovod was built for so far, else None."""
    if minor_version(torch.version) <= minor_version(TESTED_TORCH[-1]):
        return None
    tested = ", ".join(TESTED_TORCH)
    return f"torch {torch.version} is newer than those tested with Horovod ({tested}): it may not build or not work"


def minor_version(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version such as "2.14.1+cu130"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def require_torch() -> Torch:
    """Return the installed torch.

    Raises:
        UserError: There is none.
    """
    torch = find_torch()
    if torch is None:
        raise UserError(f"no torch in {sys.prefix}: pip install torch")
    return torch


def read_torch(folder: Path) -> Torch:
    """Read torch's version file, and the C++ standard that its extension builder uses.

    Raises:
        RunError: A file lacks what it has in every torch so far.
    """
    text = (folder / "version.py").read_text()
    version = read_assignment(text, "__version__")
    if version is None:
        raise RunError(f"{folder / 'version.py'} has no version")
    builder = folder / "utils" / "cpp_extension.py"
    standards = re.findall(r"-std=c\+\+(\d\d)\b", builder.read_text())
    if not standards:
        raise RunError(f"{builder} has no C++ standard")
    return Torch(version, read_assignment(text, "cuda"), read_assignment(text, "git_version") or "", max(standards))


def read_assignment(text: str, name: str) -> str | None:
    """Return the string assigned to `name` in the text of a Python file; None if it is None or missing."""
    found = re.search(rf"^{name}(?::[^=\n]*)? = ['\"]([^'\"]*)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def ask_torch() -> TorchBuild:
    """Ask torch, in a separate process, how it was built.

    Raises:
        RunError: torch cannot be imported.
    """
    asked = run_process([sys.executable, "-c", ASK], NativeLimits.ask_torch)
    if asked.exit_code:
        why = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"torch cannot be imported: {why}")
    flags, cxx11_abi = json.loads(asked.stdout.splitlines()[-1])
    return TorchBuild(parse_archs(flags or ""), cxx11_abi)


def parse_archs(flags: str) -> tuple[str, ...]:
    """Return the plain architectures among sm_80, sm_90a, compute_90 and so on; Horovod's build accepts only those."""
    return tuple(sorted(set(re.findall(r"\bsm_(\d+)(?![\da-z])", flags)), key=int))
