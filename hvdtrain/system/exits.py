"""The end of a process whose command is done, while threads or children of a recipe may live on."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from typing import NoReturn

STRAGGLER_GRACE = 2.0  # seconds for threads and children of a recipe to end by themselves once the command is done
EXIT_HANDLERS_TIMEOUT = 10.0  # seconds for exit handlers


def exit_process(code: int) -> NoReturn:
    """End this process now that its command is done, whatever the recipe has left running in it.

    Python itself would wait for threads and for children of multiprocessing, for ever. They get GRACE seconds; then
    they are named and ended. Exit handlers run, for HANDLERS seconds at most.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises an error for a loader's worker that ends
    left = wait_for_stragglers(time.monotonic() + STRAGGLER_GRACE)
    if left:
        print(f"hvdtrain: the run is over; ending what the recipe left running: {', '.join(left)}", file=sys.stderr)
    stop_descendants(spare_daemons=True)
    watchdog = threading.Timer(EXIT_HANDLERS_TIMEOUT, _exit_without_handlers, [code])
    watchdog.daemon = True
    watchdog.start()
    with contextlib.suppress(BaseException):  # each handler's error is printed; the first one is raised as well
        atexit._run_exitfuncs()
        _finalize_mpi()
    stop_descendants()
    _flush_and_exit(code)


def _finalize_mpi() -> None:
    """Do what mpi4py does when Python ends, if it has started MPI: mpirun takes it for a failure otherwise."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()


def wait_for_stragglers(deadline: float) -> list[str]:
    """Wait until no thread or child process keeps Python from ending; those that still do at the deadline."""
    while True:
        threads = [
            f"thread {thread.name!r}"
            for thread in threading.enumerate()
            if thread is not threading.current_thread() and not thread.daemon
        ]
        children = [f"process {pid}" for pid, daemon in list_multiprocessing_children() if not daemon]
        if not (threads or children) or time.monotonic() > deadline:
            return threads + children
        time.sleep(0.02)


def list_multiprocessing_children() -> list[tuple[int | None, bool]]:
    """The living children of multiprocessing, and whether each is a daemon, which its exit handler ends."""
    module = sys.modules.get("multiprocessing")
    return [(child.pid, child.daemon) for child in module.active_children()] if module is not None else []


def stop_descendants(*, spare_daemons: bool = False) -> None:
    """End all processes that descend from this one.

    spare_daemons: but not multiprocessing's daemons (a loader's workers) and servers, which its exit handler ends.
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
        _, alive = psutil.wait_procs(children, timeout=1.0)
        for child in alive:
            with contextlib.suppress(psutil.Error):
                child.kill()


def _exit_without_handlers(code: int) -> None:
    print(f"hvdtrain: exit handlers took longer than {EXIT_HANDLERS_TIMEOUT:g} s: ended without them", file=sys.stderr)
    stop_descendants()
    _flush_and_exit(code)


def _flush_and_exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
