"""Processes of one user on one host take turns, by a lock in a folder that nobody else can write to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from hvdtrain.system import activity
from hvdtrain.system.errors import RunError
from hvdtrain.system.limits import read_time_limit

TURN_WAIT_VARIABLE = "HVDTRAIN_DATA_WAIT"  # in the environment: seconds to wait for the turn, instead of
DEFAULT_TURN_WAIT = 3600.0
SILENT_WAIT = 5.0  # seconds to wait without a word
LOCK_POLL_INTERVAL = 0.1  # seconds
UNSUPPORTED_LOCK_ERRORS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # from file systems without flock


@contextlib.contextmanager
def hold_host_lock(
    name: str, what: str, environ: Mapping[str, str] = os.environ, quiet: float = SILENT_WAIT
) -> Iterator[None]:
    """Let one process of this user on this host after the other do what is in the block.

    A wait is announced on standard error, with the process that is waited for.

    Args:
        name: of the turn: a part of a file's name.
        what: is done in the block, for people: "load the data of 'mine'".
        environ: names the folders of the user, and may limit the wait.
        quiet: seconds to wait without an announcement.

    Raises:
        RunError: another process does not end its turn in time.
        UserError: the limit in the environment is not a number of seconds.
    """
    limit = read_time_limit(environ, TURN_WAIT_VARIABLE, DEFAULT_TURN_WAIT)
    lock = open_lock_file(f"{socket.gethostname()}-{name}.lock", environ)
    if lock is None:
        print(
            "hvdtrain: warning: processes of this host do not take turns: neither XDG_RUNTIME_DIR nor ~/.cache is a "
            f"folder that only this user can write to; they {what} at the same time",
            file=sys.stderr,
        )
        yield
        return
    descriptor, path = lock
    try:
        with activity.temporary_activity(
            f"waiting for another process to {what}", endless=True
        ):  # that has a limit of its own
            locked = wait_for_lock(descriptor, path, what, limit, quiet)
        if locked:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # for a child process too, which may live longer
        os.close(descriptor)


def open_lock_file(name: str, environ: Mapping[str, str]) -> tuple[int, Path] | None:
    """Open a lock file in the first of the user's folders that is private; None if there is none."""
    for folder in lock_folders(environ):
        with contextlib.suppress(OSError):
            descriptor = open_private_folder(folder)
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                lock = os.open(name, flags, 0o600, dir_fd=descriptor)
            finally:
                os.close(descriptor)
            about = os.fstat(lock)
            if stat.S_ISREG(about.st_mode) and about.st_uid == os.geteuid():
                return lock, folder / name
            os.close(lock)
    return None


def lock_folders(environ: Mapping[str, str]) -> list[Path]:
    """Where the user's lock files may be, best first."""
    found = []
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        found.append(Path(runtime) / "hvdtrain")
    if cache := environ.get("XDG_CACHE_HOME"):
        found.append(Path(cache) / "hvdtrain" / "locks")
    elif home := environ.get("HOME"):
        found.append(Path(home) / ".cache" / "hvdtrain" / "locks")
    return [folder for folder in found if folder.is_absolute()]


def open_private_folder(folder: Path) -> int:
    """Make and open a folder that only this user may enter. Raises OSError if it is another user's, or a link."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "belongs to another user", os.fspath(folder))
        os.fchmod(descriptor, 0o700)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def wait_for_lock(descriptor: int, path: Path, what: str, limit: float, quiet: float) -> bool:
    """Wait for a lock, at most so many seconds; False if the file system has none. Raises RunError."""
    since, announced = time.monotonic(), False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno in UNSUPPORTED_LOCK_ERRORS:
                return False
            raise RunError(f"cannot lock {path}: {error.strerror}") from error
        waited = time.monotonic() - since
        holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
        who = f"pid {holder}" if holder.isdecimal() else "a process"
        if waited > limit:
            raise RunError(
                f"{who} holds {path}, to {what}, for more than {limit:.0f} s: end it, or set {TURN_WAIT_VARIABLE} "
                f"to more seconds"
            )
        if waited > quiet and not announced:
            announced = True
            print(
                f"hvdtrain: waiting up to {limit:.0f} s for {who} on this host to {what} (lock {path})",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(LOCK_POLL_INTERVAL)
