"""Files of recipes and programs that leave a marker if they are run."""

from __future__ import annotations

from pathlib import Path

MARK = "import pathlib\npathlib.Path({mark!r}).touch()\n"


def write_marked_files(folder: Path, files: dict[str, str]) -> Path:
    """Write a case's files, each of which makes the file `ran` in the folder when it is run; return its `mine.py`."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MARK.format(mark=str(folder / "ran")) + text)
    return folder / "mine.py"
