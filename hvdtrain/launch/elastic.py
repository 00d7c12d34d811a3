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
from hvdtrain.launch.command import find_program, horovodrun_ssh_options
from hvdtrain.launch.hosts import Host, format_hosts
from hvdtrain.launch.signals import SignalInbox, catch_stop_signals
from hvdtrain.system.errors import EXIT_FAILED, EXIT_REQUEUE, UserError
from hvdtrain.system.ssh import Ssh
from hvdtrain.training.lease import RELAUNCH_VARIABLE

COOLDOWN_RANGE = (10, 300)  # seconds, least and most, until a host on which a process was lost is tried again
RELAUNCH_BACKOFF = (2.0, 60.0)  # seconds before the first relaunch, doubled each time, and the most


@dataclass(frozen=True)
class ElasticOptions:
    """The hosts of an elastic run: those of a discovery script, or else a fixed list."""

    min_np: int
    max_np: int | None
    discovery_script: Path | None
    hosts: Sequence[Host]

    def check_options(self) -> None:
        """Raise UserError for numbers that do not fit, or a script that is none."""
        if self.max_np is not None and self.max_np < self.min_np:
            raise UserError(f"--max-np {self.max_np} is less than --min-np {self.min_np}")
        if self.discovery_script is None:
            slots = sum(host.slots for host in self.hosts)
            if slots < self.min_np:
                raise UserError(f"--min-np {self.min_np} is more than the {slots} slots of the hosts given")
            return
        if not self.discovery_script.is_file():
            raise UserError(f"--discovery {self.discovery_script}: there is no such file")
        if not os.access(self.discovery_script, os.X_OK):
            raise UserError(f"--discovery {self.discovery_script} is not executable: chmod +x {self.discovery_script}")

    def current_hosts(self) -> list[str]:
        """The names of the hosts that there are. Raises UserError where the script does not say."""
        if self.discovery_script is None:
            return [host.name for host in self.hosts]
        try:
            return list(discover.run_discovery_script(str(self.discovery_script.absolute())))
        except discover.DiscoveryError as error:
            raise UserError(f"--discovery {self.discovery_script} {error}") from None

    def reported_hosts(self, state: Path) -> list[str]:
        """The names of the hosts that horovodrun was told of last. state: the discovery script's."""
        if self.discovery_script is None:
            return [host.name for host in self.hosts]
        return discover.read_reported_hosts(state)


def build_elastic_command_line(
    elastic: ElasticOptions, command: Sequence[str], state: Path, *, nic: str | None, ssh: Ssh
) -> list[str]:
    """The command line by which horovodrun runs `command` in each slot of the hosts that there are.

    state: a file for what the discovery script last said.
    """
    options = ["-np", str(elastic.min_np), "--min-np", str(elastic.min_np)]
    options += ["--max-np", str(elastic.max_np)] if elastic.max_np is not None else []
    options += ["--blacklist-cooldown-range", *map(str, COOLDOWN_RANGE)]
    script = [sys.executable, "-m", "hvdtrain.launch.discover"]
    if elastic.discovery_script is not None:
        script += [str(state), str(elastic.discovery_script.absolute())]
    else:  # horovodrun's -H fails in its elastic mode
        script += ["--hosts", format_hosts(elastic.hosts)]
    # horovodrun hands it to a shell.
    options += ["--host-discovery-script", shlex.join(script)]
    options += ["--network-interfaces", nic or "lo"]
    options += horovodrun_ssh_options(ssh)
    return [find_program("horovodrun"), "--gloo", *options, *command]


def run_with_relaunches(
    launch: Callable[[list[str], Mapping[str, str], SignalInbox, Callable[[], list[str]]], tuple[int, bool]],
    elastic: ElasticOptions,
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
    environ = {**environ, "HVDTRAIN_MIN_NP": str(elastic.min_np)}
    if relaunch:  # the run folder then belongs to all of these jobs, and they choose a checkpoint without being asked
        environ[RELAUNCH_VARIABLE] = secrets.token_hex(8)
    attempt = 0
    with catch_stop_signals() as (received, woken):
        while True:
            with tempfile.TemporaryDirectory(prefix="hvdtrain-") as folder:
                state = Path(folder) / "hosts.json"
                line = build_elastic_command_line(elastic, command(attempt > 0), state, nic=nic, ssh=ssh)
                code, final = launch(line, environ, (received, woken), partial(elastic.reported_hosts, state))
            if final or code not in (EXIT_FAILED, EXIT_REQUEUE) or attempt == relaunch:
                return code
            pause = min(RELAUNCH_BACKOFF[0] * 2**attempt, RELAUNCH_BACKOFF[1])
            attempt += 1
            print(f"hvdtrain: the job was lost: relaunch {attempt} of {relaunch} in {pause:g} s", file=sys.stderr)
            until = time.monotonic() + pause
            while not received and (left := until - time.monotonic()) > 0:
                if select.select([woken], [], [], left)[0]:
                    os.read(woken, 4096)
            if received:
                return EXIT_REQUEUE if received[0] == signal.SIGUSR1 else 128 + received[0]
