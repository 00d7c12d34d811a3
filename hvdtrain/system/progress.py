"""Progress bars on standard error, and what to print instead of one if that is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

PERCENT_PER_LINE = 20  # between two lines of a stage

ReportStage = Callable[[str, int], None]  # the name of a stage, and how many percent of it are done


class ProgressBar:
    """A bar of steps, with the time left and a text next to it; lines that are printed through it appear above it.

    Attributes:
        progress: rich's bar, which is shown from the first `update` on.
    """

    def __init__(self, *, percent: bool = False, redirect: bool = True, leave: bool = True) -> None:
        """Prepare the bar.

        Args:
            percent: show percent and the time passed instead of steps and the time left.
            redirect: print what this process writes to its standard streams above the bar.
            leave: leave the bar on the terminal, as it was last, when it is stopped.
        """
        # rich takes as long to import as all else that a short command needs.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
        from rich.progress import TimeElapsedColumn as TimePassed
        from rich.progress import TimeRemainingColumn as TimeLeft

        numbers = (TaskProgressColumn(), TimePassed()) if percent else (MofNCompleteColumn(), TimeLeft())
        self.progress: Progress = Progress(
            BarColumn(),
            *numbers,
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            redirect_stdout=redirect,
            redirect_stderr=redirect,
            transient=not leave,
        )
        self._task = self.progress.add_task("", total=100 if percent else None)

    def update(self, *, completed: float, total: float | None = None, text: str = "") -> None:
        """Move the bar, and show it if it is not shown yet.

        Args:
            completed: steps, or percent, done.
            total: steps in all; None leaves it as it is.
            text: replaces the text.
        """
        self.progress.update(self._task, completed=completed, total=total, description=text)
        self.progress.start()  # does nothing the second time

    def print_line(self, text: str) -> None:
        """Print a line above the bar, as it is."""
        self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Stop moving the bar."""
        self.progress.stop()


@contextmanager
def show_stages() -> Iterator[ReportStage]:
    """Yield a function that shows a stage and its percentage: as a bar on a terminal, else as a line now and then."""
    if not sys.stderr.isatty():
        yield print_stage_lines()
        return
    bar = ProgressBar(percent=True, leave=False)
    try:
        yield lambda stage, percent: bar.update(completed=percent, text=stage)
    finally:
        bar.stop()


def print_stage_lines() -> ReportStage:
    """Return a function that prints a line for each stage, and one each PERCENT_PER_LINE percent of it."""
    start = time.monotonic()
    last: tuple[str, int] | None = None

    def report_stage(stage: str, percent: int) -> None:
        nonlocal last
        now = (stage, percent // PERCENT_PER_LINE)
        if now != last:
            last = now
            done = f" {percent} %" if percent else ""
            print(f"{stage}{done} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)

    return report_stage
