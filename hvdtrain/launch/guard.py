"""A process between `hvdtrain launch` and the launcher that leaves nothing running when launch ends, however it ends.

Run as `python -m hvdtrain.launch.guard FD COMMAND...`. Launch holds the other end of the pipe FD. When that end
closes, by intent or because launch was killed, the guard ends everything that descends from COMMAND. As a subreaper
it also inherits what lost its parent: horovodrun puts each rank in a session of its own.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

import psutil

from hvdtrain.system.limits import LaunchLimits
from hvdtrain.system.process_control import become_subreaper
from hvdtrain.system.processes import Deadline
from hvdtrain.system.signals import SignalInbox


def main(args: list[str]) -> int:
    """Run the command until it ends or the pipe closes; return its exit code, as a shell would."""
    pipe, command = int(args[0]), args[1:]
    os.set_inheritable(pipe, False)
    become_subreaper()
    # Signals to the guard itself mean what the closed pipe means. Under nohup, SIGHUP stays ignored.
    with SignalInbox((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), wake_on_child_exit=True) as inbox:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        while child.poll() is None and not inbox.received:
            ready = select.select([pipe, inbox.fileno()], [], [])[0]
            if pipe in ready:
                break
            inbox.clear_wakeups()
        code = child.poll()
        terminate_guarded_processes()
    if code is None:
        code = child.poll() or 128 + signal.SIGTERM
    return code if code >= 0 else 128 - code


def terminate_guarded_processes(patience: float = LaunchLimits.terminate) -> None:
    """Send SIGTERM to every descendant, SIGKILL `patience` seconds later, and return when none is left."""
    me = psutil.Process()
    asked: set[int] = set()
    asking, limit = Deadline(patience), Deadline(patience + LaunchLimits.kill)
    while True:
        # Only zombies that are children of the guard itself can be, and need to be, waited for.
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        alive = me.children(recursive=True)
        if not alive or limit.expired:
            return
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                if asking.expired:
                    process.kill()
                elif process.pid not in asked:
                    asked.add(process.pid)
                    process.terminate()
                    # One that is stopped would not see the signal.
                    process.resume()
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
