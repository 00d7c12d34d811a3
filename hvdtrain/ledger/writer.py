"""The ledger: RUN_DIR/ledger/ says which example ids each step consumed, as ranges of the epoch's order and hashes.

It consists of segments, numbered in order; a writer begins a new one and never changes an old one. A segment that
begins after step k supersedes what earlier ones say of later steps: those steps were undone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hvdtrain.recipe import order
from hvdtrain.recipe.order import Ids
from hvdtrain.system.errors import UserError
from hvdtrain.system.files import create_atomically, is_same_file

LEDGER_FORMAT = f"hvdtrain ledger {order.ORDER_VERSION}"  # its number is that of the order that rows are ranges of
HEADER_PATTERN = re.compile(r"# hvdtrain ledger ([12]) seed=(\d+) examples=([1-9]\d*) batch=(\d+) first_step=(\d+)")
# 64-bit numbers at most, so that those who read them need not expect others.
ROW_PATTERN = re.compile(r"(\d{1,18}),(\d{1,18}),(\d{1,18}),(\d{1,18}),(\d{1,18})")
SEGMENT_RETRY_INTERVAL = 1.0  # seconds after which a segment that cannot be written is tried again
MAX_STEP_EXAMPLES = 1 << 21  # examples in a step: up to there the sum of their 32-bit hashes is exact in a float64


class LedgerRow(NamedTuple):
    """What a step consumed: ids that are neighbours in their epoch's order."""

    step: int  # from 1
    epoch: int  # from 1
    offset: int  # where in the epoch's order they begin
    fed: int  # how many ids the ranks really fed to the model, as they told each other
    hash_sum: int  # of the hashes of these ids, likewise


