"""metrics.jsonl, which rank 0 appends to, and the last rows, which every rank remembers: it may become rank 0."""

from __future__ import annotations

from pathlib import Path

from hvdtrain.system.files import BufferedAppender
from hvdtrain.training.position import Position
from hvdtrain.training.rows import MetricsRow, cut_rows
from hvdtrain.training.terminal import Terminal

NUM_RECENT_ROWS = 20  # rows that every rank remembers


class RowFile:
    """The rows of a run.

    Attributes:
        recent: the last rows, of which those at the end may not be in the file.
        pending: how many rows rank 0 could not write.
    """

    def __init__(self, terminal: Terminal) -> None:
        """Hold no row yet; what is cut from an existing file, or missing in it, is printed on `terminal`."""
        self.recent: list[MetricsRow] = []
        self.pending = 0
        self._terminal = terminal
        self._file: BufferedAppender | None = None  # on rank 0

    def forget_after(self, step: int) -> None:
        """Forget the rows of steps that are undone."""
        self.recent = [row for row in self.recent if row.step <= step]

    def open(self, path: Path, last_step: int, expected: int | None) -> None:
        """Open the file, cut after `last_step`, on rank 0; rows before it that are missing are written again.

        Args:
            path: metrics.jsonl.
            last_step: the last step whose row stays.
            expected: how many rows the file should have then; None if that is unknown.
        """
        recent = list(self.recent)

        def prepare_row_file() -> bytes:
            found = cut_rows(path, last_step)
            missing = [row for row in recent if row.step > found.last_step]
            if missing:
                found.kept_rows, found.last_step = found.kept_rows + len(missing), missing[-1].step
            text, gap = found.describe_changes(last_step, expected)
            if gap:
                self._terminal.print_warning(f"metrics.jsonl: {text}")
            elif text:
                self._terminal.print_lines([f"metrics   {text}"])
            return b"".join(row.encode() for row in missing)

        self._file = BufferedAppender(path, prepare_row_file)
        self._file.flush()
        self.pending = len(recent) if self._file.error else 0

    def append(self, row: MetricsRow, position: Position) -> None:
        """Add a row, and count it in `position`."""
        self.recent = [*self.recent, row][-NUM_RECENT_ROWS - self.pending :]
        if position.rows is not None:
            position.rows += 1
        if self._file is not None:
            self._file.write(row.encode())
            self.pending = self.pending + 1 if self._file.error else 0

    def take_back_last(self, position: Position) -> MetricsRow | None:
        """Remove and return the row of the position's step, which is to be completed; None if it is not the last."""
        if not self.recent or self.recent[-1].step != position.step:
            return None
        position.rows = position.rows and position.rows - 1
        row = self.recent.pop()
        if self._file is not None:
            path = self._file.path
            self._file.close()
            self.open(path, position.step - 1, position.rows)
        return row

    @property
    def error(self) -> OSError | None:
        """Why rows wait in memory; None if all are written."""
        return self._file.error if self._file is not None else None

    def is_in_place(self) -> bool:
        """Return whether metrics.jsonl is still where it was opened."""
        return self._file is None or self._file.is_file_in_place()

    def sync_to_disk(self) -> None:
        """Write all rows, to survive the machine. Raises OSError if that is not possible now."""
        if self._file is not None:
            self._file.sync_to_disk()
            self.pending = 0

    def close(self) -> None:
        """Close the file; what waits in memory is kept in `recent`."""
        if self._file is not None:
            self._file.close()
            self._file = None
