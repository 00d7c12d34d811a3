"""Loggers: what receives the rows, the graph and the summary of a run on rank 0, chosen by --logger.

metrics.jsonl and the terminal are not loggers: a run continues from the one and ends with the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from hvdtrain.system.plugins import Registry
from hvdtrain.system.recipe_errors import describe_error
from hvdtrain.training.rows import MetricsRow


class Logger:
    """A place that a run is reported to. A subclass registers itself in LOGGERS and overrides what it needs.

    One is made on rank 0 when the run starts, and again on the new rank 0 after a change of members. What a method
    raises is warned of, and the logger is left out from then on: a run does not end because of it.

    Attributes:
        unavailable_reason: a line to print if the logger can write nothing here.
        view_command: how a user looks at what it has written, for the last line of a run.
    """

    unavailable_reason: str | None = None
    view_command: str = ""

    def __init__(self, run_dir: Path) -> None:
        """Prepare to write; `run_dir` is the run folder."""

    @property
    def error(self) -> OSError | None:
        """Why rows wait in memory, if the logger keeps what it cannot write now."""
        return None

    def log_row(self, row: MetricsRow) -> None:
        """Take a row of metrics.jsonl. After a resume, rows of steps that were undone come again."""

    def log_options(self, options: Mapping[str, object], metrics: Sequence[str]) -> None:
        """Take the options of the recipe and of the run, as config.json holds them, when the run starts or resumes.

        metrics: of the rows, what to compare runs by: "train/loss" and the metric of the recipe's `best`.
        """

    def log_graph(self, graph: bytes) -> None:
        """Take the model's graph, a serialized TensorBoard GraphDef."""

    def log_summary(self, summary: Mapping[str, object]) -> None:
        """Take what summary.json holds, at the end of the run."""

    def sync_to_disk(self) -> None:
        """Let what was logged survive the machine. Raises OSError if that is not possible now."""

    def close(self) -> None:
        """Write what is left."""

    def close_without_flush(self) -> None:
        """Close without writing what is left: the run folder is another run's now."""


LOGGERS: Registry[type[Logger]] = Registry("logger", "hvdtrain.loggers", "hvdtrain.training.loggers")


class ActiveLoggers:
    """The loggers of a run while they are open."""

    def __init__(self, names: Sequence[str], warn: Callable[[str], None]) -> None:
        """Open nothing yet.

        Args:
            names: registered names.
            warn: prints a line about a logger that has failed.
        """
        self.names, self._warn = tuple(dict.fromkeys(names)), warn
        self._open: dict[str, Logger] = {}

    def open(self, run_dir: Path) -> None:
        """Make the loggers. Raises UserError for a name that is not registered."""
        for name in self.names:
            kind = LOGGERS.get(name)
            with self._leave_out_if_failing(name):
                self._open[name] = kind(run_dir)

    def find_errors(self) -> list[tuple[str, OSError | None]]:
        """Return why rows wait, by the loggers' names."""
        return [(name, logger.error) for name, logger in self._open.items()]

    def find_notes(self) -> list[str]:
        """Return lines about loggers that can write nothing here."""
        return [logger.unavailable_reason for logger in self._open.values() if logger.unavailable_reason]

    def view_commands(self) -> list[str]:
        """Return the commands that show what the loggers have written."""
        usable = [logger for logger in self._open.values() if not logger.unavailable_reason]
        return [logger.view_command for logger in usable if logger.view_command]

    def call(self, action: Callable[[Logger], object]) -> None:
        """Apply `action` to each logger; one that raises is left out from then on."""
        for name, logger in list(self._open.items()):
            with self._leave_out_if_failing(name):
                action(logger)

    def sync_to_disk(self) -> None:
        """Sync each logger, as far as that is possible now."""

        def sync(logger: Logger) -> None:
            with contextlib.suppress(OSError):  # these are not worth a checkpoint
                logger.sync_to_disk()

        self.call(sync)

    def close(self, *, flush: bool = True) -> None:
        """Close the loggers; without `flush`, what they have not written is lost."""
        self.call(lambda logger: logger.close() if flush else logger.close_without_flush())
        self._open.clear()

    @contextlib.contextmanager
    def _leave_out_if_failing(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            self._warn(f"the logger {name!r} failed and is left out from now on: {describe_error(error)}")
