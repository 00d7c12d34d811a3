"""What rank 0 prints: lines, warnings and progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from hvdtrain.system import messages
from hvdtrain.system.messages import RankProgress
from hvdtrain.system.progress import ProgressBar

PROGRESS_INTERVAL = 0.2  # seconds between two messages of progress to the launcher


class Terminal:
    """Rank 0's lines on standard output, with a progress bar on standard error if that is a terminal.

    Under `hvdtrain launch` there is no bar: progress is sent to the launcher, which draws one for the whole run.
    """

    def __init__(self, *, quiet: bool) -> None:
        """Print nothing but warnings until `open`, and with `quiet` after it too."""
        self.quiet = quiet
        self._prints = False
        self._bar: ProgressBar | None = None
        self._last_progress_time = 0.0

    def open(self, step: int, total_steps: int) -> None:
        """Begin to print, after step `step` of `total_steps`."""
        self._prints = not self.quiet
        if self._prints and sys.stderr.isatty() and not messages.is_launched():
            self._bar = ProgressBar()
            self._bar.update(completed=step, total=total_steps)

    def close(self) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def mute(self) -> None:
        """Print nothing but warnings: this rank is not rank 0, or not any more."""
        self._prints = False

    def print_lines(self, lines: Sequence[str]) -> None:
        """Print lines of the run's report, unless --quiet; `hvdtrain launch`, which labels other lines, prints them."""
        for line in lines if self._prints else ():
            if self._bar is not None:
                self._bar.print_line(line)
            elif messages.is_launched():
                messages.send_message(messages.RankReport(0, line))
            else:
                print(line, flush=True)

    def print_warning(self, line: str) -> None:
        """Print a warning, also with --quiet."""
        text = f"hvdtrain: warning: {line}"
        if self._bar is not None:
            self._bar.print_line(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def show_progress(self, progress: RankProgress) -> None:
        """Move the bar, or send the progress to the launcher."""
        if self._bar is not None:
            self._bar.update(completed=progress.step or 0, text=progress.describe())
        elif self._prints:
            is_last = progress.step == progress.steps
            if is_last or time.monotonic() - self._last_progress_time > PROGRESS_INTERVAL:
                self._last_progress_time = time.monotonic()
                messages.send_message(progress)
