"""Writing the ledger (hvdtrain.ledger.rows says what it is), so that no row is lost with the process that writes."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hvdtrain.ledger.made import MadeVersion
from hvdtrain.ledger.reader import find_segments
from hvdtrain.ledger.rows import (
    LEDGER_FORMAT,
    LedgerRow,
    format_order_line,
    format_ranges_line,
    format_shares_line,
    order_path,
)
from hvdtrain.recipe.given_order import GivenOrder, encode_file
from hvdtrain.recipe.ranges import Ranges, join_ranges
from hvdtrain.system.files import create_atomically, is_same_file

SEGMENT_RETRY_INTERVAL = 1.0  # seconds after which a segment that could not be written is begun again


@dataclass(frozen=True)
class LedgerState:
    """What a ledger knows, to be sent to another rank."""

    seed: int
    examples: int
    batch: int
    from_step: int
    rows: list[list[int]]
    shares: list[tuple[int, str]] = field(default_factory=list)
    lost: list[tuple[int, Ranges]] = field(default_factory=list)
    owed: list[tuple[int, Ranges]] = field(default_factory=list)


class Ledger:
    """A rank's knowledge of what the last steps consumed; one rank also writes it.

    Every rank appends the same rows, and keeps those since step `from_step`, up to which they are durable: any of them
    can continue to write after another one was lost.

    Attributes:
        durable_step: up to here this rank knows the rows to be on disk for good.
        shares: by the first step of each, how the batch is dealt to the ranks; "": evenly.
        lost: by the step after which it was lost, what was consumed and is owed from then on.
        owed: by the steps that were made of it, what was owed.
        made: by step, what a parameter server made its version of.
        service: how it makes them, for the header; "": there is none.
        orders: by epoch (from 1), what the recipe's sampler has given for those that rows are of, and for the present.
        error: why the last rows are in memory only; None if they are written.
    """

    def __init__(
        self, seed: int, examples: int, batch: int, from_step: int = 0, rows: Iterable[LedgerRow] = ()
    ) -> None:
        """Know the rows since a step.

        Args:
            seed: of the order of ids.
            examples: in an epoch.
            batch: examples in a step.
            from_step: after which the run starts or resumes.
            rows: since then.
        """
        self.seed, self.examples, self.batch = seed, examples, batch
        self.from_step, self.rows = from_step, list(rows)
        self.durable_step = from_step
        self.shares: dict[int, str] = {}
        self.lost: dict[int, Ranges] = {}
        self.owed: dict[int, Ranges] = {}
        self.made: dict[int, MadeVersion] = {}
        self.service = ""
        self.orders: dict[int, GivenOrder] = {}
        self.error: OSError | None = None
        self._failed_at = 0.0  # when writing last failed, by the monotonic clock
        self._folder: Path | None = None  # of the segments, if this rank writes
        self._file: int | None = None  # the segment that is written to
        self._path: Path | None = None  # its path

    @classmethod
    def from_state(cls, state: LedgerState, orders: Mapping[int, GivenOrder]) -> Ledger:
        """Return a ledger that knows what another rank's knew; `orders` are that rank's."""
        rows = [LedgerRow(*row) for row in state.rows]
        ledger = cls(state.seed, state.examples, state.batch, state.from_step, rows)
        ledger.orders, ledger.shares = dict(orders), dict(state.shares)
        ledger.lost, ledger.owed = dict(state.lost), dict(state.owed)
        return ledger

    def to_state(self) -> LedgerState:
        """Return all that it knows, but for the orders."""
        rows, shares = [list(row) for row in self.rows], list(self.shares.items())
        lost, owed = list(self.lost.items()), list(self.owed.items())
        return LedgerState(self.seed, self.examples, self.batch, self.from_step, rows, shares, lost, owed)

    def open_for_writing(self, folder: Path, *, at_first_row: bool = False) -> None:
        """Write from here on, to a new segment that begins with the rows in memory; `error` says if that fails.

        Args:
            folder: of the segments.
            at_first_row: begin the segment when there is a row, so that a run that makes no step leaves none.
        """
        self.close()
        self._folder = folder
        if self.rows or not at_first_row:
            self._begin_segment(folder)

    def _begin_segment(self, folder: Path) -> None:
        first = self.from_step + 1
        header = f"# {LEDGER_FORMAT} seed={self.seed} examples={self.examples} batch={self.batch} first_step={first}"
        before = [shares for step, shares in self.shares.items() if step <= first]
        header += f" shares={before[-1]}" if before and before[-1] else ""
        header += f" service={self.service}" if self.service else ""
        lines = [header, ",".join(LedgerRow._fields)]
        lines += [format_shares_line(step, shares) for step, shares in self.shares.items() if step > first]
        lines += [format_order_line(epoch, given.key) for epoch, given in self.orders.items()]
        lines += [format_ranges_line("lost", step, ranges) for step, ranges in self.lost.items()]
        lines += [format_ranges_line("owed", step, ranges) for step, ranges in self.owed.items()]
        lines += [version.format_line(step) for step, version in self.made.items()]
        lines += [",".join(map(str, row)) for row in self.rows]
        try:
            folder.mkdir(exist_ok=True)  # no parents: a run folder that was deleted is not made again
            for given in self.orders.values():
                self._keep_order(folder, given)
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
        """Leave this segment as it is: a later step begins another one, with all rows in memory."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file, self.error, self._failed_at = None, error, time.monotonic()

    @staticmethod
    def _keep_order(folder: Path, given: GivenOrder) -> None:
        """Write the file of an order, unless it is there; raises OSError."""
        path = order_path(folder, given.key)
        if not path.exists():
            with contextlib.suppress(FileExistsError):
                create_atomically(path, encode_file(given))

    def begin_epoch(self, epoch: int, given: GivenOrder | None) -> None:
        """Take what the recipe's sampler has given for an epoch (from 1) before its first row; None: nothing.

        If it cannot be written now, `error` says why, and it is written with a later row.
        """
        first = min([epoch, *(row.epoch for row in self.rows)])
        kept = {number: order for number, order in self.orders.items() if first <= number < epoch}
        is_new = given is not None and (epoch not in self.orders or self.orders[epoch].key != given.key)
        self.orders = kept if given is None else kept | {epoch: given}
        if self._folder is None or self._file is None or given is None or not is_new:
            return
        try:
            self._keep_order(self._folder, given)
            self._write_line(format_order_line(epoch, given.key))
        except OSError as error:
            self._abandon_segment(error)

    def set_shares(self, step: int, shares: str) -> None:
        """Record how the batch is dealt from a step on, after all earlier ones; "": evenly.

        If it cannot be written now, `error` says why, and it is written with a later row.
        """
        if shares == next(reversed(self.shares.values()), ""):
            return
        self.shares[step] = shares
        try:
            self._write_line(format_shares_line(step, shares))
        except OSError as error:
            self._abandon_segment(error)

    def record_lost(self, step: int, ranges: Ranges) -> None:
        """Record, before a segment is begun, that positions of the epoch's order were lost with a rank after a step."""
        self.lost[step] = join_ranges(self.lost.get(step, []), ranges)

    def record_owed(self, step: int, ranges: Ranges) -> None:
        """Record, before its row, that a step was made of positions that were owed."""
        self.owed[step] = ranges
        try:
            self._write_line(format_ranges_line("owed", step, ranges))
        except OSError as error:
            self._abandon_segment(error)

    def record_made(self, step: int, version: MadeVersion) -> None:
        """Record, before its row, what a step's version was made of."""
        self.made[step] = version
        try:
            self._write_line(version.format_line(step))
        except OSError as error:
            self._abandon_segment(error)

    def append_row(self, row: LedgerRow) -> None:
        """Add the row of a step that is done; on the rank that writes, it survives the process.

        If it cannot be written now, `error` says why, and it is written with a later one.
        """
        self.rows.append(row)
        if self._folder is None:
            return
        if self._file is None:
            if time.monotonic() - self._failed_at > SEGMENT_RETRY_INTERVAL:
                self._begin_segment(self._folder)
            return
        try:
            self._write_line(",".join(map(str, row)))
        except OSError as error:
            self._abandon_segment(error)

    def _write_line(self, line: str) -> None:
        data = f"{line}\n".encode()
        if self._file is not None and os.write(self._file, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def make_durable(self) -> None:
        """Make all rows survive the machine, on the rank that writes. Called before a checkpoint is saved.

        Raises:
            OSError: they cannot be written now.
        """
        if self._folder is not None:
            if self._file is None:
                self._begin_segment(self._folder)
            try:
                if self._file is not None:
                    os.fsync(self._file)
            except OSError as error:  # rows that were written may be lost
                self._abandon_segment(error)
            if self.error is not None:
                raise self.error
        if self.rows:
            self.durable_step = self.rows[-1].step

    def is_segment_in_place(self) -> bool:
        """Whether the segment that is written to, if there is one, is still at its path."""
        return self._file is None or self._path is None or is_same_file(self._path, os.fstat(self._file))

    def discard_rows(self, step: int) -> None:
        """Forget the rows up to a step: the rank that writes has published that they are durable."""
        if step > self.from_step:
            self.rows = [row for row in self.rows if row.step > step]
            self.from_step, self.durable_step = step, max(self.durable_step, step)
            self.lost = {after: ranges for after, ranges in self.lost.items() if after > step}
            self.owed = {of: ranges for of, ranges in self.owed.items() if of > step}
            self.made = {of: version for of, version in self.made.items() if of > step}
            past = [first for first in self.shares if first <= step + 1]
            for first in past[:-1]:  # the last one is that of the rows to come
                del self.shares[first]

    def roll_back(self, step: int) -> None:
        """Undo the rows after a step, after which all ranks continue."""
        undone = step < self.from_step or any(row.step > step for row in self.rows)
        self.rows = [row for row in self.rows if row.step <= step]
        self.shares = {first: shares for first, shares in self.shares.items() if first <= step}
        self.lost = {after: ranges for after, ranges in self.lost.items() if after <= step}
        self.owed = {of: ranges for of, ranges in self.owed.items() if of <= step}
        self.made = {of: version for of, version in self.made.items() if of <= step}
        self.from_step, self.durable_step = min(self.from_step, step), min(self.durable_step, step)
        if undone and self._folder is not None:
            self.open_for_writing(self._folder)

    def close(self) -> None:
        """Stop writing."""
        if self._file is not None:
            os.close(self._file)
        self._folder = self._file = self.error = None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
