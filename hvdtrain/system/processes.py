"""Start processes and limit the time they take. Standard library only: the discovery script starts every second.

    run_process(command, seconds)          run to the end, with its output; raises ProcessTimeout
    Child(command)                         a process that runs next to this one and is ended as a group
    completed_children(children, deadline) read the output of many at the same time
    Deadline(seconds)                      when to stop waiting, by the monotonic clock

Every child leads a session and process group of its own, and what it has started is killed with it. `subprocess.run`
kills only the child itself and then waits for whoever still holds its output.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from hvdtrain.system.errors import RunError

CAPTURE, DISCARD, TO_STDOUT = subprocess.PIPE, subprocess.DEVNULL, subprocess.STDOUT  # what to do with output
READ_SIZE = 1 << 16  # bytes


class ProcessTimeout(RunError):
    """A process did not end within its time limit.

    Attributes:
        seconds: the time limit.
        output: what the process had printed by its end.
    """

    def __init__(self, program: str, seconds: float, output: str = "") -> None:
        super().__init__(f"{program} took longer than {seconds:g} s")
        self.seconds, self.output = seconds, output


class OutputTooLarge(Exception):
    """A process printed more than the limit; it has been killed."""


class Deadline:
    """A time limit that starts when this object is made, by the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ends_at = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds left, 0 if none are."""
        return max(0.0, self.ends_at - time.monotonic())

    @property
    def expired(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self.ends_at

    def wait(self, poll: float) -> bool:
        """Sleep for `poll` seconds, or as long as time is left; return whether the caller may look again.

        deadline = Deadline(5.0)
        while not done():
            if not deadline.wait(0.1):
                raise RunError("not done within 5 s")
        """
        left = self.left()
        time.sleep(min(poll, left))
        return left > 0


@dataclass(frozen=True)
class FinishedProcess:
    """What a process left: its exit code (below 0: a signal's number) and what it printed."""

    exit_code: int
    stdout: str
    stderr: str


class Child:
    """A process that runs next to this one, with its output and the process group that ends with it.

    As a context manager it kills what still runs at the end of the block.

    Attributes:
        process: the process itself, for those who wait for it with others.
        program: the first word of its command.
        pid: its process ID, and that of its group.
        started_at: when it was started, by `time.time`.
        stdout: what has been read of its standard output so far; of standard error too with stderr=TO_STDOUT.
        stderr: what has been read of its standard error so far.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        stdout: int | IO[bytes] | None = CAPTURE,
        stderr: int | IO[bytes] | None = CAPTURE,
        new_session: bool = True,
    ) -> None:
        """Start it.

        Args:
            command: the program and its arguments.
            env: its environment; None: this process's.
            cwd: its working directory; None: this process's.
            stdout: CAPTURE, DISCARD, a file, or None for this process's own.
            stderr: likewise, or TO_STDOUT.
            new_session: False leaves it in this process's group, where the terminal's Ctrl-C reaches it as well;
                signals then go to it alone.

        Raises:
            OSError, ValueError: it cannot be started.
        """
        self.program, self.started_at = str(command[0]), time.time()
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=new_session,
        )
        self.pid = self.process.pid
        self.stdout, self.stderr = bytearray(), bytearray()
        self._leads_group = new_session

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_group()

    def open_pipes(self) -> list[tuple[IO[bytes], bytearray]]:
        """Return the pipes that are still open, each with where its output is collected."""
        pipes = ((self.process.stdout, self.stdout), (self.process.stderr, self.stderr))
        return [(pipe, output) for pipe, output in pipes if pipe is not None and not pipe.closed]

    def exit_code(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self.process.poll()

    def wait_for_exit(self, deadline: Deadline) -> int:
        """Wait until it ends and return its exit code.

        Raises:
            ProcessTimeout: it still runs at the deadline.
        """
        try:
            return self.process.wait(deadline.left())
        except subprocess.TimeoutExpired:
            raise ProcessTimeout(self.program, deadline.seconds) from None

    def output_lines(self, deadline: Deadline) -> Iterator[str]:
        """Yield each line of standard output, with its newline, as it arrives.

        Raises:
            ProcessTimeout: standard output is still open at the deadline.
        """
        done = 0
        for _ in read_children([self], deadline):
            while (end := self.stdout.find(b"\n", done)) >= 0:
                line, done = self.stdout[done : end + 1], end + 1
                yield line.decode(errors="replace").replace("\r\n", "\n")
        if rest := self.stdout[done:]:
            yield rest.decode(errors="replace")
        if self.open_pipes():
            raise ProcessTimeout(self.program, deadline.seconds)

    def send_signal(self, number: int) -> None:
        """Send a signal to the group, unless the process has ended and been waited for."""
        if self.process.returncode is not None:  # its number may be another's by now
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._leads_group:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)

    def terminate_group(self, grace: float) -> None:
        """Send SIGTERM to the group, and SIGKILL if the process still runs `grace` seconds later; keep its output."""
        deadline = Deadline(grace)
        self.send_signal(signal.SIGTERM)
        for _ in read_children([self], deadline):
            pass
        with contextlib.suppress(ProcessTimeout):
            self.wait_for_exit(deadline)
        self.kill_group()

    def kill_group(self) -> None:
        """Kill the group if the process has not been waited for, wait for it, and close its pipes."""
        self.send_signal(signal.SIGKILL)
        self.process.wait()
        for pipe, _ in self.open_pipes():
            pipe.close()


def read_children(children: Iterable[Child], deadline: Deadline) -> Iterator[Child]:
    """Read the output of children until all have closed it or the deadline; yield a child after each piece of it."""
    with selectors.DefaultSelector() as selector:
        for child in children:
            for pipe, output in child.open_pipes():
                selector.register(pipe, selectors.EVENT_READ, (child, output))
        while selector.get_map() and (left := deadline.left()) > 0:
            for key, _ in selector.select(left):
                child, output = key.data
                data = os.read(key.fd, READ_SIZE)
                output += data
                if not data:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
                yield child


def completed_children(children: Sequence[Child], deadline: Deadline) -> Iterator[Child]:
    """Yield each child once it has closed its output; those that have not at the deadline never come."""
    for child in read_children(children, deadline):
        if not child.open_pipes():
            yield child


def run_process(
    command: Sequence[str],
    seconds: float,
    *,
    env: Mapping[str, str] | None = None,
    merge_stderr: bool = False,
    max_bytes: int | None = None,
    grace: float = 0.0,
) -> FinishedProcess:
    """Run a command to its end and return its exit code and output.

    Args:
        command: the program and its arguments.
        seconds: its time limit; its process group is then ended.
        env: its environment; None: this process's.
        merge_stderr: whether standard error goes where standard output does.
        max_bytes: of output on either stream before it is killed; None: no limit.
        grace: seconds between SIGTERM and SIGKILL at the time limit; 0: SIGKILL at once.

    Raises:
        OSError, ValueError: it cannot be started.
        ProcessTimeout: it did not end in time.
        OutputTooLarge: it printed more than max_bytes.
    """
    deadline = Deadline(seconds)
    with Child(command, env=env, stderr=TO_STDOUT if merge_stderr else CAPTURE) as child:
        try:
            for _ in read_children([child], deadline):
                if max_bytes is not None and max(len(child.stdout), len(child.stderr)) > max_bytes:
                    raise OutputTooLarge
            if child.open_pipes():
                raise ProcessTimeout(child.program, seconds)
            exit_code = child.wait_for_exit(deadline)
        except BaseException as error:  # Ctrl-C as well
            if grace:
                child.terminate_group(grace)
            if isinstance(error, ProcessTimeout):
                error.output = child.stdout.decode(errors="replace")
            raise
    stdout, stderr = (bytes(output).decode(errors="replace") for output in (child.stdout, child.stderr))
    return FinishedProcess(exit_code, stdout, stderr)
