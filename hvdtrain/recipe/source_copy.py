"""RUN_DIR/source/: the files of the recipe that a run trains, from which newcomers of an elastic run import it.

RUN_DIR/source/      the files of the last start, by their paths relative to the recipe's root folder
        source-1/    the files before the first edit that a resume met, source-2/ those before the second ...
"""

from __future__ import annotations

import itertools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.recipe.source import RecipeSource
from hvdtrain.system.files import sync_folder

SOURCE_FOLDER = "source"


def write_copy(run_dir: Path, source: RecipeSource) -> str | None:
    """Write the files of a recipe into a run folder, whole or not at all; an earlier copy that differs is kept.

    Returns:
        A line on what has changed since the earlier copy; None if nothing has, or there is none.

    Raises:
        OSError: it cannot be written.
    """
    target = run_dir / SOURCE_FOLDER
    earlier = read_files(target)
    if earlier == source.files:
        return None
    new = run_dir / f".{SOURCE_FOLDER}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)  # a recipe may hold secrets
    for name, data in source.files.items():
        path = new / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    for folder, _, _ in os.walk(new):
        sync_folder(Path(folder))
    note = None
    if earlier:
        numbered = (run_dir / f"{SOURCE_FOLDER}-{number}" for number in itertools.count(1))
        kept = next(path for path in numbered if not path.exists())
        target.rename(kept)
        names = [name for name in {**source.files, **earlier} if source.files.get(name) != earlier.get(name)]
        have = "has" if len(names) == 1 else "have"
        note = f"source    {', '.join(names)} {have} changed since this run began; what it began with is in {kept}"
    elif target.is_dir():
        target.rmdir()  # empty: nothing was written
    new.rename(target)
    sync_folder(run_dir)
    return note


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder by their relative paths; none if there is no such folder. Raises OSError."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@dataclass(frozen=True)
class RecipeCopy:
    """What another process needs to import the copy in a run folder as the original."""

    folder: str  # of the copy, absolute
    root: str  # these are those of RecipeSource
    main: str
    module: str
    relative: bool
    shown: str
    digest: str


def describe_copy(run_dir: Path, source: RecipeSource) -> RecipeCopy:
    """Describe the copy that `write_copy` has written."""
    return RecipeCopy(
        folder=str((run_dir / SOURCE_FOLDER).absolute()),
        root=str(source.root),
        main=source.main,
        module=source.module,
        relative=source.has_relative_imports,
        shown=str(source.display_path),
        digest=source.content_digest,
    )


def read_copy(copy: RecipeCopy) -> RecipeSource | None:
    """Return the source that a run's copy holds; None if it is not as described, or cannot be read from here."""
    try:
        files = read_files(Path(copy.folder))
    except OSError:
        return None
    if copy.main not in files:
        return None
    source = RecipeSource(
        root=Path(copy.root),
        main=copy.main,
        module=copy.module,
        has_relative_imports=copy.relative,
        files={copy.main: files.pop(copy.main), **files},
        display_path=Path(copy.shown),
    )
    return source if source.content_digest == copy.digest else None
