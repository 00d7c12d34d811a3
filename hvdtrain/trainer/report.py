"""What rank 0 tells: the terminal, metrics.jsonl, TensorBoard, summary.json."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hvdtrain import messages, streams
from hvdtrain.elastic.ledger import Ledger
from hvdtrain.files import NO_ROOM, Growing, trouble, write_json
from hvdtrain.trainer.checkpoint import Position
from hvdtrain.trainer.options import RunOptions
from hvdtrain.trainer.tensorboard import EventWriter

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
        self.behind = 0  # rows that rank 0 could not write, the disk being full
        self._full = False
        self._advice: dict[str, Any] | None = None  # that is still to be written
        self._due = False
        self._last_sent = 0.0
        self._bar: Progress | None = None

    def open(self, run_dir: Path, steps: int, *, active: bool, from_step: int) -> None:
        """Begin, or go on after a step; `active` on rank 0."""
        self.close()
        self.run_dir, self.steps, self.active = run_dir, steps, active
        self.talks = active and not self.quiet
        self.recent = [row for row in self.recent if int(row["step"] or 0) <= from_step]
        if not active:
            return
        self._open_rows(from_step)
        self._events = EventWriter(run_dir / "tensorboard")
        if self.talks and sys.stderr.isatty() and not messages.launched():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("training", total=steps, completed=from_step)
            self._bar.start()

    def _open_rows(self, last_step: int) -> None:
        """Open metrics.jsonl, cut after a step; what is missing before it is written again."""
        metrics = self.run_dir / "metrics.jsonl"
        written = _cut_rows(metrics, last_step) if metrics.exists() else 0
        self._rows = Growing(metrics)
        missing = [row for row in self.recent if int(row["step"] or 0) > written]
        self._rows.write("".join(json.dumps(row) + "\n" for row in missing).encode())
        self.behind = len(missing) if self._rows.error else 0

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
        """Tell people when rows begin to wait for room on the disk, and when all are written. Called once a step."""
        errors = [("the ledger", ledger.error), ("metrics.jsonl", self._rows.error if self.active else None)]
        found = next(((what, error) for what, error in errors if error is not None), None)
        if found and not self._full:
            self.warn(f"{trouble(found[0], self.run_dir, found[1])}; rows wait in memory, training goes on")
        elif self._full and not found:
            self.warn(f"{self.run_dir} has room again: all rows are written")
        self._full = found is not None

    def graph(self, graph: bytes | None) -> None:
        if self.active and graph is not None:
            self._events.graph(graph)

    def advice(self, advice: dict[str, Any] | None) -> None:
        """What `--compression auto` measured and chose, for the run folder."""
        self._advice = advice if self.active else None

    def write_rows(self) -> None:
        """Write the row of this step, if it is due, and all that waits for room. Raises OSError where there is none."""
        self.flush()
        if self.active:
            self._rows.flush()
            self.behind = self.behind if self._rows.error else 0
            if self._rows.error is not None:
                raise self._rows.error

    def step(
        self, at: Position, epoch: int, lr: float, values: dict[str, float], batch: int, seconds: float, waited: float
    ) -> None:
        """After a step of `batch` examples. epoch: from 1. values: loss, metrics and what the update reports."""
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
        if self.recent and self.recent[-1]["step"] == at.step:
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
        # JSON has no NaN.
        row = {name: value if math.isfinite(value) else None for name, value in self._row.items()}
        self.recent = [*self.recent, row][-RECENT - self.behind :]
        if self.active:
            self._rows.write((json.dumps(row) + "\n").encode())
            self.behind = self.behind + 1 if self._rows.error else 0
            self._events.scalars(
                int(self._row["step"]), {k: v for k, v in self._row.items() if k not in ("step", "samples")}
            )
        self._since.clear()
        self._due = False
        if self._advice is not None:
            try:
                write_json(self.run_dir / "advisor.json", self._advice)
                self._advice = None
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise

    def measured(self, values: dict[str, Any]) -> dict[str, Any]:
        """The summary, completed with what was measured."""
        seconds = self.train_seconds
        return values | {
            "samples_per_second": self.train_samples / seconds if seconds else 0.0,
            "step_seconds_median": statistics.median(self.step_seconds) if self.step_seconds else 0.0,
            "comm_seconds_median": statistics.median(self.comm_seconds) if self.comm_seconds else 0.0,
        }

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Rank 0 writes summary.json, the last thing of a run. Raises OSError, also where rows still wait for room."""
        if self.active:
            self.write_rows()
            lost = {name: {"bytes": lost.size, "error": lost.error} for name, lost in streams.dropped().items()}
            shown = {name: value if math.isfinite(value) else None for name, value in summary["eval"].items()}
            write_json(self.run_dir / "summary.json", {**summary, "eval": shown, "output_dropped": lost})

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
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
        *([f"evaluated {shown}"] if summary["finished"] else []),
        f"trained   {summary['steps']} steps, {summary['samples_per_second']:,.0f} samples/s on {ranks}",
        f"results   {folder}/summary.json, tensorboard --logdir {folder}",
    ]


def _cut_rows(path: Path, last_step: int) -> int:
    """Drop rows after the step that is resumed from, and a torn last line; the step of the last row kept, or 0.

    In place, for which a full disk has room.
    """
    last = kept = 0
    with path.open("rb+") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                break
            known = isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= last_step
            if not known or not line.endswith(b"\n"):
                break
            last, kept = row["step"], kept + len(line)
        file.truncate(kept)
    return last
