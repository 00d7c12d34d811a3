"""A cluster by hand: `python -m tests.hosts up 4 --rate 1gbit`, then `run h0 -- hostname`, at last `down`.

One process, the holder, keeps the cluster: it is found by its command line, so that no file can tell of it wrongly.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys

import psutil

from tests.hosts.cluster import cluster, environment, missing
from tests.hosts.namespaces import start_in

HOLD = ["-m", "tests.hosts", "hold"]
READY = "ready"


def main(arguments: list[str]) -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.hosts", description="hosts h0, h1, ... on this machine")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("up", "start a cluster"), ("hold", "start one, and keep it until this process ends")):
        command = commands.add_parser(name, help=text)
        command.add_argument("hosts", type=int)
        command.add_argument("--rate", help="what each host may send: 1gbit, 100mbit")
        command.add_argument("--loopback-names", action="store_true", help="own names are 127.0.1.1, as on Debian")
    command = commands.add_parser("run", help="run a command on a host")
    command.add_argument("host")
    command.add_argument("words", nargs="+", metavar="-- COMMAND")
    commands.add_parser("down", help="end the cluster")
    given = parser.parse_args(arguments)
    if given.command == "up":
        return up(arguments[1:], given.hosts)
    if given.command == "hold":
        return hold(given)
    if given.command == "run":
        return run(given.host, given.words)
    return down()


def up(options: list[str], hosts: int) -> int:
    """Start a holder in the background, and say how to use its hosts."""
    if holder() is not None:
        return complain("a cluster is up already: python -m tests.hosts down")
    command = [sys.executable, *HOLD, *options]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # not our own: it stays open as long as the cluster
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    if said.strip() != READY:
        sys.stderr.write(said + process.stdout.read())
        return process.wait() or 1
    print(f"{hosts} hosts are up: h0 to h{hosts - 1}, each with ssh to all\n")
    print("python -m tests.hosts run h0 -- bash\npython -m tests.hosts run h0 -- ssh h1 hostname")
    print("python -m tests.hosts down")
    return 0


def hold(given: argparse.Namespace) -> int:
    """Keep a cluster until SIGTERM or Ctrl-C."""
    why = missing()
    if why:
        return complain(why)
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    for number in signals:
        signal.signal(number, lambda *_: sys.exit(0))
    with cluster(given.hosts, given.rate, loopback_names=given.loopback_names):
        print(READY, flush=True)
        while True:
            signal.pause()


def run(name: str, command: list[str]) -> int:
    """Run a command on a host, with this terminal; return its exit code."""
    kept = holder()
    children = kept.children() if kept else []
    found = [
        child.pid for child in children if child.cmdline()[-2:][1:] == [name] and "first.py" in child.cmdline()[-2]
    ]
    if not found:
        return complain(f"there is no host {name}" if kept else "no cluster is up: python -m tests.hosts up 2")
    with start_in(found[0], command, env=environment()) as process:
        # Ctrl-C reaches the command too: it decides.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = process.wait()
    return code if code >= 0 else 128 - code


def down() -> int:
    """End the holder, and with it the cluster."""
    kept = holder()
    if kept is None:
        return complain("no cluster is up")
    parts = kept.children()
    kept.terminate()
    _, left = psutil.wait_procs([kept, *parts], timeout=20)
    return complain(f"still there: {left}") if left else 0


def holder() -> psutil.Process | None:
    """The process that keeps a cluster, if there is one."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:4] == HOLD and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def complain(text: str) -> int:
    """Print what is wrong; return the exit code for that."""
    print(f"tests.hosts: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
