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

from hvdtrain import messages
from hvdtrain.files import write_atomically, write_json
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
        metrics = run_dir / "metrics.jsonl"
        written = _cut_rows(metrics, from_step) if from_step and metrics.exists() else 0
        self._rows = metrics.open("a" if from_step else "w", buffering=1)
        for row in self.recent:
            if int(row["step"] or 0) > written:
                self._rows.write(json.dumps(row) + "\n")
        self._events = EventWriter(run_dir / "tensorboard")
        if self.talks and sys.stderr.isatty() and not messages.launched():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("training", total=steps, completed=from_step)
            self._bar.start()

    def lines(self, lines: Sequence[str]) -> None:
        """Tell people something."""
        for line in lines if self.talks else ():
            if self._bar is not None:
                self._bar.console.print(line, highlight=False, markup=False)
            else:
                print(line, flush=True)

    def graph(self, graph: bytes | None) -> None:
        if self.active and graph is not None:
            self._events.graph(graph)

    def advice(self, advice: dict[str, Any] | None) -> None:
        """What `--compression auto` measured and chose, for the run folder."""
        if self.active and advice is not None:
            write_json(self.run_dir / "advisor.json", advice)

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
        """After an evaluation: `at.eval`."""
        self._row |= {f"eval_{name}": value for name, value in at.eval.items()}
        self._due = True
        shown = "  ".join(f"{name} {value:.4f}" for name, value in at.eval.items())
        self.lines([f"epoch {epoch}  step {at.step}/{self.steps}  train loss {at.train_loss:.4f}  eval {shown}"])

    def flush(self) -> None:
        """Write the row of this step, if it is due. Called once a step, after everything else of the step."""
        if not self._due:
            return
        # JSON has no NaN.
        row = {name: value if math.isfinite(value) else None for name, value in self._row.items()}
        self.recent = [*self.recent[1 - RECENT :], row]
        if self.active:
            self._rows.write(json.dumps(row) + "\n")
            self._events.scalars(
                int(self._row["step"]), {k: v for k, v in self._row.items() if k not in ("step", "samples")}
            )
        self._since.clear()
        self._due = False

    def summary(self, values: dict[str, Any]) -> dict[str, Any]:
        """Complete the summary with what was measured; rank 0 writes it to summary.json."""
        seconds = self.train_seconds
        values |= {
            "samples_per_second": self.train_samples / seconds if seconds else 0.0,
            "step_seconds_median": statistics.median(self.step_seconds) if self.step_seconds else 0.0,
            "comm_seconds_median": statistics.median(self.comm_seconds) if self.comm_seconds else 0.0,
        }
        if self.active:
            shown = {name: value if math.isfinite(value) else None for name, value in values["eval"].items()}
            write_json(self.run_dir / "summary.json", {**values, "eval": shown})
        return values

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
    """Drop rows after the step that is resumed from, and a torn last line; the step of the last row kept, or 0."""
    last = 0
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or row["step"] > last_step:
            break
        kept.append(line + "\n")
        last = row["step"]
    write_atomically(path, "".join(kept).encode())
    return last
