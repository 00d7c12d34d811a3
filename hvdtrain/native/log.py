"""Running the steps of a build: everything goes to a log, and of a failure the first real error is shown."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hvdtrain.system.errors import RunError

ERROR_LINES = 6  # of a log, in an error message
# A compiler's, linker's or CMake's error. Warnings and CMake's own experiments do not look so.
ERROR = re.compile(
    r"^CMake Error|(?:^|[\s:])(?:fatal )?error(?: #[\w-]+)?:|^nvcc fatal|undefined reference to|cannot find -l"
    r"|No space left on device|ninja: (?:error|fatal)"
)
LATER_ERROR = re.compile(r"^(?:ERROR: |[A-Z]\w*Error: )")  # pip's and Python's, which often only follow from another


def run_logged(
    what: str,
    command: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str],
    cwd: Path,
    timeout: float,
    on_line: Callable[[str], None] = lambda line: None,
) -> None:
    """Run one step, its output appended to the log and given to `on_line` as it comes.

    The step is a process group of its own: it ends whole, also on Ctrl-C and when its time is up.

    Raises:
        RunError: the step failed or took longer than `timeout` seconds.
    """
    with log.open("a") as out:
        out.write(f"$ {' '.join(command)}\n")
        start = out.tell()
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        late = threading.Event()

        def stop() -> None:
            late.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(timeout, stop)
        timer.daemon = True
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                out.write(line)
                on_line(line)
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
    if late.is_set():
        raise RunError(f"{what} took longer than {timeout:.0f} s; log: {log}")
    if code:
        with log.open(errors="replace") as text:
            text.seek(start)
            error = first_error(text.read())
        raise RunError(f"{what} failed:\n{error}\nlog: {log}")


def first_error(text: str) -> str:
    """The first real error in the output of a build, with the lines that belong to it."""
    lines = text.splitlines()
    for pattern in (ERROR, LATER_ERROR):
        for number, line in enumerate(lines):
            if pattern.search(line):
                return "\n".join(error_lines(lines[number:]))
    return "\n".join(line for line in lines[-ERROR_LINES:] if line.strip()) or "no output"


def error_lines(lines: list[str]) -> list[str]:
    """An error and what explains it, ERROR_LINES at most.

    It ends at a blank line, at the next error and at the next step; CMake's goes on as long as lines are indented.
    """
    shown = [lines[0][:300]]
    cmake, blank = lines[0].startswith("CMake Error"), False
    for line in lines[1:]:
        blank_before, blank = blank, not line.strip()
        if blank:
            continue
        if ERROR.search(line) or line.startswith(("ninja:", "[", "In file included")) or len(shown) == ERROR_LINES:
            break
        if blank_before and not (cmake and line.startswith("  ")):
            break
        shown.append(line[:300])
    return shown
