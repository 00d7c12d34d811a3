"""Batches of examples, loaded by processes that live as long as the run."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.util
import os
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from hvdtrain.recipe.order import Ids
from hvdtrain.system.errors import KnownError, RecipeError, RunError
from hvdtrain.system.other_frameworks import no_jax_fork_warning, refuse_in_loader
from hvdtrain.system.process_control import die_with_parent
from hvdtrain.system.processes import Deadline
from hvdtrain.system.recipe_errors import name_call
from hvdtrain.system.shared_memory import explain_full_shared_memory
from hvdtrain.torch.data import BatchDataset, BatchRequest

LOADER_EXIT_TIMEOUT = 2.0  # seconds for loader processes to end by themselves
MAX_TMPDIR_BYTES = 60  # bytes of TMPDIR that leave room for a socket's name in the 108 of unix(7)
# What a launcher, a batch system or a terminal sends to all processes of a job: the rank decides what comes of it.
RANK_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class RequestSampler:
    """What is to be loaded next, as the sampler of a DataLoader; each of its iterations takes up what was set last."""

    def __init__(self) -> None:
        self.requests: Iterator[BatchRequest] = iter(())

    def __iter__(self) -> Iterator[BatchRequest]:
        return self.requests


class BatchLoader:
    """Loads batches of a split: by `workers` processes, which `start` forks and `close` ends, or in this process."""

    def __init__(self, examples: BatchDataset, workers: int) -> None:
        self.examples, self.num_workers = examples, workers
        self._requests = RequestSampler()
        self._loader = DataLoader(
            examples,
            batch_size=None,  # a request is a batch
            sampler=self._requests,
            collate_fn=_pass_through,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_init_worker if workers else None,
            generator=torch.Generator(),  # the loader draws from it; the global generator stays ours
        )

    def start_workers(self) -> None:
        """Fork the processes, unless they are there and well."""
        if not self.num_workers or (
            self._worker_processes() and all(process.is_alive() for process in self._worker_processes())
        ):
            return
        self.close()
        wait_for_idle_threads()
        self._requests.requests = iter(())
        main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGCHLD)
        # They leave these signals to the rank from their first moment on: see _begin_worker.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, RANK_SIGNALS)
        try:
            with no_jax_fork_warning():
                iter(self._loader)
        except OSError as error:
            if full := explain_full_shared_memory(error, starting=True):
                raise full from error
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if (
            main and handler is not None
        ):  # torch's would raise wherever this process is when a loader process dies; `batches` finds it, too
            signal.signal(signal.SIGCHLD, handler)
        atexit.register(self.close)

    def load_batches(self, parts: Iterable[Ids], entropy: Sequence[int]) -> Iterator[tuple[Ids, Any]]:
        """Return the ids that were loaded and their batches, in order; see `load_requests`."""
        return self.load_requests(BatchRequest(ids, tuple(entropy)) for ids in parts)

    def load_requests(self, requests: Iterable[BatchRequest]) -> Iterator[tuple[Ids, Any]]:
        """Return the ids that were loaded and their batches, in order; `requests` is read no farther than needed.

        A later call ends an earlier one, also if that has batches left.

        Raises:
            RunError, RecipeError: see BatchDataset.load_batch; and for a loader process that has ended.
        """
        self.start_workers()
        self._requests.requests = iter(requests)
        loaded: Iterator[Any] | None = None
        while True:
            try:
                loaded = iter(self._loader) if loaded is None else loaded
                batch = next(loaded)
            except StopIteration:
                return
            except (OSError, EOFError, RuntimeError) as error:
                explained = self._explain_error(error)
                if explained is None:
                    raise
                raise explained from error
            if isinstance(batch, KnownError):
                raise batch
            yield batch

    def _explain_error(self, error: Exception) -> KnownError | None:
        """Return what to raise instead of an error of torch's loader: mostly one of its processes has ended."""
        name = name_call(self.examples.recipe, f"dataset({self.examples.split!r})")
        deadline = Deadline(1.0)  # its connections may break before it can be seen to have ended
        while self.num_workers and not deadline.expired:
            ended = [process.exitcode for process in self._worker_processes() if process.exitcode is not None]
            if ended:
                return RecipeError(f"a process that loads {name} {_describe_exit(ended[0])}")
            deadline.wait(0.01)
        if isinstance(error, RuntimeError):
            return explain_full_shared_memory(error)
        reason = str(error).strip().splitlines()[-1]
        return RunError(f"a process that loads {name} cannot pass on a batch: {reason}")

    def _worker_processes(self) -> list[Any]:
        iterator = self._loader._iterator
        return [] if iterator is None else list(iterator._workers)  # type: ignore[attr-defined]

    def close(self) -> None:
        """End the processes; those that do not end by themselves in GRACE seconds are killed."""
        processes = self._worker_processes()
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is None:
            return
        atexit.unregister(self.close)
        # torch alone would wait 10 s for each that is stuck, one after the other.
        timer = threading.Timer(LOADER_EXIT_TIMEOUT, lambda: [process.kill() for process in processes])
        timer.daemon = True
        timer.start()
        iterator._shutdown_workers()  # type: ignore[attr-defined]
        timer.cancel()


def _pass_through(loaded: Any) -> Any:
    return loaded


def _describe_exit(code: int) -> str:
    """Return how a process ended, by its exit code as multiprocessing has it, and the usual reason."""
    if code >= 0:
        return f"ended with code {code}"
    reasons = {signal.SIGKILL: ": is this host out of memory?", signal.SIGBUS: ": is /dev/shm full?"}
    return f"was killed by {signal.Signals(-code).name}{reasons.get(signal.Signals(-code), '')}"


def _ignore_signal(*_: object) -> None:
    """Handle a signal by doing nothing."""


def _init_worker(_: int) -> None:
    """In a loader process: end with the rank, leave JAX and signals to it, and have room for a socket."""
    die_with_parent()
    refuse_in_loader()
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:  # it has ended in the meantime
        os._exit(1)
    for number in RANK_SIGNALS:
        signal.signal(number, _ignore_signal)  # ignoring it would pass on to programs that the dataset starts
    signal.pthread_sigmask(signal.SIG_UNBLOCK, RANK_SIGNALS)
    if len(os.fsencode(tempfile.gettempdir())) > MAX_TMPDIR_BYTES:
        chosen, tempfile.tempdir = tempfile.tempdir, "/tmp"
        multiprocessing.util.get_temp_dir()  # a private folder, which this process keeps for its sockets
        tempfile.tempdir = chosen


def wait_for_idle_threads(seconds: float = 2.0) -> None:
    """Return when all other threads of this process sleep, or after so long; before it is forked.

    Horovod's thread, as it lets go of a tensor, takes a lock of Python's that a process forked in that moment waits for
    for ever. It sleeps when all that was handed to it is done.
    """
    own, tasks, deadline = threading.get_native_id(), Path("/proc/self/task"), Deadline(seconds)
    while tasks.exists() and not deadline.expired:
        others = [task / "stat" for task in tasks.iterdir() if int(task.name) != own]
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one has ended: look again
            if not any(stat.read_text().rpartition(")")[2].split()[0] == "R" for stat in others):
                return
        deadline.wait(0.001)
