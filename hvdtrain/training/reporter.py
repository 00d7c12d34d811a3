"""What rank 0 reports: the terminal, metrics.jsonl, the loggers, advisor.json and summary.json.

Other ranks only remember the last rows: one of them may become rank 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hvdtrain.ledger.writer import Ledger
from hvdtrain.recipe.metrics import format_values
from hvdtrain.recipe.tensorboard import close_writers
from hvdtrain.system import streams
from hvdtrain.system.files import DISK_SPACE_ERRORS, PRIVATE_MODE, BufferedDocument, write_error_text, write_json
from hvdtrain.system.gpu import GpuMonitor
from hvdtrain.system.messages import RankProgress
from hvdtrain.training.checkpoint import BestCheckpoint
from hvdtrain.training.logger import ActiveLoggers
from hvdtrain.training.metrics import RecipeMetrics
from hvdtrain.training.options import ReportOptions
from hvdtrain.training.position import Position
from hvdtrain.training.row_file import RowFile
from hvdtrain.training.row_hook import RowHook
from hvdtrain.training.rows import MetricsRow
from hvdtrain.training.speed import SpeedMeter, StepTime
from hvdtrain.training.terminal import Terminal


@dataclass(frozen=True)
class StepReport:
    """What a step reports of itself."""

    epoch: int  # from 1
    lr: float
    loss: float  # of this step
    values: Mapping[str, float]  # what the update reports: the gradient's norm, ...
    time: StepTime


class Reporter:
    """Rank 0's report of a run.

    Attributes:
        terminal: prints lines.
        rows: metrics.jsonl.
        loggers: those of --logger.
        row_hook: the recipe's `logged`.
        speed: times this rank's steps.
        best: the best checkpoint so far, on all ranks.
        gpu: reads this rank's GPU.
    """

    def __init__(self, options: ReportOptions, metrics: RecipeMetrics, gpu_uuid: str | None = None) -> None:
        """Report nothing until `open_files`.

        Args:
            options: of the report.
            metrics: of the recipe, which gets the rows too.
            gpu_uuid: of the GPU that this rank computes on, if there is one.
        """
        self.options, self.metrics, self.gpu = options, metrics, GpuMonitor(gpu_uuid)
        self.terminal = Terminal(quiet=options.quiet)
        self.rows = RowFile(self.terminal)
        self.loggers = ActiveLoggers(options.loggers, self.terminal.print_warning)
        self.row_hook = RowHook(metrics.recipe, self.terminal.print_warning)
        self.speed = SpeedMeter()
        self.best: BestCheckpoint | None = None
        self.print_lines, self.print_warning = self.terminal.print_lines, self.terminal.print_warning
        self._active = False  # this is rank 0, and the files are open
        self._run_dir, self._total_steps, self._position = Path(), 0, Position()
        self._step: tuple[int, StepReport] | None = None  # the last step, and what it reported
        self._row: MetricsRow | None = None  # to be written when the step's values are complete
        self._notes_printed = False
        self._write_error: OSError | None = None  # why rows wait, as was reported
        self._advice_file = BufferedDocument(Path("advisor.json"))

    def open_files(self, run_dir: Path, steps: int, at: Position, *, active: bool) -> None:
        """Begin, or continue after a step; `active` on rank 0."""
        self.close()
        self._run_dir, self._total_steps, self._active, self._position = run_dir, steps, active, at
        self._advice_file.path = run_dir / "advisor.json"
        self.rows.forget_after(at.step)
        if not active:
            self.terminal.mute()
            return
        self.terminal.open(at.step, steps)
        self.rows.open(run_dir / "metrics.jsonl", at.step, at.rows)
        self.loggers.open(run_dir)
        if not self._notes_printed:
            self._notes_printed = True
            self.print_lines(self.loggers.find_notes())

    def report_write_errors(self, ledger: Ledger) -> None:
        """Report when rows begin to wait because a file cannot be written, and when all are written. Once a step."""
        errors = [("the ledger", ledger.error)]
        if self._active:
            errors += [("metrics.jsonl", self.rows.error), *self.loggers.find_errors()]
            errors += [("advisor.json", self._advice_file.error)]
        found = next(((what, error) for what, error in errors if error is not None), None)
        if found and self._write_error is None:
            text = write_error_text(found[0], self._run_dir, found[1])
            self.print_warning(f"{text}; rows wait in memory, training continues")
        elif self._write_error is not None and not found:
            again = "has free space" if self._write_error.errno in DISK_SPACE_ERRORS else "can be written"
            self.print_warning(f"{self._run_dir} {again} again: all pending rows were written")
        self._write_error = found[1] if found else None

    def write_options(self, options: Mapping[str, object], metrics: Sequence[str]) -> None:
        """Give the options of the run to the loggers. metrics: tags of scalars to show them with."""
        self.loggers.call(lambda logger: logger.log_options(options, metrics))

    def write_graph(self, graph: bytes | None) -> None:
        """Give the model's graph to the loggers, if there is one."""
        if graph is not None:
            self.loggers.call(lambda logger: logger.log_graph(graph))

    def record_advice(self, advice: Mapping[str, object] | None) -> None:
        """Write what `--compression auto` measured and chose to advisor.json, with the next row."""
        self._advice_file.hold(advice if self._active else None)

    def record_step(self, at: Position, step: StepReport) -> None:
        """Report a step, after which the run is `at`."""
        self._position = at
        self.speed.record(step.time)
        self._step = at.step, step
        if at.step % self.options.log_every == 0 or at.step == self._total_steps:
            self._row = self._make_row(at, step)
        if self._active:
            progress = RankProgress(at.step, self._total_steps, step.epoch, step.loss, self.speed.row_rate())
            self.terminal.show_progress(progress)

    def _make_row(self, at: Position, step: StepReport) -> MetricsRow:
        """Return the row of the steps since the last one, and let the next one begin."""
        values = (
            self.metrics.compute(at.row_sums, at.row_examples) if at.row_sums else self.metrics.no_values(step.loss)
        )
        values |= step.values
        if at.row_skipped or "skipped" in values:
            values["skipped"] = float(at.row_skipped)
        at.start_row()
        return MetricsRow(
            step=at.step,
            epoch=step.epoch,
            samples=at.samples,
            lr=step.lr,
            samples_per_second=self.speed.row_rate(),
            comm_seconds=self.speed.row_wait(),
            train=values,
            gpu=self._read_gpu(),
        )

    def _read_gpu(self) -> Mapping[str, float | str]:
        """Return what is known of this rank's GPU now; report what cannot be known on rank 0, an alarm on any rank."""
        reading = self.gpu.read()
        if (alarm := self.gpu.take_alarm()) is not None:
            self.print_warning(alarm)
        self.print_lines(self.gpu.take_notes())
        return reading.columns() if reading is not None else {}

    def record_evaluation(self, at: Position, epoch: int) -> None:
        """Report an evaluation. If the step's row is there already, by the rank that was lost, it is written again."""
        self._position = at
        self._row = self.rows.take_back_last(at) or self._row
        if self._row is None:
            known = self._step is not None and self._step[0] == at.step  # else this rank has come after the step
            unknown = StepReport(epoch, math.nan, math.nan, {}, StepTime(0, 0.0, 0.0))
            self._row = self._make_row(at, self._step[1] if self._step is not None and known else unknown)
        self._row = replace(self._row, eval=dict(at.eval), evals=dict(at.evals))
        progress = f"epoch {epoch}  step {at.step}/{self._total_steps}"
        self.print_lines([f"{progress}  train loss {at.train_loss:.4f}  eval {format_values(at.all_metrics())}"])

    def write_due_row(self) -> None:
        """Write the row of this step, if it is due. Called once a step, when its values are complete."""
        row, self._row = self._row, None
        if row is None:
            return
        self.rows.append(row, self._position)
        self.loggers.call(lambda logger: logger.log_row(row))
        if self._active:
            self.row_hook.log_row(row)
        self.speed.start_row()
        self._advice_file.flush()

    def sync_rows(self) -> None:
        """Write the row of this step, if it is due, and all that waits, to survive the machine.

        Raises OSError if that is not possible now.
        """
        self.write_due_row()
        self.loggers.sync_to_disk()
        self.rows.sync_to_disk()

    def write_summary(self, summary: Mapping[str, object]) -> str | None:
        """Write summary.json on rank 0, the last file of a run; return why it, or a row, cannot be written."""
        if not self._active:
            return None
        what = "metrics.jsonl"
        try:
            self.sync_rows()
            what = "summary.json"
            dropped = streams.find_dropped_output().items()
            lost = {name: {"bytes": lost.total_bytes, "error": lost.last_error} for name, lost in dropped}
            summary = {**summary, "output_dropped": lost}
            write_json(self._run_dir / what, summary, PRIVATE_MODE)  # the command line may hold secrets
        except OSError as error:
            return write_error_text(what, self._run_dir, error)
        self.loggers.call(lambda logger: logger.log_summary(summary))
        return None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.gpu.close()

    def close_without_flush(self) -> None:
        """Close the files without writing what is left: they are another run's now."""
        self._row = None
        self.loggers.close(flush=False)
        self.close()

    def close(self) -> None:
        """Write what is left, and close the files."""
        self.write_due_row()
        self.terminal.close()
        self.rows.close()
        self.loggers.close()
        close_writers()
        self._active = False
