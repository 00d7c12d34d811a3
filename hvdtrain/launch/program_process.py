"""The process of a rank's program, under a keeper that leaves nothing of it running.

    program_rank (reports, passes signals on)  --pipe-->  keeper  -->  the program  -->  its own children

The keeper is a fork of the process that reports, in a session of its own, and inherits what loses its parent. When the
program ends it ends what the program has left running; when its pipe closes, because the process that reports was
killed, it kills all at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hvdtrain.launch.guard import terminate_guarded_processes
from hvdtrain.system.errors import EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND
from hvdtrain.system.limits import ExitLimits
from hvdtrain.system.process_control import become_subreaper, die_with_parent
from hvdtrain.system.signals import STOP_SIGNALS, SignalInbox, describe_deadly_signal

# A shell waits for its command before it acts on a signal: it gets one together with its command, as in a terminal.
SHELLS = {"sh", "bash", "dash", "ash", "zsh", "ksh", "mksh", "busybox", "fish", "csh", "tcsh"}


@dataclass
class ProgramProcess:
    """A program that runs, or has ended.

    Attributes:
        pid: its process ID, and that of its process group.
        keeper: the keeper's process ID.
        status: becomes readable when it has ended.
        life: closing it ends the program at once; -1 once it is closed.
    """

    pid: int
    keeper: int
    status: int
    life: int

    def send_signal(self, number: int) -> None:
        """Send a signal to the program alone, which decides what its children get of it; a shell's to its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if is_shell(self.pid):
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Have the keeper kill the program and all that it has started."""
        life, self.life = self.life, -1  # first: a thread that watches the launch may kill it at the same time
        if life >= 0:
            os.close(life)

    def wait_for_end(self) -> int:
        """Wait until the program has ended and nothing of it is left; return its exit code, below 0 for a signal."""
        text = read_status(self.status)
        os.waitpid(self.keeper, 0)
        return int(text) if text else -signal.SIGKILL


def start_program(
    command: Sequence[str], environ: Mapping[str, str], *, stdout: int | None = None, stderr: int | None = None
) -> ProgramProcess:
    """Start a program under a keeper.

    Args:
        command: the program and its arguments.
        environ: its environment.
        stdout: a descriptor for its standard output; None: this process's.
        stderr: likewise.

    Raises:
        OSError: it cannot be started; `errno` says why.
    """
    status, status_end = os.pipe()
    life_end, life = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    keeper = os.fork()  # this process has one thread only
    if keeper == 0:
        try:
            os.close(status)
            os.close(life)
            keep_program(command, environ, (stdout, stderr), status_end, life_end)
        finally:  # nothing of the other process may run here
            os._exit(1)
    os.close(status_end)
    os.close(life_end)
    first = read_status(status)
    if first.startswith("pid "):
        return ProgramProcess(int(first[4:]), keeper, status, life)
    os.waitpid(keeper, 0)
    os.close(status)
    os.close(life)
    number = int(first or 0)
    raise OSError(number, os.strerror(number))


def read_status(descriptor: int) -> str:
    """Return the next line of a keeper; "" if it was killed."""
    line = b""
    while (byte := os.read(descriptor, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode()


def keep_program(
    command: Sequence[str], environ: Mapping[str, str], streams: tuple[int | None, int | None], status: int, life: int
) -> NoReturn:
    """Be the keeper: start the program, wait for its end or that of the pipe, end what is left, and exit."""
    os.setsid()
    become_subreaper()
    # What a launcher sends to all its processes is for the one that reports.
    with SignalInbox(STOP_SIGNALS, wake_on_child_exit=True) as inbox:
        try:
            program = subprocess.Popen(
                command,
                env=dict(environ),
                stdout=streams[0],
                stderr=streams[1],
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            os.write(status, f"{error.errno}\n".encode())
            os._exit(1)
        for stream in (1, 2, *(one for one in streams if one is not None)):
            with contextlib.suppress(OSError):  # else the end of the program would not end its streams
                os.close(stream)
        os.write(status, f"pid {program.pid}\n".encode())
        code: int | None = None
        while code is None:
            if life in select.select([life, inbox.fileno()], [], [])[0]:
                terminate_guarded_processes(patience=0.0)
                os._exit(1)
            inbox.clear_wakeups()
            code = reap_children(program.pid)
        terminate_guarded_processes(patience=ExitLimits.terminate)
        os.write(status, f"{code}\n".encode())
    os._exit(0)


def reap_children(pid: int) -> int | None:
    """Wait for children that have ended, inherited ones included; return the exit code of the program if it has."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == pid:
                code = os.waitstatus_to_exitcode(ended[1])
    return code


def is_shell(pid: int) -> bool:
    """Return whether a process is a shell."""
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).name in SHELLS  # noqa: PTH115 - may name a file that is gone
    except OSError:
        return False


def explain_start_error(program: str, error: OSError) -> tuple[int, str]:
    """Return the exit code, as of a shell, and the line for a program that cannot be started."""
    code = EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_EXECUTABLE
    return code, f"cannot start {program!r}: {error.strerror}"


def describe_end(code: int) -> str:
    """Return how a program ended, by its exit code; below 0 for a signal."""
    return f"exit code {code}" if code >= 0 else f"killed by {describe_deadly_signal(-code)}"
