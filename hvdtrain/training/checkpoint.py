"""Checkpoints: RUN_DIR/checkpoints/step-N/{state, meta.json}, complete or absent.

meta.json holds the size and SHA-256 of every other file of the checkpoint and its own: no byte of a checkpoint can
change unnoticed. What is read back is parsed strictly: anything unexpected counts as damage.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from hvdtrain.system.errors import UserError
from hvdtrain.system.files import sync_folder, write_atomically
from hvdtrain.system.strict_json import check_count, check_entries, encode_with_digest, parse_strict_json
from hvdtrain.training.position import FIELDS_SINCE_FORMAT_1, FIELDS_SINCE_FORMAT_2, Position, parse_position

CHECKPOINT_FORMAT = "hvdtrain checkpoint 2"
# Read as well: meta.json has no checksum of its own, and lacks fields of Position that came later.
CHECKPOINT_FORMAT_1 = "hvdtrain checkpoint 1"
FOLDER_NAME_PATTERN = re.compile(r"step-(0|[1-9][0-9]{0,17})")


class DamagedCheckpoint(UserError):
    """A checkpoint that is not as this hvdtrain, or an older one, wrote it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read back and is not damaged."""

    folder: Path
    position: Position
    state: bytes
    damage_reports: list[str] = field(default_factory=list)  # on newer ones, which were skipped


@dataclass(frozen=True)
class CheckpointMeta:
    """What meta.json holds."""

    recipe: str
    position: Position
    state_bytes: int
    state_sha256: str

    def encode(self) -> bytes:
        """Return the bytes of meta.json: indented JSON that holds the SHA-256 of itself without that entry."""
        return encode_with_digest(
            {
                "format": CHECKPOINT_FORMAT,
                "recipe": self.recipe,
                "position": asdict(self.position),
                "files": {"state": {"bytes": self.state_bytes, "sha256": self.state_sha256}},
            }
        )


def write_checkpoint(
    run_dir: Path, position: Position, state: bytes, recipe: str, confirm: Callable[[], None] = lambda: None
) -> Path:
    """Write a checkpoint and return its folder. An existing one of the same step is replaced.

    Args:
        run_dir: the run folder.
        position: where the state belongs.
        state: what the framework's step returned.
        recipe: the recipe's name.
        confirm: called when all is written, before the folder is renamed; what it raises removes the checkpoint.
    """
    folder = run_dir / "checkpoints" / f"step-{position.step}"
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write_atomically(temporary / "state", state)
        meta = CheckpointMeta(recipe, position, len(state), hashlib.sha256(state).hexdigest())
        write_atomically(temporary / "meta.json", meta.encode())
        confirm()
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk its space is needed
        raise
    sync_folder(folder.parent)
    return folder


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first."""
    found = [
        path
        for path in (run_dir / "checkpoints").glob("step-*")
        if FOLDER_NAME_PATTERN.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(found, key=step_from_folder)


def step_from_folder(folder: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


@dataclass(frozen=True)
class BestCheckpoint:
    """The best of the checkpoints at whose step there was an evaluation."""

    step: int
    metric: str
    value: float


def find_best_checkpoint(run_dir: Path, best: tuple[str, Literal["min", "max"]]) -> BestCheckpoint | None:
    """Return the checkpoint with the best value of a metric, the earliest of several; None if none was evaluated.

    Args:
        run_dir: the run folder.
        best: the metric, and whether the smallest or the largest value of it is best.
    """
    metric, direction = best
    scored = {path: value for path in list_checkpoints(run_dir) if (value := _read_metric(path, metric)) is not None}
    if not scored:
        return None
    chosen = (min if direction == "min" else max)(scored, key=scored.__getitem__)
    return BestCheckpoint(step_from_folder(chosen), metric, scored[chosen])


def prune_checkpoints(run_dir: Path, keep: int, best: tuple[str, Literal["min", "max"]]) -> BestCheckpoint | None:
    """Remove all but the last `keep` checkpoints and the best, which `checkpoints/best` links to; return the best."""
    folders, found = list_checkpoints(run_dir), find_best_checkpoint(run_dir, best)
    chosen = run_dir / "checkpoints" / f"step-{found.step}" if found is not None else None
    if chosen is not None:
        link = run_dir / "checkpoints" / ".best.new"
        link.unlink(missing_ok=True)
        link.symlink_to(chosen.name)
        link.rename(run_dir / "checkpoints" / "best")
    for path in folders[:-keep]:
        if path != chosen:
            shutil.rmtree(path)
    return found


def read_newest_checkpoint(run_dir: Path, recipe: str, *, unattended: bool = False) -> Checkpoint | None:
    """Return the newest checkpoint, or None if there is none.

    Args:
        run_dir: the run folder.
        recipe: the recipe's name.
        unattended: if the newest is damaged, take the newest that is not, as no user can choose one.

    Raises:
        UserError: the checkpoint is damaged, and which older one is not; or it is of another recipe or format.
    """
    folders = list_checkpoints(run_dir)
    damaged: list[DamagedCheckpoint] = []
    for i in reversed(range(len(folders))):
        try:
            found = read_checkpoint(folders[i], recipe)
        except DamagedCheckpoint as error:
            damaged.append(error)
            continue
        except UserError as error:
            if not damaged:
                raise
            damaged.append(DamagedCheckpoint(str(error)))
            continue
        if damaged and not unattended:
            newer = " ".join(os.fspath(other) for other in folders[i + 1 :])
            raise UserError(f"{damaged[0]}; {folders[i].name} is not damaged; to resume from it: rm -r {newer}")
        return Checkpoint(found.folder, found.position, found.state, [str(error) for error in damaged])
    if damaged:
        raise UserError(f"{damaged[0]}; no earlier checkpoint is intact")
    return None


def read_checkpoint(folder: Path, recipe: str) -> Checkpoint:
    """Return a checkpoint. Raises UserError if it is damaged, or of another recipe or format."""
    meta = _read_meta(folder)
    if meta.recipe != recipe:
        raise UserError(f"{folder} is a checkpoint of recipe {meta.recipe!r}, not of {recipe!r}")
    try:
        state = (folder / "state").read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{folder} is damaged: its state cannot be read: {error.strerror}") from error
    if len(state) != meta.state_bytes:
        raise DamagedCheckpoint(f"{folder} is damaged: its state has {len(state)} of {meta.state_bytes} bytes")
    if hashlib.sha256(state).hexdigest() != meta.state_sha256:
        raise DamagedCheckpoint(f"{folder} is damaged: the checksum of its state is wrong")
    return Checkpoint(folder, meta.position, state)


def _read_metric(folder: Path, metric: str) -> float | None:
    """Return the metric of this checkpoint's evaluation; None if there was none, or it is not a finite number."""
    try:
        position = _read_meta(folder).position
    except UserError:
        return None
    value = position.all_metrics().get(metric, math.nan) if position.evaluated == position.step else math.nan
    return None if isinstance(value, list) or not math.isfinite(value) else value


def _read_meta(folder: Path) -> CheckpointMeta:
    """Read a checkpoint's meta.json. Raises DamagedCheckpoint."""
    try:
        data = (folder / "meta.json").read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{folder} is damaged: its meta.json cannot be read: {error.strerror}") from error
    try:
        return _parse_meta(data, step_from_folder(folder))
    except ValueError as error:
        what = "of another hvdtrain" if isinstance(error, UnknownCheckpointFormat) else "damaged"
        raise DamagedCheckpoint(f"{folder} is {what}: its meta.json {error}") from None


class UnknownCheckpointFormat(ValueError):
    """A meta.json of another hvdtrain, or with a damaged format."""


def _parse_meta(data: bytes, step: int) -> CheckpointMeta:
    """Parse meta.json of a checkpoint after `step`. Raises ValueError with what is wrong."""
    try:
        content = parse_strict_json(data)
    except ValueError:
        try:
            content = json.loads(data)  # the first format has NaN
        except (ValueError, RecursionError):
            raise ValueError("is not valid JSON") from None
    if not isinstance(content, dict):
        raise ValueError("is not an object")
    if content.get("format") == CHECKPOINT_FORMAT_1:
        files = {"state": {"bytes": content.pop("state_bytes", None), "sha256": content.pop("state_sha256", None)}}
        content["files"] = files
    elif content.get("format") == CHECKPOINT_FORMAT:
        content.pop("sha256", None)
        if encode_with_digest(content) != data:
            raise ValueError("has a wrong checksum")
    elif isinstance(content.get("format"), str) and content["format"].startswith("hvdtrain checkpoint "):
        raise UnknownCheckpointFormat(
            f"has the format {content['format']!r}; this hvdtrain reads {CHECKPOINT_FORMAT!r} and older"
        )
    else:
        raise ValueError(f"is not of the format {CHECKPOINT_FORMAT!r}")
    entries = check_entries(content, "", "format", "recipe", "position", "files")
    state = check_entries(
        check_entries(entries["files"], "files.", "state")["state"], "files.state.", "bytes", "sha256"
    )
    lenient = entries["format"] == CHECKPOINT_FORMAT_1
    allow_missing = FIELDS_SINCE_FORMAT_2 + (FIELDS_SINCE_FORMAT_1 if lenient else ())
    position = parse_position(entries["position"], allow_missing)
    if position.step != step:
        raise ValueError(f"is that of step {position.step}")
    if not isinstance(entries["recipe"], str) or not isinstance(state["sha256"], str):
        raise ValueError("has an entry of the wrong type")
    return CheckpointMeta(
        entries["recipe"], position, check_count(state["bytes"], "files.state.bytes"), state["sha256"]
    )
