"""End a process whose command is done, even if threads or child processes of a recipe still run."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from typing import NoReturn

from hvdtrain.system.limits import ExitLimits
from hvdtrain.system.processes import Deadline


def exit_process(code: int) -> NoReturn:
    """End this process with an exit code, whatever the recipe has left running in it.

    Python itself would wait for threads and for children of multiprocessing without a limit. Here they get
    `ExitLimits.stragglers` seconds and are then named and ended. Exit handlers run, within a limit as well.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error when a loader's worker ends
    left = wait_for_stragglers(ExitLimits.stragglers)
    if left:
        print(f"hvdtrain: the run is over; ending what the recipe left running: {', '.join(left)}", file=sys.stderr)
    stop_descendants(spare_daemons=True)
    watchdog = threading.Timer(ExitLimits.exit_handlers, _exit_without_handlers, [code])
    watchdog.daemon = True
    watchdog.start()
    with contextlib.suppress(BaseException):  # each handler's error is printed; the first one is raised as well
        atexit._run_exitfuncs()
        _finalize_mpi()
    stop_descendants()
    _flush_and_exit(code)


def _finalize_mpi() -> None:
    """Finalize MPI if mpi4py has started it, as mpi4py does when Python ends; mpirun reports a failure otherwise."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()


def wait_for_stragglers(seconds: float) -> list[str]:
    """Wait until no thread or child process keeps Python from ending; return the names of those that still do."""
    deadline = Deadline(seconds)
    while True:
        threads = [
            f"thread {thread.name!r}"
            for thread in threading.enumerate()
            if thread is not threading.current_thread() and not thread.daemon
        ]
        children = [f"process {pid}" for pid, daemon in list_multiprocessing_children() if not daemon]
        if not (threads or children) or not deadline.wait(0.02):
            return threads + children


def list_multiprocessing_children() -> list[tuple[int | None, bool]]:
    """Return the process IDs of multiprocessing's living children, and whether each is a daemon.

    Multiprocessing's own exit handler ends the daemons.
    """
    module = sys.modules.get("multiprocessing")
    return [(child.pid, child.daemon) for child in module.active_children()] if module is not None else []


def stop_descendants(*, spare_daemons: bool = False) -> None:
    """End all processes that descend from this one.

    Args:
        spare_daemons: leave out multiprocessing's daemons (a loader's workers) and servers; its exit handler ends them.
    """
    import psutil

    spared: set[int | None] = set()
    if spare_daemons:
        spared = {pid for pid, daemon in list_multiprocessing_children() if daemon}
        for module, name in (("resource_tracker", "_resource_tracker"), ("forkserver", "_forkserver")):
            server = getattr(sys.modules.get(f"multiprocessing.{module}"), name, None)
            spared |= {getattr(server, "_pid", None), getattr(server, "_forkserver_pid", None)} - {None}
    with contextlib.suppress(psutil.Error):
        children = [child for child in psutil.Process().children(recursive=True) if child.pid not in spared]
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.terminate()
        _, alive = psutil.wait_procs(children, timeout=ExitLimits.terminate)
        for child in alive:
            with contextlib.suppress(psutil.Error):
                child.kill()


def _exit_without_handlers(code: int) -> None:
    print(
        f"hvdtrain: exit handlers took longer than {ExitLimits.exit_handlers:g} s: ended without them", file=sys.stderr
    )
    stop_descendants()
    _flush_and_exit(code)


def _flush_and_exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
