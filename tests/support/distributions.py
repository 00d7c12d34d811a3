"""Distributions outside hvdtrain that bring components, as they lie in a folder on the path of Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def write_distribution(folder: Path, module: Path, entry_points: Mapping[str, str]) -> None:
    """Install a distribution of one module into a folder, which is then to be put on PYTHONPATH.

    Args:
        folder: where to.
        module: the module's file, which is copied.
        entry_points: the name of an object of the module for each `GROUP:NAME`.
    """
    (folder / module.name).write_text(module.read_text())
    about = folder / f"{module.stem}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.stem}\nVersion: 1.0\n")
    groups: dict[str, list[str]] = {}
    for place, name in entry_points.items():
        group, _, component = place.partition(":")
        groups.setdefault(group, []).append(f"{component} = {module.stem}:{name}\n")
    (about / "entry_points.txt").write_text("".join(f"[{group}]\n{''.join(lines)}" for group, lines in groups.items()))
