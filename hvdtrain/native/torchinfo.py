"""What the installed torch is, read from its files: importing torch takes seconds."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.system.errors import RunError, UserError

# The two things that only torch itself knows. A torch without CUDA has no architecture flags to ask for.
ASK = """
import json, torch
flags = torch._C._cuda_getArchFlags() if torch.version.cuda else ""
print(json.dumps([flags, torch.compiled_with_cxx11_abi()]))
"""


@dataclass(frozen=True)
class Torch:
    version: str  # with its local part: 2.14.1+cu130
    cuda: str | None  # the CUDA it was built with
    git: str
    standard: str  # the C++ standard of its headers: "20"


@dataclass(frozen=True)
class TorchBuild:
    archs: tuple[str, ...]  # the GPU architectures it has code for: "80", "90"
    cxx11_abi: bool


def find_torch() -> Torch | None:
    """The torch of this interpreter's environment, or None."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return read_torch(Path(spec.origin).parent)


def require_torch() -> Torch:
    """The installed torch.

    Raises:
        UserError: there is none.
    """
    torch = find_torch()
    if torch is None:
        raise UserError(f"no torch in {sys.prefix}: pip install torch")
    return torch


def read_torch(folder: Path) -> Torch:
    """Read torch's version file, and the C++ standard that its extension builder uses.

    Raises:
        RunError: a file does not say what it says in every torch so far.
    """
    text = (folder / "version.py").read_text()
    version = field(text, "__version__")
    if version is None:
        raise RunError(f"{folder / 'version.py'} names no version")
    builder = folder / "utils" / "cpp_extension.py"
    standards = re.findall(r"-std=c\+\+(\d\d)\b", builder.read_text())
    if not standards:
        raise RunError(f"{builder} names no C++ standard")
    return Torch(version, field(text, "cuda"), field(text, "git_version") or "", max(standards))


def field(text: str, name: str) -> str | None:
    """The string assigned to `name` in a Python file's text, None if it is None or not there."""
    found = re.search(rf"^{name}(?::[^=\n]*)? = ['\"]([^'\"]*)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def ask_torch() -> TorchBuild:
    """Ask torch, in a process of its own, how it was built.

    Raises:
        RunError: torch cannot be imported.
    """
    asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, timeout=300)
    if asked.returncode:
        why = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"torch cannot be imported: {why}")
    flags, cxx11_abi = json.loads(asked.stdout.splitlines()[-1])
    return TorchBuild(parse_archs(flags or ""), cxx11_abi)


def parse_archs(flags: str) -> tuple[str, ...]:
    """The plain architectures among names such as sm_80, sm_90a and compute_90; Horovod's build takes only those."""
    return tuple(sorted(set(re.findall(r"\bsm_(\d+)(?![\da-z])", flags)), key=int))
