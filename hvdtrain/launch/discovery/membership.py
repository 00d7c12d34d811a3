"""The live hosts of a membership folder, which `hvdtrain agent` writes on each host.

A host is alive while its heartbeat has changed within `stale` seconds by this machine's own clock since boot. Neither
times in the files nor those of the files count: they come from other clocks, of the hosts and of the file server, which
may be wrong and may be set back. So what was seen when is kept from one call to the next, in a state file on this
machine. A host in the folder goes through these states:

    unseen --> seen once --- heartbeat changes ---> alive --- settle seconds ---> offered
      ^            |                                  |                             |
      '------------+----- no heartbeat for `stale` seconds, a notice, or another boot
                          (a flap, unless there was a notice; more than `flaps` within `within` minutes: not offered)

Whatever the file system does, a call ends within `limit` seconds and a little: if it hangs, with the last good answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from hvdtrain.launch.discovery.folder_reader import Member, boot_clock, read_in_time, read_object
from hvdtrain.preemption.source import KERNEL_BOOT_ID
from hvdtrain.system.errors import RunError
from hvdtrain.system.files import replace_file

FORGET_SECONDS = 60.0  # without a call, after which nothing of before counts


@dataclass(frozen=True, kw_only=True)
class MembershipOptions:
    """How long a host may be silent, and how often it may go.

    Attributes:
        stale: seconds without a heartbeat until a host is dead.
        settle: seconds that a host has to be alive until it is offered.
        flaps: how often a host may go within `within` without notice.
        within: minutes.
        limit: seconds that the folder may take to answer.
    """

    stale: float = 10
    settle: float = 3
    flaps: int = 3
    within: float = 10
    limit: float = 1.5


@dataclass(frozen=True)
class HostHistory:
    """What calls until now have seen of a host; times are seconds in which somebody looked (`FolderHistory.watched`).

    Attributes:
        boot_id: of its last life; None if it was not in the folder.
        beat: its last heartbeat.
        changed: when that changed; None before it did.
        alive_since: since when it has been alive; None if it is not.
        flaps: when it went without notice.
    """

    boot_id: str | None = None
    beat: list[float] | None = None
    changed: float | None = None
    alive_since: float | None = None
    flaps: list[float] = field(default_factory=list)


@dataclass
class FolderHistory:
    """The state file.

    Attributes:
        boot: of this machine, on whose clock `called` is.
        called: when the last call was, by this machine's clock since boot.
        watched: seconds in which calls followed each other and the folder answered. It stands still while nobody looks
            or nobody can: no host must go because of that.
        failed: the last call got no answer.
        answer: the last good one; None before the first.
        hosts: by name.
    """

    boot: str
    called: float
    watched: float = 0.0
    failed: bool = False
    answer: list[str] | None = None
    hosts: dict[str, HostHistory] = field(default_factory=dict)


def find_live_hosts(folder: Path, options: MembershipOptions, state: Path | None = None) -> list[str]:
    """Return `host:slots` of each host that is to be used now, sorted.

    Args:
        folder: the agents' membership folder.
        options: how long a host may be silent, and how often it may go.
        state: what earlier calls have seen; None for a file of this folder's own among the temporary files.

    Raises:
        OSError: the folder or the state cannot be read, and there is no earlier answer.
        RunError: likewise; or another user owns the folder of states.
    """
    state = state or private_folder() / hashlib.sha256(bytes(folder.absolute())).hexdigest()[:24]
    history = load_history(state)
    now = boot_clock()
    gap = now - history.called
    if gap > FORGET_SECONDS or gap < 0:  # another launch
        history, gap = FolderHistory(history.boot, now), 0.0
    history.watched += 0.0 if history.failed else min(gap, options.stale / 2)
    history.called, history.failed = now, False
    try:
        members = read_in_time(folder, options.limit, state.with_suffix(".lock"))
    except (OSError, RunError):
        history.failed = True
        save_history(state, history)
        if history.answer is None:
            raise
        return history.answer
    update_history(history, members, options)
    save_history(state, history)
    return history.answer or []


def update_history(history: FolderHistory, members: Mapping[str, Member], options: MembershipOptions) -> None:
    """Add what the folder holds now, and set the answer."""
    hosts = {
        name: update_host(history.hosts.get(name, HostHistory()), members.get(name), history.watched, options)
        for name in history.hosts.keys() | members.keys()
    }
    history.hosts = {name: host for name, host in hosts.items() if name in members or host.flaps}
    history.answer = sorted(
        f"{name}:{members[name].slots}"
        for name, host in history.hosts.items()
        if host.alive_since is not None
        and history.watched - host.alive_since >= options.settle
        and len(host.flaps) <= options.flaps
    )


def update_host(before: HostHistory, member: Member | None, now: float, options: MembershipOptions) -> HostHistory:
    """Return what is known of a host after another look at it.

    Args:
        before: what was known.
        member: what the folder holds of it; None if nothing.
        now: seconds in which somebody looked.
        options: how long a host may be silent, and how often it may go.
    """
    flaps = [when for when in before.flaps if now - when < options.within * 60]
    if member is None:
        was_alive = before.alive_since is not None
        return HostHistory(flaps=[*flaps, now] if was_alive else flaps)
    changed = before.changed
    if (member.boot_id, member.beat) != (before.boot_id, before.beat):
        # The first sight of a heartbeat does not show how old it is.
        changed = None if before.boot_id is None else now
    is_alive = changed is not None and now - changed <= options.stale and not member.draining
    alive_since = before.alive_since
    if alive_since is not None and not (is_alive and member.boot_id == before.boot_id):
        alive_since = None
        flaps += [] if member.draining else [now]
    if is_alive and alive_since is None:
        alive_since = now
    return HostHistory(member.boot_id, member.beat, changed, alive_since, flaps)


def private_folder() -> Path:
    """Return a folder for states to which no other user can write.

    Raises:
        RunError: another user has taken its name.
    """
    folder = Path(tempfile.gettempdir()) / f"hvdtrain-discovery-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise RunError(f"{folder} belongs to another user, or others can write to it; give --state")
    return folder


def load_history(state: Path) -> FolderHistory:
    """Return what earlier calls since this machine's boot have seen; an empty history if there is none."""
    boot = KERNEL_BOOT_ID.read_text().strip()
    try:
        history = FolderHistory(**read_object(state) or {})  # type: ignore[arg-type]
        hosts = {name: HostHistory(**host) for name, host in history.hosts.items()}  # type: ignore[arg-type]
    except (TypeError, AttributeError):  # nothing, or of another version
        return FolderHistory(boot, boot_clock())
    return replace(history, hosts=hosts) if history.boot == boot else FolderHistory(boot, boot_clock())


def save_history(state: Path, history: FolderHistory) -> None:
    """Write the state file."""
    replace_file(state, json.dumps(asdict(history)).encode())
