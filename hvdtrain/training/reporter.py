"""What rank 0 tells: the terminal, metrics.jsonl, TensorBoard, summary.json."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hvdtrain.ledger.writer import Ledger
from hvdtrain.system import messages, streams
from hvdtrain.system.files import NO_ROOM, BufferedAppender, trouble, write_json
from hvdtrain.system.strict_json import encode_json
from hvdtrain.training.checkpoint import Position
from hvdtrain.training.event_writer import EventWriter
from hvdtrain.training.options import RunOptions
from hvdtrain.training.rows import cut_rows

RECENT = 20  # rows that every rank remembers


class Reporter:
    """Rank 0's report of a run. Other ranks only remember the last rows: one of them may become rank 0."""

    def __init__(self, options: RunOptions) -> None:
        self.quiet, self.log_every = options.quiet, options.log_every
        self.active = self.talks = False
        self.steps = 0
        self.run_dir = Path()
        self.step_seconds: list[float] = []
        self.comm_seconds: list[float] = []
        self.train_seconds = 0.0
        self.train_samples = 0
        self._since: list[tuple[int, float, float]] = []  # (examples, seconds, waited) since the last row
        self._row: dict[str, float] = {}  # of the last step
        self.recent: list[dict[str, float | None]] = []  # rows, the last of which may not be in the file
        self.behind = 0  # rows that rank 0 could not write
        self._at = Position()  # of the last step; its rows are counted here
        self._failing: OSError | None = None  # why rows wait, as people were told
        self._advice: dict[str, Any] | None = None  # that is still to be written
        self._advice_error: OSError | None = None
        self._due = False
        self._last_sent = 0.0
        self._bar: Progress | None = None

    def open(self, run_dir: Path, steps: int, at: Position, *, active: bool) -> None:
        """Begin, or continue after a step; `active` on rank 0."""
        self.close()
        self.run_dir, self.steps, self.active, self._at = run_dir, steps, active, at
        self.talks = active and not self.quiet
        self.recent = [row for row in self.recent if int(row["step"] or 0) <= at.step]
        if not active:
            return
        self._open_rows(at.step)
        self._events = EventWriter(run_dir / "tensorboard")
        if self.talks and sys.stderr.isatty() and not messages.launched():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("training", total=steps, completed=at.step)
            self._bar.start()

    def _open_rows(self, last_step: int) -> None:
        """Open metrics.jsonl, cut after a step; what is missing before it is written again."""
        rows, path, recent = self._at.rows, self.run_dir / "metrics.jsonl", list(self.recent)

        def cut() -> bytes:
            found = cut_rows(path, last_step)
            missing = [row for row in recent if int(row["step"] or 0) > found.last]
            if missing:
                found.kept, found.last = found.kept + len(missing), int(missing[-1]["step"] or 0)
            text, gap = found.describe(last_step, rows)
            if gap:
                self.warn(f"metrics.jsonl: {text}")
            elif text:
                self.lines([f"metrics   {text}"])
            return b"".join(encode_row(row) for row in missing)

        self._rows = BufferedAppender(path, cut)
        self._rows.flush()
        self.behind = len(recent) if self._rows.error else 0

    def lines(self, lines: Sequence[str]) -> None:
        """Tell people something."""
        for line in lines if self.talks else ():
            if self._bar is not None:
                self._bar.console.print(line, highlight=False, markup=False)
            else:
                print(line, flush=True)

    def warn(self, line: str) -> None:
        """Tell people of trouble, also with --quiet. On rank 0."""
        if self._bar is not None:
            self._bar.console.print(f"hvdtrain: warning: {line}", highlight=False, markup=False)
        else:
            print(f"hvdtrain: warning: {line}", file=sys.stderr, flush=True)

    def look_for_room(self, ledger: Ledger) -> None:
        """Report when rows begin to wait because a file cannot be written, and when all are written. Once a step."""
        errors = [("the ledger", ledger.error)]
        if self.active:
            errors += [("metrics.jsonl", self._rows.error), ("tensorboard", self._events.file.error)]
            errors += [("advisor.json", self._advice_error)]
        found = next(((what, error) for what, error in errors if error is not None), None)
        if found and self._failing is None:
            self.warn(f"{trouble(found[0], self.run_dir, found[1])}; rows wait in memory, training goes on")
        elif self._failing is not None and not found:
            again = "has room" if self._failing.errno in NO_ROOM else "can be written"
            self.warn(f"{self.run_dir} {again} again: all rows are written")
        self._failing = found[1] if found else None

    def graph(self, graph: bytes | None) -> None:
        if self.active and graph is not None:
            self._events.graph(graph)

    def advice(self, advice: dict[str, Any] | None) -> None:
        """What `--compression auto` measured and chose, for the run folder."""
        self._advice = advice if self.active else None

    def write_rows(self) -> None:
        """Write the row of this step, if it is due, and all that waits, to survive the machine.

        Raises OSError if that is not possible now.
        """
        self.flush()
        if self.active:
            with contextlib.suppress(OSError):  # these are not worth a checkpoint
                self._events.file.sync()
            self._rows.sync()
            self.behind = 0

    def in_place(self) -> bool:
        """Whether metrics.jsonl is still where it was opened."""
        return not self.active or self._rows.in_place()

    def step(
        self, at: Position, epoch: int, lr: float, values: dict[str, float], batch: int, seconds: float, waited: float
    ) -> None:
        """After a step of `batch` examples. epoch: from 1. values: loss, metrics and what the update reports."""
        self._at = at
        self.step_seconds.append(seconds)
        self.comm_seconds.append(waited)
        self.train_seconds += seconds
        self.train_samples += batch
        self._since.append((batch, seconds, waited))
        rate = sum(b for b, _, _ in self._since) / sum(s for _, s, _ in self._since)
        self._row = {
            "step": at.step,
            "epoch": epoch,
            "samples": at.samples,
            "lr": lr,
            "samples_per_second": rate,
            "comm_seconds": statistics.fmean(w for _, _, w in self._since),
            **values,
        }
        self._due = at.step % self.log_every == 0 or at.step == self.steps
        self._progress(at.step, epoch, values["loss"], rate)

    def _progress(self, number: int, epoch: int, loss: float, rate: float) -> None:
        if not self.active:
            return
        if self._bar is not None:
            self._bar.update(
                self._task, completed=number, description=f"epoch {epoch}  loss {loss:.4f}  {rate:,.0f} samples/s"
            )
        elif self.talks and (time.monotonic() - self._last_sent > 0.2 or number == self.steps):
            self._last_sent = time.monotonic()
            messages.send("progress", step=number, steps=self.steps, epoch=epoch, loss=loss, rate=rate, text="")

    def evaluation(self, at: Position, epoch: int) -> None:
        """After an evaluation: `at.eval`. One that is made up for goes into its step's row, if that was this run's."""
        self._at = at
        if self.recent and self.recent[-1]["step"] == at.step:
            at.rows = at.rows and at.rows - 1
            self._row = {name: math.nan if value is None else value for name, value in self.recent.pop().items()}
            if self.active:
                self._rows.close()
                self._open_rows(at.step - 1)
        if self._row.get("step") == at.step:
            self._row |= {f"eval_{name}": value for name, value in at.eval.items()}
            self._due = True
        shown = "  ".join(f"{name} {value:.4f}" for name, value in at.eval.items())
        self.lines([f"epoch {epoch}  step {at.step}/{self.steps}  train loss {at.train_loss:.4f}  eval {shown}"])

    def flush(self) -> None:
        """Write the row of this step, if it is due. Called once a step, when its values are complete."""
        if not self._due:
            return
        row = {name: value if math.isfinite(value) else None for name, value in self._row.items()}
        self.recent = [*self.recent, row][-RECENT - self.behind :]
        if self._at.rows is not None:
            self._at.rows += 1
        if self.active:
            self._rows.write(encode_row(row))
            self.behind = self.behind + 1 if self._rows.error else 0
            self._events.scalars(
                int(self._row["step"]), {k: v for k, v in self._row.items() if k not in ("step", "samples")}
            )
        self._since.clear()
        self._due = False
        if self._advice is not None:
            try:
                write_json(self.run_dir / "advisor.json", self._advice)
                self._advice = self._advice_error = None
            except OSError as error:
                self._advice_error = error

    def measured(self, values: dict[str, Any]) -> dict[str, Any]:
        """The summary, completed with what was measured."""
        seconds = self.train_seconds
        return values | {
            "samples_per_second": self.train_samples / seconds if seconds else 0.0,
            "step_seconds_median": statistics.median(self.step_seconds) if self.step_seconds else 0.0,
            "comm_seconds_median": statistics.median(self.comm_seconds) if self.comm_seconds else 0.0,
        }

    def write_summary(self, summary: dict[str, Any]) -> str | None:
        """Rank 0 writes summary.json, the last thing of a run. Returns why it cannot be, or a row cannot, if so."""
        if not self.active:
            return None
        what = "metrics.jsonl"
        try:
            self.write_rows()
            what = "summary.json"
            lost = {name: {"bytes": lost.size, "error": lost.error} for name, lost in streams.dropped().items()}
            write_json(self.run_dir / what, {**summary, "output_dropped": lost})
        except OSError as error:
            return trouble(what, self.run_dir, error)
        return None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def abandon(self) -> None:
        """Close the files without writing what is left: they are another run's now."""
        self._due = False
        if self.active:
            self._rows.close()
            self._events.abandon()
        self.active = False
        self.close()

    def close(self) -> None:
        """Write what is left, and close the files."""
        self.flush()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self.active:
            self._rows.close()
            self._events.close()
        self.active = False


def describe_end(summary: dict[str, Any], folder: Path) -> list[str]:
    """How a run ended, in a few lines for people."""
    ranks = f"{summary['world_size']} rank{'s' * (summary['world_size'] > 1)}"
    shown = "  ".join(f"{name} {value:.4f}" for name, value in summary["eval"].items())
    return [
        *([f"evaluated {shown}"] if summary["finished"] and shown else []),
        f"trained   {summary['steps']} steps, {summary['samples_per_second']:,.0f} samples/s on {ranks}",
        f"results   {folder}/summary.json, tensorboard --logdir {folder}",
    ]


def encode_row(row: dict[str, float | None]) -> bytes:
    """A line of metrics.jsonl."""
    return f"{encode_json(row)}\n".encode()
