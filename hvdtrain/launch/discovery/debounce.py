"""A discovery command between horovodrun and the user's script: it answers in time, and only what can be relied on.

Run as `python -m hvdtrain.launch.discovery.debounce STATE SCRIPT` once a second. A script that fails, hangs, floods, or
prints what is not a host leaves the last good answer valid; a host counts as new, or as gone, when two answers in turn
agree on it. Run with `--hosts a:2,b:2` it prints this fixed list, a host a line. It imports little.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from hvdtrain.launch.hosts import MAX_HOSTS, MAX_SLOTS_PER_HOST
from hvdtrain.system.files import replace_file
from hvdtrain.system.limits import LaunchLimits
from hvdtrain.system.processes import OutputTooLarge, ProcessTimeout, run_process

MAX_OUTPUT_BYTES = 1 << 20  # that are read of the script's output, and of its errors
HOST_LINE = re.compile(r"([A-Za-z0-9][\w.-]*)(?::([1-9]\d{0,8}))?", re.ASCII)


class DiscoveryError(Exception):
    """The script gave no answer that can be used; the text is why, and follows the script's name."""


def run_discovery_script(script: str) -> dict[str, int]:
    """Return the script's hosts and their slots; a host without slots has one. Raises DiscoveryError."""
    seconds = LaunchLimits.from_environment().discovery
    try:
        done = run_process([script], seconds, max_bytes=MAX_OUTPUT_BYTES)
    except (OSError, ValueError) as error:
        raise DiscoveryError(f"cannot be run: {getattr(error, 'strerror', None) or error}") from None
    except ProcessTimeout:
        raise DiscoveryError(f"took longer than {seconds:g} s") from None
    except OutputTooLarge:
        raise DiscoveryError(f"printed more than {MAX_OUTPUT_BYTES >> 20} MiB") from None
    if done.exit_code != 0:
        last_line = (done.stderr.strip().splitlines() or [""])[-1]
        raise DiscoveryError(f"ended with code {done.exit_code}: {last_line}")
    return parse_script_output(done.stdout)


def parse_script_output(output: str) -> dict[str, int]:
    """Return the hosts that a script printed, and their slots. Raises DiscoveryError."""
    hosts = {}
    for line in output.splitlines():
        if not line.strip():
            continue
        match = HOST_LINE.fullmatch(line.strip())
        if not match:
            raise DiscoveryError(f"printed {line.strip()[:200]!r}, which is neither `host` nor `host:slots`")
        hosts[match[1]] = int(match[2] or 1)
        if hosts[match[1]] > MAX_SLOTS_PER_HOST:
            raise DiscoveryError(f"printed {line.strip()!r}: more than {MAX_SLOTS_PER_HOST} slots for a host")
        if len(hosts) > MAX_HOSTS:
            raise DiscoveryError(f"printed more than {MAX_HOSTS} hosts")
    if not hosts:
        raise DiscoveryError("printed no host")
    return hosts


def apply_confirmed_changes(
    standing: Mapping[str, int], last: Mapping[str, int] | None, now: Mapping[str, int]
) -> dict[str, int]:
    """Return the hosts to report to horovodrun, and their slots.

    Args:
        standing: what was reported until now; a host changes if the last two answers agree on it.
        last: the answer before; None if `now` is the first, which is reported as it is.
        now: the newest answer.
    """
    if last is None:
        return dict(now)
    settled = dict(standing)
    for host in {*standing, *now}:
        if now.get(host) == last.get(host):
            settled.pop(host, None)
            if host in now:
                settled[host] = now[host]
    return settled


def read_reported_hosts(state_file: Path) -> list[str]:
    """Return the names of the hosts that were last reported to horovodrun; none before the first report."""
    return list(json.loads(state_file.read_text())["standing"]) if state_file.exists() else []


def main(state_file: Path, script: str) -> int:
    """Run the script and print the hosts to report; return the exit code.

    Args:
        state_file: what was reported, and the script's last answer, from one call to the next.
        script: the user's.
    """
    state = json.loads(state_file.read_text()) if state_file.exists() else {"standing": {}, "last": None}
    try:
        try:
            now = run_discovery_script(script)
        except DiscoveryError:
            raise
        except Exception as error:  # whatever it is, horovodrun must get an answer
            raise DiscoveryError(f"failed: {type(error).__name__}: {error}") from error
        state = {"standing": apply_confirmed_changes(state["standing"], state["last"], now), "last": now}
        replace_file(state_file, json.dumps(state).encode())
    except DiscoveryError as error:
        print(f"discovery script {script} {error}; its last good answer stays valid", file=sys.stderr)
        if not state["standing"]:
            return 1
    for host, slots in sorted(state["standing"].items()):
        print(f"{host}:{slots}")
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--hosts":
        print(sys.argv[2].replace(",", "\n"))
    else:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
