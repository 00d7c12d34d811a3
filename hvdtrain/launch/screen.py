"""Where a run's lines go: standard output and standard error, and a progress bar if there is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hvdtrain.launch.output import OutputLine
from hvdtrain.launch.rank_output import BYTE_CHARACTERS, restore_bytes
from hvdtrain.system.messages import RankProgress
from hvdtrain.system.progress import ProgressBar

MAX_NAMED_HOSTS = 4


class Screen:
    """Prints lines above a progress bar that appears with the first progress."""

    def __init__(self) -> None:
        self.bar: ProgressBar | None = None

    def print_line(self, line: OutputLine) -> None:
        """Print a line of a rank, `[rank] text`, or of the launcher, as it is, to the stream that it came from."""
        text = line.text if line.rank is None else f"[{line.rank}] {line.text}"
        self.write_line(text, line.stream)

    def can_print_plain(self, stream: str) -> bool:
        """Return whether lines can be written as they are: there is no bar, and the stream takes all characters."""
        out = sys.stdout if stream == "stdout" else sys.stderr
        return self.bar is None and (out.encoding or "").lower().replace("-", "") == "utf8"

    def print_plain(self, text: str, stream: str) -> None:
        """Print complete lines of ranks."""
        out = sys.stdout if stream == "stdout" else sys.stderr
        out.write(text)
        out.flush()

    def print_note(self, text: str) -> None:
        """Print a line of launch itself."""
        self.write_line(f"hvdtrain: {text}", "stderr")

    def write_line(self, text: str, stream: str) -> None:
        """Print a line at once."""
        out = sys.stdout if stream == "stdout" else sys.stderr
        if self.bar and out.isatty():
            # The bar knows where it is; that it writes to standard error does not show on a terminal.
            self.bar.print_line(text)
            return
        encoding = out.encoding or "utf-8"
        if BYTE_CHARACTERS.search(text) and hasattr(out, "buffer"):
            out.flush()
            out.buffer.write(restore_bytes(text, encoding) + b"\n")
        else:
            out.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        out.flush()

    def update_progress(self, message: RankProgress) -> None:
        """Move the bar, if standard error is a terminal."""
        if not sys.stderr.isatty():
            return
        # Output goes through `write_line`; nothing else in this process prints.
        self.bar = self.bar or ProgressBar(redirect=False)
        self.bar.update(completed=message.step or 0, total=message.steps, text=message.describe())

    def close(self) -> None:
        """Take the bar away, leaving it as it was last."""
        if self.bar:
            self.bar.stop()
            self.bar = None


def announce_start(what: str, launcher: str, hosts: Sequence[str]) -> None:
    """Print what is being started, at once: the check and the ranks take seconds before they print anything.

    To standard output, unless standard error is a terminal: a mistake stays one line on standard error.
    """
    named, more = ", ".join(hosts[:MAX_NAMED_HOSTS]), len(hosts) - MAX_NAMED_HOSTS
    where = f"{named} and {more} more" if more > 0 else named
    out = sys.stderr if sys.stderr.isatty() else sys.stdout
    print(f"hvdtrain: starting {what} with {launcher} on {where} ...", file=out, flush=True)