def hash_ids(ids: Ids) -> NDArray[np.uint64]:
    """32 bits for each id, as if drawn by lot: the upper half of splitmix64 (Steele et al., OOPSLA'14)."""
    mixed = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    upper: NDArray[np.uint64] = (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(32)
    return upper


def sum_id_hashes(ids: Ids) -> int:
    """The sum of the ids' hashes: the same in any order, and on any division among ranks."""
    return int(hash_ids(ids).sum())


class Ledger:
    """A rank's knowledge of what the last steps consumed; one rank also writes it.

    Every rank appends the same rows, and keeps those since step `from_step`, up to which they are surely on disk: any
    of them can go on writing where another was lost.
    """

    def __init__(
        self, seed: int, examples: int, batch: int, from_step: int = 0, rows: Iterable[LedgerRow] = ()
    ) -> None:
        """from_step: the step after which the run starts or resumes; `rows` are those since then."""
        self.seed, self.examples, self.batch = seed, examples, batch
        self.from_step, self.rows = from_step, list(rows)
        self.durable_step = from_step  # up to here this rank knows them to be on disk
        self.error: OSError | None = None  # why the last rows are in memory only
        self._failed_at = 0.0  # when that was, by the monotonic clock
        self._folder: Path | None = None
        self._file: int | None = None  # the segment that is written to
        self._path: Path | None = None  # its path

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Ledger:
        """A ledger that knows what the one with this state knew."""
        return cls(**{**state, "rows": [LedgerRow(*row) for row in state["rows"]]})

    def to_state(self) -> dict[str, Any]:
        """All that it knows, as plain data for JSON."""
        sizes = {"seed": self.seed, "examples": self.examples, "batch": self.batch}
        return {**sizes, "from_step": self.from_step, "rows": [list(row) for row in self.rows]}

    def open_for_writing(self, folder: Path, *, at_first_row: bool = False) -> None:
        """Write from here on, to a new segment that begins with the rows in memory; `error` says if it cannot be.

        at_first_row: begin it when there is a row, so that a run that makes no step leaves no segment.
        """
        self.close()
        self._folder = folder
        if self.rows or not at_first_row:
            self._begin_segment(folder)

    def _begin_segment(self, folder: Path) -> None:
        first = self.from_step + 1
        header = f"# {LEDGER_FORMAT} seed={self.seed} examples={self.examples} batch={self.batch} first_step={first}"
        lines = [header, ",".join(LedgerRow._fields), *(",".join(map(str, row)) for row in self.rows)]
        try:
            folder.mkdir(exist_ok=True)  # no parents: a run folder that was deleted is not made again
            while True:
                path = folder / f"segment-{max(find_segments(folder), default=0) + 1:06}.csv"
                try:
                    create_atomically(path, ("\n".join(lines) + "\n").encode())
                    break
                except FileExistsError:  # another writer was faster
                    continue
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            self._path, self.error = path, None
        except OSError as error:
            self._abandon_segment(error)

    def _abandon_segment(self, error: OSError) -> None:
        """Leave this segment as it is: a later step tries a new one, with all that is in memory."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file, self.error, self._failed_at = None, error, time.monotonic()

    def append_row(self, row: LedgerRow) -> None:
        """A step is done. What is written survives the process; `durable` makes it survive the machine.

        If it cannot be written now, `error` says why, and the row is written with a later one.
        """
        self.rows.append(row)
        if self._folder is None:
            return
        if self._file is None:
            if time.monotonic() - self._failed_at > SEGMENT_RETRY_INTERVAL:
                self._begin_segment(self._folder)
            return
        line = b"%d,%d,%d,%d,%d\n" % row
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._abandon_segment(error)

    def make_durable(self) -> None:
        """Before a checkpoint is saved, on the rank that writes: all rows survive the machine.

        Raises OSError if they cannot be written now.
        """
        if self._folder is not None:
            if self._file is None:
                self._begin_segment(self._folder)
            try:
                if self._file is not None:
                    os.fsync(self._file)
            except OSError as error:  # rows may be lost that were written
                self._abandon_segment(error)
            if self.error is not None:
                raise self.error
        if self.rows:
            self.durable_step = self.rows[-1].step

    def is_segment_in_place(self) -> bool:
        """Whether the segment that is written to, if there is one, is still where it was made."""
        return self._file is None or self._path is None or is_same_file(self._path, os.fstat(self._file))

    def discard_rows(self, step: int) -> None:
        """The rank that writes has told the others its `saved`: rows up to there need not be kept in memory."""
        if step > self.from_step:
            self.rows = [row for row in self.rows if row.step > step]
            self.from_step, self.durable_step = step, max(self.durable_step, step)

    def roll_back(self, step: int) -> None:
        """All ranks go on after this step: later ones are undone."""
        undone = step < self.from_step or any(row.step > step for row in self.rows)
        self.rows = [row for row in self.rows if row.step <= step]
        self.from_step, self.durable_step = min(self.from_step, step), min(self.durable_step, step)
        if undone and self._folder is not None:
            self.open_for_writing(self._folder)

    def close(self) -> None:
        """Write no longer."""
        if self._file is not None:
            os.close(self._file)
        self._folder = self._file = self.error = None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Segment:
    """What one writer wrote."""

    name: str
    seed: int
    examples: int
    batch: int
    first_step: int
    order_version: int  # version
    rows: list[LedgerRow]
    invalid_lines: list[int]  # numbers of lines that are no rows


def find_segments(folder: Path) -> dict[int, Path]:
    """The segments' files by their numbers, in order."""
    found = {int(path.stem[8:]): path for path in folder.glob("segment-*.csv") if path.stem[8:].isdecimal()}
    return dict(sorted(found.items()))


def read_segment(path: Path) -> Segment:
    """Read a segment but for a torn last line, left by a process killed while it wrote. Raises UserError."""
    try:
        lines = path.read_bytes().decode("ascii", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    header = HEADER_PATTERN.fullmatch(lines[0])
    # What stands behind the last end of a line is torn, or nothing.
    if header is None or len(lines) < 3 or lines[1] != ",".join(LedgerRow._fields):
        raise UserError(
            f"{path} is no segment of a ledger of this hvdtrain: expected a header of format {LEDGER_FORMAT!r}"
        )
    version, seed, examples, batch, first_step = map(int, header.groups())
    rows, unreadable = [], []
    for number, line in enumerate(lines[2:-1], start=3):
        if found := ROW_PATTERN.fullmatch(line):
            rows.append(LedgerRow(*map(int, found.groups())))
        else:
            unreadable.append(number)
    return Segment(path.name, seed, examples, batch, first_step, version, rows, unreadable)
