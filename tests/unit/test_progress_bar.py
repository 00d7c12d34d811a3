"""Progress bars show what is done, and the lines printed through them, on a terminal."""

from __future__ import annotations

import os
import pty
import re
import sys

import pytest

from hvdtrain.system.messages import RankProgress
from hvdtrain.system.processes import Child, Deadline


def shown_on_terminal(code: str) -> str:
    """Run Python code with a terminal as its standard error; return what appears there."""
    ours, theirs = pty.openpty()
    with Child([sys.executable, "-c", code], stderr=theirs, env={**os.environ, "TERM": "xterm"}) as child:
        os.close(theirs)
        child.wait_for_exit(Deadline(30.0))
    shown = b""
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        try:
            while data := terminal.read(4096):
                shown += data
        except OSError:  # Linux's word for the end of a terminal
            pass
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown.decode())


def test_bar_shows_steps_and_lines_above_it() -> None:
    text = shown_on_terminal(
        "from hvdtrain.system.progress import ProgressBar\n"
        "bar = ProgressBar()\n"
        "bar.update(completed=3, total=12, text='[red]loss 0.5')\n"
        "bar.print_line('saved [bold] at 3')\n"
        "bar.stop()\n"
    )
    assert "3/12" in text and "[red]loss 0.5" in text
    assert "saved [bold] at 3\r\n" in text


def test_stages_are_a_bar_on_a_terminal() -> None:
    text = shown_on_terminal(
        "from hvdtrain.system.progress import show_stages\nwith show_stages() as report:\n    report('compiling', 40)\n"
    )
    assert "40%" in text and "compiling" in text


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (RankProgress(3, 10, 1, 0.12345, 1234.5), "epoch 1  loss 0.1235  1,234 samples/s"),
        (RankProgress(3, 10, 1, None, None, "warming up"), "epoch 1  warming up"),
        (RankProgress(), ""),
    ],
)
def test_progress_of_a_run_is_described(progress: RankProgress, text: str) -> None:
    assert progress.describe() == text
