"""Checkpoints: RUN_DIR/checkpoints/step-N/{state, meta.json}, whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hvdtrain.errors import UserError
from hvdtrain.files import sync_folder, write_atomically, write_json

FORMAT = "hvdtrain checkpoint 1"


@dataclass
class Position:
    """Where in a run a state belongs: after `step` steps, with example `offset` of epoch `epoch`'s order to come."""

    step: int = 0
    epoch: int = 0
    offset: int = 0
    samples: int = 0
    epoch_loss_sum: float = 0.0  # over the epoch's examples so far, without skipped steps
    epoch_loss_count: int = 0
    train_loss: float = 0.0  # mean over the current, or else the last, epoch's examples so far
    skipped_nonfinite: int = 0
    eval: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    evaluated: int = 0  # the step after which that was
    saved: int = 0  # the step of the last checkpoint
    examples: int = 0  # of an epoch; with the seed, what the order is drawn from
    seed: int = 0

    def take_order(self, examples: int, seed: int) -> None:
        """Let the order be that of `examples` examples and a seed.

        Raises UserError in mid-epoch if it was begun in another order: some examples would come twice, others never.
        """
        if self.offset and self.examples == 0 and self.offset < examples:  # of an hvdtrain that did not write it
            self.examples, self.seed = examples, seed
        if self.offset and (examples, seed) != (self.examples, self.seed):
            begun = f"{self.examples or 'more'} examples" + (f" by --seed {self.seed}" if self.seed != seed else "")
            raise UserError(
                f"the checkpoint is at example {self.offset} of an epoch of {begun}, and the training data is now "
                f"{examples} examples" + (f" by --seed {seed}" if self.seed != seed else "") + ": resume with the same"
            )
        self.examples, self.seed = examples, seed

    def advance(self, count: int, loss_sum: float | None) -> None:
        """A step consumed `count` of the epoch's examples; their losses add up to `loss_sum`, None if skipped."""
        self.step += 1
        self.samples += count
        self.offset += count
        if loss_sum is not None:
            self.epoch_loss_sum += loss_sum
            self.epoch_loss_count += count
            self.train_loss = self.epoch_loss_sum / self.epoch_loss_count
        if self.offset == self.examples:
            self.epoch, self.offset, self.epoch_loss_sum, self.epoch_loss_count = self.epoch + 1, 0, 0.0, 0


def save(run_dir: Path, position: Position, state: bytes, recipe: str) -> Path:
    """Write a checkpoint and return its folder. An existing one of the same step is replaced."""
    folder = run_dir / "checkpoints" / f"step-{position.step}"
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    meta = {
        "format": FORMAT,
        "recipe": recipe,
        "position": asdict(position),
        "state_bytes": len(state),
        "state_sha256": hashlib.sha256(state).hexdigest(),
    }
    try:
        write_atomically(beside / "state", state)
        write_json(beside / "meta.json", meta)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)  # a full disk needs the room
        raise
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    sync_folder(folder.parent)
    return folder


def listed(run_dir: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def prune(run_dir: Path, keep: int, best: tuple[str, Literal["min", "max"]]) -> None:
    """Remove all but the last `keep` checkpoints and the best; `checkpoints/best` is a link to that one.

    Best is told only of checkpoints that were evaluated themselves.
    """
    folders = listed(run_dir)
    metric, direction = best
    scored = {path: value for path in folders if (value := _evaluated(path, metric)) is not None}
    chosen = (min if direction == "min" else max)(scored, key=scored.__getitem__) if scored else None
    if chosen is not None:
        link = run_dir / "checkpoints" / ".best.new"
        link.unlink(missing_ok=True)
        link.symlink_to(chosen.name)
        link.rename(run_dir / "checkpoints" / "best")
    for path in folders[:-keep]:
        if path != chosen:
            shutil.rmtree(path)


def load_newest(run_dir: Path, recipe: str) -> tuple[Position, bytes] | None:
    """The newest checkpoint, or None if there is none.

    Raises UserError if it is damaged or of another recipe, offering the one before.
    """
    folders = listed(run_dir)
    if not folders:
        return None
    newest = folders[-1]
    try:
        return _load(newest, recipe)
    except UserError as error:
        for path in reversed(folders[:-1]):
            try:
                _load(path, recipe)
            except UserError:
                continue
            newer = " ".join(os.fspath(other) for other in folders[folders.index(path) + 1 :])
            raise UserError(f"{error}; {path.name} is whole, to resume from it: rm -r {newer}") from None
        raise UserError(f"{error}; no earlier checkpoint is whole") from None


def _load(folder: Path, recipe: str) -> tuple[Position, bytes]:
    meta = _read_meta(folder)
    if meta["recipe"] != recipe:
        raise UserError(f"{folder} is a checkpoint of recipe {meta['recipe']!r}, not of {recipe!r}")
    try:
        state = (folder / "state").read_bytes()
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    if len(state) != meta["state_bytes"]:
        raise UserError(f"{folder} is truncated: state has {len(state)} of {meta['state_bytes']} bytes")
    if hashlib.sha256(state).hexdigest() != meta["state_sha256"]:
        raise UserError(f"{folder} is damaged: the checksum of its state is wrong")
    return Position(**meta["position"]), state


def _evaluated(folder: Path, metric: str) -> float | None:
    """The metric that this checkpoint was evaluated to; None for none, NaN or a folder that cannot be read."""
    try:
        position = _read_meta(folder)["position"]
    except UserError:
        return None
    value = position["eval"].get(metric) if position.get("evaluated") == position["step"] else None
    return None if value is None or math.isnan(value) else float(value)


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no checkpoint of hvdtrain: its meta.json cannot be read") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{folder} is no checkpoint of this hvdtrain: expected format {FORMAT!r}")
    return meta
