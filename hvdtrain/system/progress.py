"""Showing how far a long step is: a moving bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STEP = 20  # percent between two lines

Report = Callable[[str, int], None]  # what is being done, percent of it


@contextmanager
def progress() -> Iterator[Report]:
    """Give a function that shows a stage and its percentage on standard error."""
    if sys.stderr.isatty():
        with bar() as report:
            yield report
    else:
        yield lines()


@contextmanager
def bar() -> Iterator[Report]:
    """A bar of rich."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=100)
        yield lambda stage, percent: shown.update(task, description=stage, completed=percent)


def lines() -> Report:
    """A line per stage, and one each STEP percent."""
    start = time.monotonic()
    last: tuple[str, int] | None = None

    def report(stage: str, percent: int) -> None:
        nonlocal last
        now = (stage, percent // STEP)
        if now != last:
            last = now
            done = f" {percent} %" if percent else ""
            print(f"{stage}{done} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)

    return report
