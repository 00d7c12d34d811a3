"""Where built wheels are kept: <folder>/<key>/horovod-...whl, with the log of the build beside it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hvdtrain.files import sync_folder


def wheel_folder() -> Path:
    """The user's folder of wheels."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "hvdtrain" / "wheels"


def find_wheel(folder: Path) -> Path | None:
    """The wheel in one key's folder, or None."""
    wheels = sorted(folder.glob("horovod-*.whl"))
    return wheels[0] if wheels else None


def store(wheel: Path, folder: Path) -> Path:
    """Put a wheel into a key's folder: it is there whole or not at all, also if the machine stops.

    Returns:
        the wheel's new path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=".part-")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as out, wheel.open("rb") as source:
            shutil.copyfileobj(source, out)
            out.flush()
            os.fsync(out.fileno())
        part.chmod(0o644)
        target = folder / wheel.name
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(folder)
    return target
