"""Running the steps of a build: all output goes to a log, and the first real error of a failed step is shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.system.errors import RunError
from hvdtrain.system.processes import TO_STDOUT, Child, Deadline, ProcessTimeout

ERROR_LINES = 6  # of a log, in an error message
# Errors of compilers, linkers and CMake, but not warnings or the tests that CMake itself makes.
ERROR = re.compile(
    r"^CMake Error|(?:^|[\s:])(?:fatal )?error(?: #[\w-]+)?:|^nvcc fatal|undefined reference to|cannot find -l"
    r"|No space left on device|ninja: (?:error|fatal)"
)
LATER_ERROR = re.compile(r"^(?:ERROR: |[A-Z]\w*Error: )")  # of pip and Python: often only consequences


@dataclass(frozen=True)
class BuildStep:
    """A command of a build.

    Attributes:
        what: The step, for messages, such as "building Horovod".
        command: The program and its arguments.
        env: Its environment.
        cwd: Its working directory.
        timeout: Its time limit in seconds.
    """

    what: str
    command: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    timeout: float


def run_logged(step: BuildStep, log: Path, on_line: Callable[[str], None] = lambda line: None) -> None:
    """Run one step and append its output to a log.

    The step is a process group of its own, which is killed as a whole on Ctrl-C and at the time limit.

    Args:
        step: What to run.
        log: File to append to.
        on_line: Called with each line of output as it arrives.

    Raises:
        RunError: The step failed or reached its time limit.
    """
    with log.open("a") as out:
        out.write(f"$ {' '.join(step.command)}\n")
        start = out.tell()
        deadline = Deadline(step.timeout)
        with Child(step.command, cwd=step.cwd, env=step.env, stderr=TO_STDOUT) as child:
            try:
                for line in child.output_lines(deadline):
                    out.write(line)
                    on_line(line)
                code = child.wait_for_exit(deadline)
            except ProcessTimeout:
                raise RunError(f"{step.what} took longer than {step.timeout:.0f} s; log: {log}") from None
    if code:
        with log.open(errors="replace") as text:
            text.seek(start)
            error = first_error(text.read())
        raise RunError(f"{step.what} failed:\n{error}\nlog: {log}")


def first_error(text: str) -> str:
    """Return the first real error in the output of a build, with the lines that belong to it."""
    lines = text.splitlines()
    for pattern in (ERROR, LATER_ERROR):
        for number, line in enumerate(lines):
            if pattern.search(line):
                return "\n".join(error_lines(lines[number:]))
    return "\n".join(line for line in lines[-ERROR_LINES:] if line.strip()) or "no output"


def error_lines(lines: list[str]) -> list[str]:
    """Return an error and the lines that explain it, at most ERROR_LINES.

    It ends at a blank line, at the next error and at the next step; CMake's continues while lines are indented.
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
