"""A change to Horovod's released source.

It names the text that it replaces, which must stand in its file exactly once: another Horovod, or a mend already made,
stops the build instead of giving a library that is nearly right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.system.errors import RunError


@dataclass(frozen=True)
class Mend:
    file: str
    old: str
    new: str


def apply(folder: Path, changes: Sequence[Mend]) -> None:
    """Make the changes in an unpacked source.

    Raises:
        RunError: a file is missing, or does not hold the expected text exactly once.
    """
    for change in changes:
        path = folder / change.file
        if not path.is_file():
            raise RunError(f"Horovod's source has no {change.file}: this is not the release that hvdtrain can mend")
        text = path.read_text()
        count = text.count(change.old)
        if count != 1:
            first = change.old.strip().splitlines()[0]
            raise RunError(f"Horovod's {change.file}: expected {first!r} once, found it {count} times")
        path.write_text(text.replace(change.old, change.new))
