"""One owner of a run folder: RUN_DIR/owner.json is the lease of the run that writes to it.

                    create exclusively               every 10 s: set the file's time
      no owner.json ------------------> owner.json ---------------------------------+
            ^                            |      ^                                   |
            |     unlink, at the end     |      +-----------------------------------+
            +----------------------------+
            +----------------------------+
              take away: its process is dead, or it is of the same launch, or it has
              not been renewed for 60 s by the clock of the one that waits

The file itself is the lease. Of several that want to take it away, one can (see `take_away`). The holder renews it by
the descriptor that it has open, so that one that was frozen, and whose file was removed meanwhile, renews nothing of
its successor's. It checks that its file is still in place before it writes to the run folder, at most once
a second, and always before a checkpoint; if it is not, the run ends. Clocks of different hosts are never compared.

In an elastic run the lease belongs to the launch: each new rank 0 overwrites the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.system import activity, signed_http
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.system.files import SHARED_MODE
from hvdtrain.system.limits import read_time_limit
from hvdtrain.training.owner import Owner

OWNER_FILE = "owner.json"
FOLDER_LEASE_SECONDS = 60.0  # without a renewal after which a lease may be taken over
FOLDER_LEASE_VARIABLE = "HVDTRAIN_FOLDER_LEASE"  # in the environment, another number of seconds
# In the environment: the name of a launch that starts its jobs again, unattended; for a program that is not a recipe,
# how often it has been started again.
RELAUNCH_VARIABLE = "HVDTRAIN_RELAUNCH"
RENEWALS_PER_LEASE = 6  # in that time
CHECK_INTERVAL = 1.0  # seconds between two checks of the lease by its holder
RENEWER_JOIN_TIMEOUT = 0.2  # seconds that the renewing thread may take to end
CLAIM_WAIT = 0.02  # seconds for another process to remove a lease


def read_launch_name(environ: Mapping[str, str]) -> str | None:
    """Return the name of the launch that starts this run again if it is lost; None if none does."""
    name = environ.get(RELAUNCH_VARIABLE)
    if name is not None and name.isdecimal() and environ.get(signed_http.SECRET):
        return signed_http.authenticate(signed_http.read_key(environ), "launch")[:16]
    return name


class FolderLost(RunError):
    """The run folder does not belong to this run any more."""

    def __init__(self, text: str, same_launch: bool = False) -> None:
        """same_launch: it is another process of this run that owns it now."""
        super().__init__(text)
        self.same_launch = same_launch


@dataclass(frozen=True)
class LeaseSnapshot:
    """The content and status of owner.json at one moment."""

    data: bytes
    stat: os.stat_result
    owner: Owner | None

    def is_unchanged_since(self, other: LeaseSnapshot) -> bool:
        """Return whether it is the same lease, not renewed since."""
        same = os.path.samestat(self.stat, other.stat) and self.data == other.data
        return same and self.stat.st_mtime_ns == other.stat.st_mtime_ns

    def describe_holder(self) -> str:
        """Return who holds it, and its age by the clocks of two hosts, which is only to be printed."""
        age = max(0.0, time.time() - self.stat.st_mtime)
        who = (
            f"pid {self.owner.pid} on {self.owner.host}" if self.owner else f"a process that {OWNER_FILE} does not name"
        )
        return f"{who}, which renewed its lease {age:.0f} s ago"


class Lease:
    """This process's hold on its run's folder, if it has one: rank 0's. As a context, it is given up at the end."""

    def __init__(self, launch: str | None = None, seconds: float | None = None) -> None:
        """launch: the name of the launch that all its processes know; None: this process alone is one."""
        self.launch = launch or secrets.token_hex(8)
        self.seconds = seconds or read_time_limit(os.environ, FOLDER_LEASE_VARIABLE, FOLDER_LEASE_SECONDS)
        self.keep_for_launch = False  # for the next process of the launch
        self._folder: Path | None = None
        self._pending_folder: Path | None = None  # to be handed on
        self._folder_stat: os.stat_result | None = None
        self._descriptor = -1
        self._owner_bytes = b""
        self._last_check = 0.0
        self._stop_renewing = threading.Event()
        self._renewer: threading.Thread | None = None

    @property
    def is_held(self) -> bool:
        return self._folder is not None

    def acquire(self, folder: Path, *, wait: bool) -> None:
        """Become the owner of a folder.

        wait: for another run that may have died, for as long as its lease lasts.
        Raises UserError, which names the owner, if the folder has one that may be alive, OSError if that is unknown.
        """
        here = Owner.for_this_process(self.launch, self.seconds)
        path = folder / OWNER_FILE
        watched: LeaseSnapshot | None = None
        since = time.monotonic()
        while not self._create_owner_file(folder, here):
            found = read_lease(path)
            if found is None:
                continue
            owner = found.owner
            if owner is not None and (owner.launch == self.launch or owner.is_dead(here)):
                remove_lease(path, found)
                continue
            in_use = f"run folder {folder} is in use by {found.describe_holder()}"
            being_written = owner is None and time.monotonic() - since < min(CHECK_INTERVAL, self.seconds / 2)
            if not wait and not being_written:
                raise UserError(f"{in_use}: wait for its end, or choose another --run-dir")
            seconds = owner.seconds if owner is not None else self.seconds
            recent = time.time() - found.stat.st_mtime < seconds / 2
            if owner is not None and owner.is_local(here) and recent:  # alive, and by the same clock
                raise UserError(f"{in_use}: wait for its end, or end it")
            if watched is None and owner is not None:
                watched, since = found, time.monotonic()
                text = f"{in_use}: waiting up to {seconds:.0f} s, as that run may have died"
                print(f"hvdtrain: {text}", file=sys.stderr, flush=True)
            elif watched is not None and not found.is_unchanged_since(watched):
                raise UserError(f"{in_use}, while this run waited for it: wait for its end, or end it")
            if time.monotonic() - since > seconds:
                print(
                    f"hvdtrain: run folder {folder}: taking over from {found.describe_holder()}",
                    file=sys.stderr,
                    flush=True,
                )
                remove_lease(path, found)
                continue
            with activity.temporary_activity(
                f"waiting for the lease of run folder {folder}", endless=True
            ):  # it has its own limit
                time.sleep(min(CHECK_INTERVAL, seconds / (2 * RENEWALS_PER_LEASE)))

    def refuse_owned_folder(self, folder: Path) -> None:
        """Raise UserError, which names the owner, if a folder has one that may be alive."""
        found = read_lease(folder / OWNER_FILE)
        if found is not None and not (
            found.owner and found.owner.is_dead(Owner.for_this_process(self.launch, self.seconds))
        ):
            raise UserError(f"run folder {folder} is in use by {found.describe_holder()}: choose another --run-dir")

    def take_over(self, folder: Path) -> None:
        """Become the owner in place of another process of this launch, or stay it.

        It writes over what the other has written, for which a full disk has room. If it cannot be done now, `check`
        tries again.
        Raises FolderLost if the folder is not there or is not this run's any more.
        """
        self._pending_folder = None if self.is_held else folder
        self.check_ownership(now=self.is_held)

    def _overwrite_owner(self, folder: Path) -> None:
        path = folder / OWNER_FILE
        found = read_lease(path)
        if found is None or found.owner is None or found.owner.launch != self.launch:
            raise self._explain_loss(folder, found)
        data = Owner.for_this_process(self.launch, self.seconds).encode()
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pwrite(file, data, 0)
            os.fsync(file)
            self._start_holding(folder, file, data)
        except OSError:
            os.close(file)
            raise
        self._pending_folder = None

    def _create_owner_file(self, folder: Path, here: Owner) -> bool:
        """Create owner.json and hold it; return False if it exists."""
        data = here.encode()
        try:
            file = os.open(folder / OWNER_FILE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, SHARED_MODE)
        except FileExistsError:
            return False
        try:
            os.write(file, data)
            os.fsync(file)
            self._start_holding(folder, file, data)
        except OSError:
            os.close(file)
            (folder / OWNER_FILE).unlink(missing_ok=True)
            raise
        return True

    def _start_holding(self, folder: Path, file: int, data: bytes) -> None:
        """Start to renew the lease that was written to an open file."""
        self._folder_stat = folder.stat()
        self._folder, self._descriptor, self._owner_bytes, self._last_check = folder, file, data, time.monotonic()
        self._stop_renewing = threading.Event()
        self._renewer = threading.Thread(
            target=renew_lease, args=(file, self.seconds / RENEWALS_PER_LEASE, self._stop_renewing), daemon=True
        )
        self._renewer.start()

    def check_ownership(self, *, now: bool = False) -> None:
        """Raise FolderLost if the folder is not this run's any more; called before something is written.

        Does nothing if this process holds no lease, or looked within the last second, unless `now`.
        Raises OSError if it cannot be found out, and `now`.
        """
        if not now and time.monotonic() - self._last_check < CHECK_INTERVAL:
            return
        try:
            if self._pending_folder is not None:
                self._overwrite_owner(self._pending_folder)
            if self._folder is None:
                return
            found = read_lease(self._folder / OWNER_FILE)
            if not self._is_still_owner(found):
                raise self._explain_loss(self._folder, found)
        except OSError:
            if now:
                raise
        self._last_check = time.monotonic()

    def _is_still_owner(self, found: LeaseSnapshot | None) -> bool:
        assert self._folder is not None and self._folder_stat is not None
        if found is None or found.data != self._owner_bytes:
            return False
        same = os.path.samestat(found.stat, os.fstat(self._descriptor))
        return same and os.path.samestat(self._folder.stat(), self._folder_stat)

    def _explain_loss(self, folder: Path, found: LeaseSnapshot | None) -> FolderLost:
        if not folder.is_dir():
            return FolderLost(f"run folder {folder} was deleted, moved or unmounted during the run")
        known = self._folder_stat
        if found is None and known is not None and not os.path.samestat(folder.stat(), known):
            return FolderLost(f"run folder {folder} was replaced or unmounted during the run")
        if found is None:
            return FolderLost(
                f"{folder / OWNER_FILE} is gone: another run took the folder over and has ended, or it was deleted"
            )
        if found.data == self._owner_bytes:
            return FolderLost(f"run folder {folder} was replaced by a copy during the run")
        same = found.owner is not None and found.owner.launch == self.launch
        text = f"run folder {folder} was taken over by {found.describe_holder()}; this run did not respond in time"
        return FolderLost(text, same_launch=same)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the lease up, if it is held; unless it is to be kept for the next process of the launch."""
        if self._folder is None:
            return
        self._stop_renewing.set()
        if self._renewer is not None:
            self._renewer.join(RENEWER_JOIN_TIMEOUT)
        with contextlib.suppress(OSError):
            found = read_lease(self._folder / OWNER_FILE)
            if not self.keep_for_launch and found is not None and found.data == self._owner_bytes:
                remove_lease(self._folder / OWNER_FILE, found)
        os.close(self._descriptor)
        self._folder = None


def renew_lease(file: int, every: float, stop: threading.Event) -> None:
    """Set the time of a file until `stop` is set; a thread does it, so that a long step does not matter."""
    while not stop.wait(every):
        with contextlib.suppress(OSError):
            os.utime(file)


def read_lease(path: Path) -> LeaseSnapshot | None:
    """Return a lease, None if there is none. Raises OSError."""
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            data = file.read(65536)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return LeaseSnapshot(data, stat, Owner.decode(data))


def remove_lease(path: Path, judged: LeaseSnapshot) -> None:
    """Remove a lease, but not one that has taken its place since it was read.

    Of several that want to remove the same one, only that which has made the claim's file does. It looks again then:
    what it finds is either the lease that it has judged, which nobody else removes now, or a later one.
    """
    claim = path.with_name(f".{path.name}.{hashlib.sha256(judged.data).hexdigest()[:16]}")
    try:
        os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, SHARED_MODE))
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - claim.stat().st_mtime > FOLDER_LEASE_SECONDS:  # left by a process that was killed
                claim.unlink()
        time.sleep(CLAIM_WAIT)
        return
    try:
        found = read_lease(path)
        if found is not None and found.data == judged.data:
            path.unlink(missing_ok=True)
    finally:
        claim.unlink(missing_ok=True)
