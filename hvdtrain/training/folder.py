"""The run folder: made or found at the start, cleaned of what a killed process left, and checked before checkpoints."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from hvdtrain.comm import collectives
from hvdtrain.elastic.membership import Membership
from hvdtrain.ledger.reader import find_segments
from hvdtrain.ledger.writer import Ledger
from hvdtrain.system.errors import UserError
from hvdtrain.training import checkpoint
from hvdtrain.training.lease import FolderLost, Lease
from hvdtrain.training.options import CheckpointOptions
from hvdtrain.training.reporter import Reporter

# What a run leaves while it writes, if it is killed.
LEFTOVER_PATTERNS = (".*.new", "*/.*.new", "checkpoints/.*.new/.*.new", "ledger/.segment-*.csv.*", ".owner.json.*")


@contextlib.contextmanager
def choose_run_folder(options: CheckpointOptions, name: str, membership: Membership) -> Iterator[Path]:
    """Yield the run folder, the same on all ranks, before it is opened: a recipe knows it when it makes a model.

    One that no option names is made, so that no other run can have it, and removed if it is empty at the end.
    """
    made: list[Path] = []

    def choose() -> Path:
        if options.run_dir is not None:
            return options.run_dir
        folder = Path("runs") / f"{name.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            made.append(make_unused_folder(folder))
        except OSError as error:
            raise UserError(f"run folder {folder} cannot be written: {error.strerror}") from error
        return made[0]

    def remove_if_empty() -> None:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds a run
                folder.rmdir()
                folder.parent.rmdir()

    try:
        chosen = membership.agree_on_run_folder(choose)
        if made and chosen.absolute() != made[0].absolute():  # another member of an elastic run was faster
            remove_if_empty()
        yield chosen
    finally:
        remove_if_empty()


def open_run_folder(folder: Path, lease: Lease, *, resume: bool) -> Path:
    """Make or find rank 0's run folder, become its owner and clean it; every rank learns its path.

    Raises UserError on all ranks if the folder has another owner, holds another run or cannot be written.
    """

    def open_folder() -> str:
        try:
            if not resume:
                refuse_used_folder(folder, lease)
                with contextlib.suppress(FileExistsError):
                    folder.mkdir(parents=True)
            else:
                folder.mkdir(parents=True, exist_ok=True)
            lease.acquire(folder, wait=resume)
            if not resume:
                refuse_used_folder(folder, lease)  # another run may have been faster
            elif checkpoint.list_checkpoints(folder) and not (folder / "config.json").exists():
                raise UserError(
                    f"run folder {folder} has checkpoints and no config.json, which holds the options that they were "
                    "trained with: restore it, or choose another --run-dir"
                )
            (folder / "checkpoints").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"run folder {folder} cannot be written: {error.strerror}") from error
        remove_leftovers(folder)
        return str(folder)

    return Path(collectives.on_root("run_folder", open_folder))


def take_over_folder(folder: Path, lease: Lease) -> Path:
    """Make rank 0 of a new generation the owner of the run folder. Raises RunError on all ranks."""

    def take_over_on_root() -> None:
        before = lease.is_held
        lease.take_over(folder)
        if not before:
            remove_leftovers(folder)

    collectives.on_root("run_folder.hand_on", take_over_on_root)
    return folder


def make_unused_folder(folder: Path) -> Path:
    """Make a folder, with a number after its name if it exists already; return it."""
    numbers = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    for path in itertools.chain([folder], numbers):
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError  # there is always another number


def refuse_used_folder(folder: Path, lease: Lease) -> None:
    """Raise UserError if a folder holds a run."""
    files = ("config.json", "metrics.jsonl", "summary.json")
    if (
        any((folder / name).exists() for name in files)
        or checkpoint.list_checkpoints(folder)
        or find_segments(folder / "ledger")
    ):
        lease.refuse_owned_folder(folder)
        raise UserError(
            f"run folder {folder} already holds a run: add --resume to continue it, or choose another --run-dir"
        )


def remove_leftovers(folder: Path) -> None:
    """Remove the files and folders that a killed process was about to rename."""
    for pattern in LEFTOVER_PATTERNS:
        for path in list(folder.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()


def check_folder_ownership(folder: Path, lease: Lease, report: Reporter, ledger: Ledger) -> None:
    """Raise FolderLost if the run folder, or a file in it, is not this run's any more; rank 0, before a checkpoint.

    Raises OSError if that cannot be determined now.
    """
    lease.check_ownership(now=True)
    in_place = {
        "config.json": path_exists(folder / "config.json"),
        "checkpoints": path_exists(folder / "checkpoints"),
        "metrics.jsonl": report.rows.is_in_place(),
        "the ledger's last segment": ledger.is_segment_in_place(),
    }
    for what, there in in_place.items():
        if not there:
            raise FolderLost(f"{what} in run folder {folder} was deleted or replaced during the run")


def path_exists(path: Path) -> bool:
    """Return whether a path exists. Raises OSError if that cannot be determined."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
