#!/usr/bin/env python3
"""Print `host:slots` for each host of a membership folder that is alive and is to stay.

    membership.py DIR [--stale 10] [--settle 3] [--flaps 3] [--within 10] [--limit 1.5] [--state FILE]

The folder is what `hvdtrain agent` writes: HOST.json with a counter, `beat`, that changes at each heartbeat, and
HOST.draining, a notice for the host's life with that boot_id. A host is alive while its heartbeat has changed within
--stale seconds by this machine's own clock since boot. Neither times in the files nor those of the files are looked at:
they come from other clocks, of the hosts and of the file server, which may be wrong and may be set back. So what was
seen when is kept from one call to the next, in --state, on this machine.

A host is offered once it has been alive for --settle seconds, and left out when it went more than --flaps times within
--within minutes other than by notice. Whatever the file system does, this ends within --limit seconds and a little:
where it hangs, with the last good answer, or else with exit 1.

Standard library only, Python 3.10 or later.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import select
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAME = re.compile(r"[A-Za-z0-9][\w.-]*\Z", re.ASCII)
MOST_SLOTS = 100_000
FORGET = 60.0  # seconds without a call after which nothing of before counts
UNKNOWN: dict[str, Any] = {"mark": None, "changed": None, "since": None, "flaps": []}


class Trouble(Exception):
    """Shown as one line."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Print host:slots for the hosts that are alive and are to stay.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the agents' --membership")
    parser.add_argument("--stale", type=float, default=10, help="seconds without a heartbeat until a host is dead")
    parser.add_argument("--settle", type=float, default=3, help="seconds alive until a host is offered")
    parser.add_argument("--flaps", type=int, default=3, help="how often a host may go within --within")
    parser.add_argument("--within", type=float, default=10, help="minutes")
    parser.add_argument("--limit", type=float, default=1.5, help="seconds that the folder may take to answer")
    parser.add_argument("--state", type=Path, help="default: a file of this folder's own among the temporary files")
    options = parser.parse_args()
    try:
        path = options.state or own_folder() / hashlib.sha256(bytes(options.folder.absolute())).hexdigest()[:24]
        answer = discover(options, path)
    except (OSError, Trouble) as error:
        print(f"membership.py: {options.folder}: {error}", file=sys.stderr)
        return 1
    sys.stdout.write("".join(f"{line}\n" for line in answer))
    return 0


def discover(options: argparse.Namespace, path: Path) -> list[str]:
    """The lines to print, sorted. Raises Trouble or OSError."""
    state, called = load_state(path), clock()
    gap = called - state.get("called", called)
    if gap > FORGET:  # another launch
        state, gap = {}, 0.0
    # Time stands still while nobody looks, or nobody can: no host shall go because of that.
    now = state.get("watched", 0.0) + (0.0 if state.get("failed") else min(gap, options.stale / 2))
    state |= {"boot": boot(), "called": called, "watched": now, "failed": False}
    try:
        found = read_in_time(options.folder, options.limit, path.with_suffix(".lock"))
    except (OSError, Trouble):
        save_state(path, state | {"failed": True})
        if "answer" not in state:
            raise
        answer: list[str] = state["answer"]
        return answer
    members, draining, hosts = found["members"], found["draining"], state.get("hosts", {})
    for name in hosts.keys() | members.keys():
        hosts[name] = look(hosts.get(name, UNKNOWN), members.get(name), name in draining, now, options)
    hosts = {name: host for name, host in hosts.items() if name in members or host["flaps"]}
    answer = sorted(
        f"{name}:{members[name]['slots']}"
        for name, host in hosts.items()
        if host["since"] is not None and now - host["since"] >= options.settle and len(host["flaps"]) <= options.flaps
    )
    save_state(path, state | {"answer": answer, "hosts": hosts})
    return answer


