"""What rank 0 tells: the terminal, metrics.jsonl, TensorBoard, summary.json."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.ledger.writer import Ledger
from hvdtrain.system import messages, streams
from hvdtrain.system.files import DISK_SPACE_ERRORS, BufferedAppender, BufferedDocument, write_error_text, write_json
from hvdtrain.system.progress import ProgressBar
from hvdtrain.system.strict_json import encode_json
from hvdtrain.training.checkpoint import Position
from hvdtrain.training.event_writer import MISSING_TENSORBOARD, EventWriter
from hvdtrain.training.options import ReportOptions
from hvdtrain.training.rows import cut_rows

NUM_RECENT_ROWS = 20  # rows that every rank remembers


@dataclass(frozen=True)
class StepRates:
    """How fast steps were."""

    samples_per_second: float
    step_seconds_median: float
    comm_seconds_median: float  # waited for communication


class Reporter:
    """Rank 0's report of a run. Other ranks only remember the last rows: one of them may become rank 0."""

    def __init__(self, options: ReportOptions) -> None:
        self.quiet, self.log_every = options.quiet, options.log_every
        self.active = self.prints_output = False
        self.total_steps = 0
        self.run_dir = Path()
        self.step_seconds: list[float] = []
        self.comm_seconds: list[float] = []
        self.train_seconds = 0.0
        self.train_samples = 0
        self._steps_since_row: list[tuple[int, float, float]] = []  # (examples, seconds, waited) since the last row
        self._last_row: dict[str, float] = {}  # of the last step
        self.recent_rows: list[dict[str, float | None]] = []  # rows, the last of which may not be in the file
        self.pending_rows = 0  # rows that rank 0 could not write
        self._position = Position()  # of the last step; its rows are counted here
        self._write_error: OSError | None = None  # why rows wait, as people were told
        self._advice_file = BufferedDocument(Path("advisor.json"))
        self._row_due = False
        self._missing_reported = False  # that TensorBoard is not installed
        self._last_progress_time = 0.0
        self._progress_bar: ProgressBar | None = None

    def open_files(self, run_dir: Path, steps: int, at: Position, *, active: bool) -> None:
        """Begin, or continue after a step; `active` on rank 0."""
        self.close()
        self.run_dir, self.total_steps, self.active, self._position = run_dir, steps, active, at
        self._advice_file.path = run_dir / "advisor.json"
        self.prints_output = active and not self.quiet
        self.recent_rows = [row for row in self.recent_rows if int(row["step"] or 0) <= at.step]
        if not active:
            return
        self._open_row_file(at.step)
        self._event_writer = EventWriter(run_dir / "tensorboard")
        if MISSING_TENSORBOARD and not self._missing_reported:
            self._missing_reported = True
            self.print_lines([f"no folder tensorboard: {MISSING_TENSORBOARD}"])
        if self.prints_output and sys.stderr.isatty() and not messages.is_launched():
            self._progress_bar = ProgressBar()
            self._progress_bar.update(completed=at.step, total=steps)

    def _open_row_file(self, last_step: int) -> None:
        """Open metrics.jsonl, cut after a step; what is missing before it is written again."""
        rows, path, recent = self._position.rows, self.run_dir / "metrics.jsonl", list(self.recent_rows)

        def prepare_row_file() -> bytes:
            found = cut_rows(path, last_step)
            missing = [row for row in recent if int(row["step"] or 0) > found.last_step]
            if missing:
                found.kept_rows, found.last_step = found.kept_rows + len(missing), int(missing[-1]["step"] or 0)
            text, gap = found.describe_changes(last_step, rows)
            if gap:
                self.print_warning(f"metrics.jsonl: {text}")
            elif text:
                self.print_lines([f"metrics   {text}"])
            return b"".join(encode_row(row) for row in missing)

        self._row_file = BufferedAppender(path, prepare_row_file)
        self._row_file.flush()
        self.pending_rows = len(recent) if self._row_file.error else 0

    def print_lines(self, lines: Sequence[str]) -> None:
        """Print lines of the run's report; under `hvdtrain launch`, which labels other lines with the rank, it does."""
        for line in lines if self.prints_output else ():
            if self._progress_bar is not None:
                self._progress_bar.print_line(line)
            elif messages.is_launched():
                messages.send_message(messages.RankReport(0, line))
            else:
                print(line, flush=True)

    def print_warning(self, line: str) -> None:
        """Tell people of trouble, also with --quiet. On rank 0."""
        if self._progress_bar is not None:
            self._progress_bar.print_line(f"hvdtrain: warning: {line}")
        else:
            print(f"hvdtrain: warning: {line}", file=sys.stderr, flush=True)

    def report_write_errors(self, ledger: Ledger) -> None:
        """Report when rows begin to wait because a file cannot be written, and when all are written. Once a step."""
        errors = [("the ledger", ledger.error)]
        if self.active:
            errors += [("metrics.jsonl", self._row_file.error), ("tensorboard", self._event_writer.error)]
            errors += [("advisor.json", self._advice_file.error)]
        found = next(((what, error) for what, error in errors if error is not None), None)
        if found and self._write_error is None:
            self.print_warning(
                f"{write_error_text(found[0], self.run_dir, found[1])}; rows wait in memory, training goes on"
            )
        elif self._write_error is not None and not found:
            again = "has room" if self._write_error.errno in DISK_SPACE_ERRORS else "can be written"
            self.print_warning(f"{self.run_dir} {again} again: all rows are written")
        self._write_error = found[1] if found else None

    def write_graph(self, graph: bytes | None) -> None:
        if self.active and graph is not None:
            self._event_writer.add_graph(graph)

    def record_advice(self, advice: Mapping[str, object] | None) -> None:
        """What `--compression auto` measured and chose, for the run folder."""
        self._advice_file.hold(advice if self.active else None)

    def sync_rows(self) -> None:
        """Write the row of this step, if it is due, and all that waits, to survive the machine.

        Raises OSError if that is not possible now.
        """
        self.write_due_row()
        if self.active:
            with contextlib.suppress(OSError):  # these are not worth a checkpoint
                self._event_writer.sync_to_disk()
            self._row_file.sync_to_disk()
            self.pending_rows = 0

    def metrics_file_in_place(self) -> bool:
        """Whether metrics.jsonl is still where it was opened."""
        return not self.active or self._row_file.is_file_in_place()

    def record_step(
        self, at: Position, epoch: int, lr: float, values: dict[str, float], batch: int, seconds: float, waited: float
    ) -> None:
        """After a step of `batch` examples. epoch: from 1. values: loss, metrics and what the update reports."""
        self._position = at
        self.step_seconds.append(seconds)
        self.comm_seconds.append(waited)
        self.train_seconds += seconds
        self.train_samples += batch
        self._steps_since_row.append((batch, seconds, waited))
        rate = sum(b for b, _, _ in self._steps_since_row) / sum(s for _, s, _ in self._steps_since_row)
        self._last_row = {
            "step": at.step,
            "epoch": epoch,
            "samples": at.samples,
            "lr": lr,
            "samples_per_second": rate,
            "comm_seconds": statistics.fmean(w for _, _, w in self._steps_since_row),
            **values,
        }
        self._row_due = at.step % self.log_every == 0 or at.step == self.total_steps
        self._show_progress(at.step, epoch, values["loss"], rate)

    def _show_progress(self, number: int, epoch: int, loss: float, rate: float) -> None:
        if not self.active:
            return
        progress = messages.RankProgress(number, self.total_steps, epoch, loss, rate)
        if self._progress_bar is not None:
            self._progress_bar.update(completed=number, text=progress.describe())
        elif self.prints_output and (time.monotonic() - self._last_progress_time > 0.2 or number == self.total_steps):
            self._last_progress_time = time.monotonic()
            messages.send_message(progress)

    def record_evaluation(self, at: Position, epoch: int) -> None:
        """After an evaluation: `at.eval`. One that is made up for goes into its step's row, if that was this run's."""
        self._position = at
        if self.recent_rows and self.recent_rows[-1]["step"] == at.step:
            at.rows = at.rows and at.rows - 1
            self._last_row = {
                name: math.nan if value is None else value for name, value in self.recent_rows.pop().items()
            }
            if self.active:
                self._row_file.close()
                self._open_row_file(at.step - 1)
        if self._last_row.get("step") == at.step:
            self._last_row |= {f"eval_{name}": value for name, value in at.eval.items()}
            self._row_due = True
        shown = "  ".join(f"{name} {value:.4f}" for name, value in at.eval.items())
        self.print_lines(
            [f"epoch {epoch}  step {at.step}/{self.total_steps}  train loss {at.train_loss:.4f}  eval {shown}"]
        )

    def write_due_row(self) -> None:
        """Write the row of this step, if it is due. Called once a step, when its values are complete."""
        if not self._row_due:
            return
        row = {name: value if math.isfinite(value) else None for name, value in self._last_row.items()}
        self.recent_rows = [*self.recent_rows, row][-NUM_RECENT_ROWS - self.pending_rows :]
        if self._position.rows is not None:
            self._position.rows += 1
        if self.active:
            self._row_file.write(encode_row(row))
            self.pending_rows = self.pending_rows + 1 if self._row_file.error else 0
            self._event_writer.add_scalars(
                int(self._last_row["step"]), {k: v for k, v in self._last_row.items() if k not in ("step", "samples")}
            )
        self._steps_since_row.clear()
        self._row_due = False
        self._advice_file.flush()

    def measure_rates(self) -> StepRates:
        """Return how fast this rank's steps were so far."""
        return StepRates(
            samples_per_second=self.train_samples / self.train_seconds if self.train_seconds else 0.0,
            step_seconds_median=statistics.median(self.step_seconds) if self.step_seconds else 0.0,
            comm_seconds_median=statistics.median(self.comm_seconds) if self.comm_seconds else 0.0,
        )

    def write_summary(self, summary: Mapping[str, object]) -> str | None:
        """Rank 0 writes summary.json, the last thing of a run. Returns why it cannot be, or a row cannot, if so."""
        if not self.active:
            return None
        what = "metrics.jsonl"
        try:
            self.sync_rows()
            what = "summary.json"
            lost = {
                name: {"bytes": lost.total_bytes, "error": lost.last_error}
                for name, lost in streams.find_dropped_output().items()
            }
            write_json(self.run_dir / what, {**summary, "output_dropped": lost})
        except OSError as error:
            return write_error_text(what, self.run_dir, error)
        return None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close_without_flush(self) -> None:
        """Close the files without writing what is left: they are another run's now."""
        self._row_due = False
        if self.active:
            self._row_file.close()
            self._event_writer.close_without_flush()
        self.active = False
        self.close()

    def close(self) -> None:
        """Write what is left, and close the files."""
        self.write_due_row()
        if self._progress_bar is not None:
            self._progress_bar.stop()
            self._progress_bar = None
        if self.active:
            self._row_file.close()
            self._event_writer.close()
        self.active = False


def encode_row(row: dict[str, float | None]) -> bytes:
    """A line of metrics.jsonl."""
    return f"{encode_json(row)}\n".encode()
