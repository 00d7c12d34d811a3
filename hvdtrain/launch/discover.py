"""A discovery script between horovodrun and the user's: it answers in time, and only what can be relied on.

Run as `python -m hvdtrain.launch.discover STATE SCRIPT` once a second. A script that fails, hangs, or prints what is
no host leaves the last good answer standing; a host counts as come, or as gone, when two answers in turn say so.
Standard library only: it starts once a second.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SECONDS = 5.0  # for the script to answer
LINE = re.compile(r"([A-Za-z0-9][\w.-]*)(?::([1-9]\d*))?", re.ASCII)


class NoAnswer(Exception):
    """The script gave no answer that can be used; says why."""


def ask(script: str) -> dict[str, int]:
    """The script's hosts and their slots; a host without slots has one. Raises NoAnswer."""
    try:
        process = subprocess.Popen(
            [script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise NoAnswer(f"cannot be run: {error.strerror}") from None
    with process:
        try:
            said, complained = process.communicate(timeout=SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise NoAnswer(f"took longer than {SECONDS:g} s") from None
    if process.returncode != 0:
        raise NoAnswer(f"ended with code {process.returncode}: {(complained.strip().splitlines() or [''])[-1]}")
    hosts = {}
    for line in said.splitlines():
        if not line.strip():
            continue
        match = LINE.fullmatch(line.strip())
        if not match:
            raise NoAnswer(f"printed {line.strip()!r}, which is neither `host` nor `host:slots`")
        hosts[match[1]] = int(match[2] or 1)
    if not hosts:
        raise NoAnswer("printed no host")
    return hosts


def settle(standing: Mapping[str, int], last: Mapping[str, int] | None, now: Mapping[str, int]) -> dict[str, int]:
    """What is told to horovodrun: what stood until now, changed where the last two answers agree on it."""
    if last is None:  # the first answer of all
        return dict(now)
    settled = dict(standing)
    for host in {*standing, *now}:
        if now.get(host) == last.get(host):
            settled.pop(host, None)
            if host in now:
                settled[host] = now[host]
    return settled


def main(state_file: Path, script: str) -> int:
    state = json.loads(state_file.read_text()) if state_file.exists() else {"standing": {}, "last": None}
    try:
        now = ask(script)
        state = {"standing": settle(state["standing"], state["last"], now), "last": now}
        beside = state_file.with_name(f".{state_file.name}.new")
        beside.write_text(json.dumps(state))
        beside.replace(state_file)
    except NoAnswer as error:
        print(f"discovery script {script} {error}; its last good answer stands", file=sys.stderr)
        if not state["standing"]:
            return 1
    for host, slots in sorted(state["standing"].items()):
        print(f"{host}:{slots}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
