"""Which Horovod is installed, and what it was built for. Imports neither Horovod nor torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.native.torchinfo import Torch, TorchBuild, require_torch
from hvdtrain.system.errors import UserError

RECORD = "hvdtrain_build.json"  # in the package horovod: what Plan.ingredients() said, and the key
SIGNED = "20-signed-http"  # the patch without which a Horovod does not know a run's secret
BUILD = "run `hvdtrain horovod build`"


@dataclass(frozen=True)
class Installed:
    version: str
    folder: Path  # the package
    record: dict[str, Any] | None  # None: not built by hvdtrain
    has_torch: bool  # the extension for torch is there


def find() -> Installed | None:
    """The Horovod of this interpreter's environment, or None."""
    spec = importlib.util.find_spec("horovod")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    try:
        version = importlib.metadata.version("horovod")
    except importlib.metadata.PackageNotFoundError:
        version = "(unknown version)"
    path = folder / RECORD
    record = json.loads(path.read_text()) if path.is_file() else None
    return Installed(version, folder, record, any(folder.glob("torch/mpi_lib_v2*.so")))


def mismatch(horovod: Installed, torch: Torch) -> str | None:
    """In one line why this Horovod fits neither this torch nor this hvdtrain, None if it does or nobody can know."""
    if not horovod.has_torch:
        return f"Horovod {horovod.version} is installed without its torch extension: {BUILD}"
    if horovod.record is None:
        return None
    if horovod.record["torch"] == torch.version:
        if SIGNED not in horovod.record.get("patches", {}):
            return f"Horovod {horovod.version} was built by an older hvdtrain, and its servers answer anybody: {BUILD}"
        return None
    built, now = horovod.record["torch"], torch.version
    if built.split("+")[0] != now.split("+")[0]:  # +cu130 says nothing more then
        built, now = built.split("+")[0], now.split("+")[0]
    return f"Horovod {horovod.version} is built for torch {built} but torch {now} is installed: {BUILD}"


def require() -> Installed:
    """The installed Horovod, if it can work with the installed torch.

    Raises:
        UserError: Horovod or torch is not installed, or Horovod was built for another torch.
    """
    horovod = find()
    if horovod is None:
        raise UserError(f"Horovod is not installed: {BUILD}")
    wrong = mismatch(horovod, require_torch())
    if wrong:
        raise UserError(wrong)
    return horovod


def require_signed() -> None:
    """Raise UserError if the installed Horovod's launcher would show a run's secret to all users of the hosts."""
    horovod = find()
    if horovod is not None and SIGNED not in (horovod.record or {}).get("patches", {}):
        raise UserError(f"Horovod {horovod.version}'s horovodrun shows the secret of a run to all users: {BUILD}")


def torch_build(torch: Torch) -> TorchBuild | None:
    """How this very torch was built, if the installed Horovod's record says so: saves importing torch."""
    horovod = find()
    if horovod is None or horovod.record is None:
        return None
    record = horovod.record
    if (record["torch"], record["torch_git"]) != (torch.version, torch.git):
        return None
    return TorchBuild(tuple(record["torch_archs"]), record["cxx11_abi"])
