"""Reading metrics.jsonl and the ledger back when a run is resumed: which rows stay, and which are missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hvdtrain.ledger.reader import find_segments, read_segment
from hvdtrain.recipe.metrics import MetricValue
from hvdtrain.system.errors import UserError
from hvdtrain.system.files import write_atomically
from hvdtrain.system.strict_json import encode_json
from hvdtrain.system.text import format_count


@dataclass(frozen=True)
class MetricsRow:
    """What a step has measured: a line of metrics.jsonl. Values of metrics may be NaN or infinite."""

    step: int
    epoch: int  # from 1
    samples: int  # that were consumed since the run began
    lr: float
    samples_per_second: float  # since the last row
    comm_seconds: float  # that a step has waited for communication, mean since the last row
    train: Mapping[str, MetricValue]  # loss and metrics since the last row; what this step's update reports
    eval: Mapping[str, MetricValue] = field(default_factory=dict)  # if there was an evaluation after this step
    evals: Mapping[str, Mapping[str, MetricValue]] = field(default_factory=dict)  # of each set but the first
    gpu: Mapping[str, float | str] = field(default_factory=dict)  # of rank 0's GPU, as it is: GpuReading.columns

    def encode(self) -> bytes:
        """Return the line; numbers that are not finite are null in it."""
        values = {name: getattr(self, name) for name in ("step", "epoch", "samples", "lr")}
        values |= {"samples_per_second": self.samples_per_second, "comm_seconds": self.comm_seconds, **self.train}
        for prefix, metrics in {"eval": self.eval, **self.evals}.items():
            values |= {f"{prefix}_{name}": value for name, value in metrics.items()}
        values |= {f"gpu_{name}": value for name, value in self.gpu.items()}
        return f"{encode_json(values)}\n".encode()


def rows_to_json(rows: Sequence[MetricsRow]) -> list[Any]:
    """Return rows as plain data, for another rank."""
    return [asdict(row) for row in rows]


def rows_from_json(data: Sequence[Any]) -> list[MetricsRow]:
    """Return the rows that another rank's `rows_to_json` was called on."""
    return [MetricsRow(**row) for row in data]


@dataclass
class RowCutResult:
    """What was kept of metrics.jsonl, and what was removed."""

    kept_rows: int = 0  # rows
    last_step: int = 0  # step of the last of them
    later_rows: int = 0  # rows of steps after the one that is resumed from, removed
    damaged_lines: int = 0  # lines that are not rows in order, or have no end, removed

    def describe_changes(self, step: int, expected: int | None) -> tuple[str, bool]:
        """Return what was removed and what is missing, in one line, and whether something is missing.

        expected: rows that were written up to `step`, None if that is unknown.
        """
        parts = []
        if self.later_rows:
            parts.append(f"{format_count(self.later_rows, 'row')} after step {step} removed")
        if self.damaged_lines:
            parts.append(f"{format_count(self.damaged_lines, 'damaged line')} removed")
        missing = expected is not None and self.kept_rows != expected
        if missing:
            parts.append(
                f"{self.kept_rows} of {expected} rows up to step {step} are there, the last of step {self.last_step}"
            )
        return "; ".join(parts), missing


def cut_rows(path: Path, last_step: int) -> RowCutResult:
    """Keep the rows up to a step, in order; remove those of later steps, and lines that are not rows.

    At the end of the file that is done in place, for which a full disk has room. Raises OSError.
    """
    cut, size, in_place, kept_lines = RowCutResult(), 0, True, list[bytes]()
    if not path.exists():
        return cut
    with path.open("rb") as file:
        for line in file:
            step = _parse_row_step(line)
            if step is None or (step <= cut.last_step and step <= last_step):
                cut.damaged_lines += 1
            elif step > last_step:
                cut.later_rows += 1
            else:
                in_place = in_place and not (cut.damaged_lines or cut.later_rows)
                cut.kept_rows, cut.last_step, size = cut.kept_rows + 1, step, size + len(line)
                kept_lines.append(line)
    if not (cut.damaged_lines or cut.later_rows):
        return cut
    if in_place:
        with path.open("rb+") as file:
            file.truncate(size)
    else:
        write_atomically(path, b"".join(kept_lines))
    return cut


def find_ledger_gap(folder: Path, step: int) -> str | None:
    """Return a line if the last rows up to `step` are missing in a run's ledger; None if they are not.

    `hvdtrain ledger verify` finds what is missing before them.
    """
    for path in reversed(find_segments(folder).values()):
        try:
            segment = read_segment(path)
        except UserError as error:
            return str(error)
        if segment.first_step <= step:
            last = max((row.step for row in segment.rows if row.step <= step), default=segment.first_step - 1)
            missing = f"its rows after step {last} are missing, up to step {step}, that of the checkpoint"
            return f"{path}: {missing}" if last < step else None
    return None


def _parse_row_step(line: bytes) -> int | None:
    """Return the step of a row, None for a line that is not a complete row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    whole = line.startswith(b"{") and line.endswith(b"}\n") and b"\r" not in line
    return step if whole and isinstance(step, int) and not isinstance(step, bool) and step > 0 else None
