"""Reading metrics.jsonl and the ledger back when a run is resumed: which rows stay, and which are missing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.ledger.writer import numbered, read_segment
from hvdtrain.system.errors import UserError
from hvdtrain.system.files import write_atomically


@dataclass
class Cut:
    """What became of the lines of metrics.jsonl."""

    kept: int = 0  # rows
    last: int = 0  # step of the last of them
    later: int = 0  # rows of steps after the one that is resumed from, removed
    damaged: int = 0  # lines that are not rows in order, or have no end, removed

    def describe(self, step: int, expected: int | None) -> tuple[str, bool]:
        """What was removed and what is missing, if anything, in one line; and whether something is missing.

        expected: rows that were written up to `step`, None if that is unknown.
        """
        parts = []
        if self.later:
            parts.append(f"{self.later} row{'s' * (self.later > 1)} after step {step} removed")
        if self.damaged:
            parts.append(f"{self.damaged} damaged line{'s' * (self.damaged > 1)} removed")
        missing = expected is not None and self.kept != expected
        if missing:
            parts.append(f"{self.kept} of {expected} rows up to step {step} are there, the last of step {self.last}")
        return "; ".join(parts), missing


def cut_rows(path: Path, last_step: int) -> Cut:
    """Keep the rows up to a step, in order; remove those of later steps, and lines that are not rows.

    At the end of the file that is done in place, for which a full disk has room. Raises OSError.
    """
    cut, size, in_place, kept_lines = Cut(), 0, True, list[bytes]()
    if not path.exists():
        return cut
    with path.open("rb") as file:
        for line in file:
            step = _step_of(line)
            if step is None or (step <= cut.last and step <= last_step):
                cut.damaged += 1
            elif step > last_step:
                cut.later += 1
            else:
                in_place = in_place and not (cut.damaged or cut.later)
                cut.kept, cut.last, size = cut.kept + 1, step, size + len(line)
                kept_lines.append(line)
    if not (cut.damaged or cut.later):
        return cut
    if in_place:
        with path.open("rb+") as file:
            file.truncate(size)
    else:
        write_atomically(path, b"".join(kept_lines))
    return cut


def find_ledger_gap(folder: Path, step: int) -> str | None:
    """That the rows of the last steps up to `step` are missing in a run's ledger, in one line; None if they are there.

    `hvdtrain ledger verify` finds what is missing before them.
    """
    for path in reversed(numbered(folder).values()):
        try:
            segment = read_segment(path)
        except UserError as error:
            return str(error)
        if segment.first_step <= step:
            last = max((row.step for row in segment.rows if row.step <= step), default=segment.first_step - 1)
            missing = f"its rows after step {last} are missing, up to step {step}, that of the checkpoint"
            return f"{path}: {missing}" if last < step else None
    return None


def _step_of(line: bytes) -> int | None:
    """The step of a row, None for a line that is not a whole row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    whole = line.startswith(b"{") and line.endswith(b"}\n") and b"\r" not in line
    return step if whole and isinstance(step, int) and not isinstance(step, bool) and step > 0 else None
