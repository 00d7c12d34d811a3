"""Elastic runs: the command line for horovodrun, and starting the whole job again where it is lost."""

from __future__ import annotations

import os
import secrets
import select
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hvdtrain.launch import discover
from hvdtrain.launch.command import find_program, horovodrun_ssh
from hvdtrain.launch.hosts import Host, host_text
from hvdtrain.launch.signals import Caught, signals
from hvdtrain.system.errors import EXIT_FAILED, EXIT_REQUEUE, UserError
from hvdtrain.system.ssh import Ssh
from hvdtrain.training.lease import RELAUNCH

COOL_DOWN = (10, 300)  # seconds, least and most, until a host on which a process was lost is tried again
BACK_OFF = (2.0, 60.0)  # seconds before the first relaunch, doubled each time, and the most


@dataclass(frozen=True)
class Elastic:
    """The hosts of an elastic run: those of a discovery script, or else a fixed list."""

    least: int
    most: int | None
    discovery: Path | None
    hosts: Sequence[Host]

    def check(self) -> None:
        """Raise UserError for numbers that do not fit, or a script that is none."""
        if self.most is not None and self.most < self.least:
            raise UserError(f"--max-np {self.most} is less than --min-np {self.least}")
        if self.discovery is None:
            slots = sum(host.slots for host in self.hosts)
            if slots < self.least:
                raise UserError(f"--min-np {self.least} is more than the {slots} slots of the hosts given")
            return
        if not self.discovery.is_file():
            raise UserError(f"--discovery {self.discovery}: there is no such file")
        if not os.access(self.discovery, os.X_OK):
            raise UserError(f"--discovery {self.discovery} is not executable: chmod +x {self.discovery}")

    def now(self) -> list[str]:
        """The names of the hosts that there are. Raises UserError where the script does not say."""
        if self.discovery is None:
            return [host.name for host in self.hosts]
        try:
            return list(discover.ask(str(self.discovery.absolute())))
        except discover.NoAnswer as error:
            raise UserError(f"--discovery {self.discovery} {error}") from None

    def told(self, state: Path) -> list[str]:
        """The names of the hosts that horovodrun was told of last. state: the discovery script's."""
        if self.discovery is None:
            return [host.name for host in self.hosts]
        return discover.read_standing(state)


def command_line(elastic: Elastic, command: Sequence[str], state: Path, *, nic: str | None, ssh: Ssh) -> list[str]:
    """The command line by which horovodrun runs `command` in each slot of the hosts that there are.

    state: a file for what the discovery script last said.
    """
    options = ["-np", str(elastic.least), "--min-np", str(elastic.least)]
    options += ["--max-np", str(elastic.most)] if elastic.most is not None else []
    options += ["--blacklist-cooldown-range", *map(str, COOL_DOWN)]
    script = [sys.executable, "-m", "hvdtrain.launch.discover"]
    if elastic.discovery is not None:
        script += [str(state), str(elastic.discovery.absolute())]
    else:  # horovodrun's -H fails in its elastic mode
        script += ["--hosts", host_text(elastic.hosts)]
    # horovodrun hands it to a shell.
    options += ["--host-discovery-script", shlex.join(script)]
    options += ["--network-interfaces", nic or "lo"]
    options += horovodrun_ssh(ssh)
    return [find_program("horovodrun"), "--gloo", *options, *command]


def keep_running(
    launch: Callable[[list[str], Mapping[str, str], Caught, Callable[[], list[str]]], tuple[int, bool]],
    elastic: Elastic,
    command: Callable[[bool], list[str]],
    environ: Mapping[str, str],
    *,
    nic: str | None,
    ssh: Ssh,
    relaunch: int,
) -> int:
    """Launch the job, and again up to `relaunch` times where it is lost as a whole; the last exit code.

    launch: runs a command line in an environment, heeding signals that are caught, and given the hosts that horovodrun
    was told of; the exit code, and whether that is final: a rank said why it failed, or the user asked for the end.
    command: what each slot runs, given whether it is to resume.
    """
    environ = {**environ, "HVDTRAIN_MIN_NP": str(elastic.least)}
    if relaunch:  # the run folder then belongs to all of these jobs, and they choose a checkpoint without being asked
        environ[RELAUNCH] = secrets.token_hex(8)
    attempt = 0
    with signals() as (received, woken):
        while True:
            with tempfile.TemporaryDirectory(prefix="hvdtrain-") as folder:
                state = Path(folder) / "hosts.json"
                line = command_line(elastic, command(attempt > 0), state, nic=nic, ssh=ssh)
                code, final = launch(line, environ, (received, woken), partial(elastic.told, state))
            if final or code not in (EXIT_FAILED, EXIT_REQUEUE) or attempt == relaunch:
                return code
            pause = min(BACK_OFF[0] * 2**attempt, BACK_OFF[1])
            attempt += 1
            print(f"hvdtrain: the job was lost: relaunch {attempt} of {relaunch} in {pause:g} s", file=sys.stderr)
            until = time.monotonic() + pause
            while not received and (left := until - time.monotonic()) > 0:
                if select.select([woken], [], [], left)[0]:
                    os.read(woken, 4096)
            if received:
                return EXIT_REQUEUE if received[0] == signal.SIGUSR1 else 128 + received[0]
