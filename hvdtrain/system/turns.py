"""Let the processes of one user on one host take turns, by a lock in a folder that only this user can write to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from hvdtrain.system import activity
from hvdtrain.system.errors import RunError
from hvdtrain.system.limits import LockLimits
from hvdtrain.system.processes import Deadline

UNSUPPORTED_LOCK_ERRORS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # from file systems without flock


@contextlib.contextmanager
def hold_host_lock(
    name: str, what: str, environ: Mapping[str, str] = os.environ, limits: LockLimits | None = None
) -> Iterator[None]:
    """Run the block in one process of this user on this host at a time.

    A long wait is announced on standard error, with the process that holds the lock.

    Args:
        name: of the lock: a part of a file's name.
        what: what the block does, to be shown: "load the data of 'mine'".
        environ: names the folders of the user, and may limit the wait.
        limits: how long to wait; None: as the environment says.

    Raises:
        RunError: another process does not release the lock in time.
        UserError: the limit in the environment is not a number of seconds.
    """
    limits = limits or LockLimits.from_environment(environ)
    lock = open_lock_file(f"{socket.gethostname()}-{name}.lock", environ)
    if lock is None:
        print(
            "hvdtrain: warning: processes of this host do not take turns: neither XDG_RUNTIME_DIR nor ~/.cache is a "
            f"folder that only this user can write to; they will {what} at the same time",
            file=sys.stderr,
        )
        yield
        return
    descriptor, path = lock
    try:
        # Endless for the hang limit: this wait has a limit of its own.
        with activity.temporary_activity(f"waiting for another process to {what}", endless=True):
            locked = wait_for_lock(descriptor, path, what, limits)
        if locked:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough if a child process holds the file too
        os.close(descriptor)


def open_lock_file(name: str, environ: Mapping[str, str]) -> tuple[int, Path] | None:
    """Open a lock file in the first of the user's folders that can be made private.

    Returns:
        the file's descriptor and path; None if there is no such folder.
    """
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
    """Return the folders in which the user's lock files may be, best first."""
    found = []
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        found.append(Path(runtime) / "hvdtrain")
    if cache := environ.get("XDG_CACHE_HOME"):
        found.append(Path(cache) / "hvdtrain" / "locks")
    elif home := environ.get("HOME"):
        found.append(Path(home) / ".cache" / "hvdtrain" / "locks")
    return [folder for folder in found if folder.is_absolute()]


def open_private_folder(folder: Path) -> int:
    """Create and open a folder that only this user may enter. Raises OSError if it is another user's, or a link."""
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


def wait_for_lock(descriptor: int, path: Path, what: str, limits: LockLimits) -> bool:
    """Wait for a lock and return True; return False if the file system has no locks.

    Raises:
        RunError: it is not free within the limit, or cannot be locked.
    """
    deadline, silent, announced = Deadline(limits.wait), Deadline(limits.silent), False
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
        holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
        who = f"pid {holder}" if holder.isdecimal() else "a process"
        if deadline.expired:
            raise RunError(
                f"{who} has held {path}, to {what}, for more than {limits.wait:.0f} s: end it, or set "
                "HVDTRAIN_DATA_WAIT to more seconds"
            )
        if silent.expired and not announced:
            announced = True
            print(
                f"hvdtrain: waiting up to {limits.wait:.0f} s for {who} on this host to {what} (lock {path})",
                file=sys.stderr,
                flush=True,
            )
        deadline.wait(limits.poll)