def look(
    before: dict[str, Any], member: dict[str, Any] | None, draining: bool, now: float, options: argparse.Namespace
) -> dict[str, Any]:
    """What is known of a host now: its last mark and when that changed, since when it has been alive, when it went."""
    mark = None if member is None else member["mark"]
    changed = before["changed"]
    if mark != before["mark"]:
        # The first sight of a mark does not tell how old it is.
        changed = None if before["mark"] is None else now
    alive = mark is not None and changed is not None and now - changed <= options.stale and not draining
    same_life = mark is not None and before["mark"] is not None and mark[0] == before["mark"][0]
    since, flaps = before["since"], [when for when in before["flaps"] if now - when < options.within * 60]
    if since is not None and not (alive and same_life):
        since = None
        if not draining:
            flaps.append(now)
    if alive and since is None:
        since = now
    return {"mark": mark, "changed": changed, "since": since, "flaps": flaps}


def read_in_time(folder: Path, limit: float, lock: Path) -> dict[str, Any]:
    """What the folder holds. Raises Trouble, also when it has not answered within `limit` seconds.

    A process of its own reads it: one that hangs in a dead file system cannot be interrupted, at times not even killed.
    While it is there it holds the lock, so that calls every second do not add one each.
    """
    end = clock() + limit
    held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if clock() >= end:
                raise Trouble("an earlier call still waits for the file system") from None
            time.sleep(0.02)
    receive, send = os.pipe()
    reader = os.fork()
    if reader == 0:
        # Nobody who waits for the end of this script's output shall wait for this process.
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        try:
            text = json.dumps(read_folder(folder))
        except Exception as error:
            text = json.dumps({"error": getattr(error, "strerror", None) or repr(error)})
        with os.fdopen(send, "w") as pipe:
            pipe.write(text)
        os._exit(0)
    os.close(send)
    os.close(held)  # the reader has it, too
    data = b""
    while select.select([receive], [], [], max(0.0, end - clock()))[0]:
        chunk = os.read(receive, 1 << 16)
        if not chunk:
            break
        data += chunk
    else:
        os.kill(reader, signal.SIGKILL)
        raise Trouble(f"no answer from the file system within {limit:g} s")
    os.waitpid(reader, 0)
    found: dict[str, Any] = json.loads(data or '{"error": "its reader was killed"}')
    if "error" in found:
        raise Trouble(found["error"])
    return found


def read_folder(folder: Path) -> dict[str, Any]:
    """members: {host: {slots, mark}}, and draining: those of them that have a notice for this life of theirs.

    A file that is no such record is passed over; a notice that is none counts, for it is there to keep a host out.
    """
    members, draining = {}, []
    for path in folder.iterdir():
        if path.suffix != ".json" or not NAME.match(path.stem):
            continue
        record = read_record(path) or {}
        slots = record.get("slots")
        if record.get("host") != path.stem or type(slots) is not int or not 0 < slots <= MOST_SLOTS:
            continue
        marks = [record.get(name) for name in ("boot_id", "started", "pid", "beat")]
        if any(mark is None for mark in marks):
            continue
        members[path.stem] = {"slots": slots, "mark": marks}
        notice = read_record(path.with_suffix(".draining"))
        if notice is not None and notice.get("boot_id", marks[0]) == marks[0]:
            draining.append(path.stem)
    return {"members": members, "draining": draining}


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object; an empty one if the file holds none; None if there is no file."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def clock() -> float:
    """Seconds since this machine's boot, the same for all processes, also those it slept; nobody can set it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def own_folder() -> Path:
    """A folder for states that nobody else can write to. Raises Trouble if somebody else has taken its name."""
    folder = Path(tempfile.gettempdir()) / f"hvdtrain-discovery-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    there = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or there.st_uid != os.getuid() or there.st_mode & 0o022:
        raise Trouble(f"{folder} belongs to somebody else; give --state")
    return folder


def load_state(path: Path) -> dict[str, Any]:
    """What earlier calls since this machine's boot have seen."""
    state = read_record(path) or {}
    return state if state.get("boot") == boot() else {}


def save_state(path: Path, state: dict[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    beside.write_text(json.dumps(state))
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
