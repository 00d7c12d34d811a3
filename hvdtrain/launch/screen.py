"""Where a run's lines go: standard output and standard error, and a progress bar if there is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from hvdtrain.launch.output import OutputLine


class Screen:
    """Prints lines above a progress bar that appears with the first progress."""

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def print_line(self, line: OutputLine) -> None:
        """Print a line of a rank, `[rank] text`, or of the launcher, as it is, to the stream that it came from."""
        text = line.text if line.rank is None else f"[{line.rank}] {line.text}"
        self.write_line(text, line.stream)

    def can_print_plain(self, stream: str) -> bool:
        """Whether lines may be written as they are: no bar is in their way, and the stream takes all characters."""
        out = sys.stdout if stream == "stdout" else sys.stderr
        return self.bar is None and (out.encoding or "").lower().replace("-", "") == "utf8"

    def print_plain(self, text: str, stream: str) -> None:
        """Print lines of ranks that are complete."""
        out = sys.stdout if stream == "stdout" else sys.stderr
        out.write(text)
        out.flush()

    def print_note(self, text: str) -> None:
        """Print what launch itself has to say."""
        self.write_line(f"hvdtrain: {text}", "stderr")

    def write_line(self, text: str, stream: str) -> None:
        """Print a line at once."""
        out = sys.stdout if stream == "stdout" else sys.stderr
        if self.bar and out.isatty():
            # The bar's console knows where the bar is; that it writes to standard error does not show on a terminal.
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        encoding = out.encoding or "utf-8"
        out.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        out.flush()

    def update_progress(self, message: dict[str, Any]) -> None:
        """Move the bar, if standard error is a terminal."""
        if not sys.stderr.isatty():
            return
        if self.bar is None or self.task is None:
            self.bar = create_progress_bar()
            self.task = self.bar.add_task("", info="")
        self.bar.update(
            self.task, total=message.get("steps"), completed=message.get("step") or 0, info=format_progress(message)
        )
        self.bar.start()  # does nothing the second time

    def close(self) -> None:
        """Take the bar away, leaving it as it was last."""
        if self.bar:
            self.bar.stop()
            self.bar = None


def format_rank_count(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def announce_start(what: str, launcher: str, hosts: Sequence[str]) -> None:
    """Print what is being started, at once: the check and the ranks take seconds before they print anything.

    To standard output: on standard error a mistake stays one line.
    """
    where = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
    print(f"hvdtrain: starting {what} with {launcher} on {where} ...", flush=True)


def create_progress_bar() -> Progress:
    """A bar with steps, time left, and what `info` makes of a progress message."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    words = TextColumn("{task.fields[info]}", markup=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), words)
    # Output goes through `Screen.write`; nothing else in this process prints.
    return Progress(*columns, console=Console(stderr=True), redirect_stdout=False, redirect_stderr=False)


def format_progress(message: dict[str, Any]) -> str:
    """The words after the bar: `epoch 3  loss 0.1234  812/s`, and the rank's own text."""
    formats = {"epoch": "epoch {}", "loss": "loss {:.4f}", "rate": "{:,.0f}/s", "text": "{}"}
    return "  ".join(form.format(message[key]) for key, form in formats.items() if message.get(key) not in (None, ""))
