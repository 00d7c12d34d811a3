"""Elastic jobs: their command line, and starting a job again that is lost as a whole.

run_job --> final (a rank reported why it failed, or the user stopped it), or exit code other than 1 and 75 --> end
   ^   `--> lost (1 or 75, and nobody reported why) --> pause 2, 4, 8 ... 60 s --.     signal --> end
   '------------------- again, with --resume, up to --relaunch times <----------'
"""

from __future__ import annotations

import secrets
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hvdtrain.launch.discovery import debounce
from hvdtrain.launch.hosts import Host, format_hosts
from hvdtrain.launch.job import JobSpec
from hvdtrain.launch.launcher import LaunchPlan, hvdtrain_command
from hvdtrain.launch.options import ElasticOptions, LaunchOptions
from hvdtrain.launch.run import JobResult, run_job
from hvdtrain.launch.signals import catch_stop_signals
from hvdtrain.system.errors import EXIT_FAILED, EXIT_REQUEUE, UserError
from hvdtrain.system.limits import LaunchLimits
from hvdtrain.system.signals import SignalInbox
from hvdtrain.training.lease import RELAUNCH_VARIABLE


@dataclass(frozen=True, kw_only=True)
class ElasticLaunch:
    """What all jobs of an elastic launch have in common.

    Attributes:
        options: where ranks run and what starts them.
        elastic: how many there may be, and which hosts there are.
        hosts: the fixed list of hosts; empty if there is a discovery program.
        train_args: what follows `hvdtrain train`.
        environ: what the launcher runs in.
        limits: how long to wait before a relaunch.
    """

    options: LaunchOptions
    elastic: ElasticOptions
    hosts: Sequence[Host]
    train_args: Sequence[str]
    environ: Mapping[str, str]
    limits: LaunchLimits = field(default_factory=LaunchLimits)

    def command_line(self, state: Path, *, resume: bool = False) -> list[str]:
        """Return the launcher's command line.

        Args:
            state: a file in which the discovery command keeps its last answers.
            resume: ranks resume from a checkpoint, whether the user asked for it or not.
        """
        args = ["train", *self.train_args, *(["--resume"] if resume and "--resume" not in self.train_args else [])]
        plan = LaunchPlan(
            hosts=self.hosts,
            command=hvdtrain_command(args),
            environ=self.environ,
            nic=self.options.nic,
            ssh=self.options.ssh,
            forward_env=self.options.forward_env,
        )
        ask = [sys.executable, "-m", debounce.__name__]
        if self.elastic.discovery is not None:
            ask += [str(state), str(self.elastic.discovery.absolute())]
        else:  # horovodrun's -H fails in its elastic mode
            ask += ["--hosts", format_hosts(self.hosts)]
        ranks = (self.elastic.min_np, self.elastic.max_np)
        return self.options.launcher.elastic_command_line(plan, ranks, shlex.join(ask))

    def job(self, state: Path, environ: Mapping[str, str], *, resume: bool) -> JobSpec:
        """Return the job to run; the arguments are those of `command_line`, and what the launcher runs in."""
        return JobSpec(
            launcher=self.options.launcher,
            command_line=self.command_line(state, resume=resume),
            environ=environ,
            ssh=self.options.ssh,
            grace=self.options.grace,
            list_hosts=partial(self.reported_hosts, state),
        )

    def reported_hosts(self, state: Path) -> list[str]:
        """Return the names of the hosts that the launcher last got from the discovery command."""
        if self.elastic.discovery is None:
            return [host.name for host in self.hosts]
        return debounce.read_reported_hosts(state)


def find_current_hosts(elastic: ElasticOptions, hosts: Sequence[Host]) -> list[str]:
    """Return the names of the hosts that there are now: the fixed list's, or those the discovery program prints.

    Raises:
        UserError: the program gives no answer that can be used.
    """
    if elastic.discovery is None:
        return [host.name for host in hosts]
    try:
        return list(debounce.run_discovery_script(str(elastic.discovery.absolute())))
    except debounce.DiscoveryError as error:
        raise UserError(f"--discovery {elastic.discovery} {error}") from None


def run_with_relaunches(launch: ElasticLaunch, run: Callable[[JobSpec, SignalInbox], JobResult] = run_job) -> int:
    """Run the job, and again up to `ElasticOptions.relaunches` times if it is lost as a whole; return the exit code.

    Args:
        launch: what to run.
        run: runs one job; it leaves signals that come at its end in the inbox.
    """
    relaunches = launch.elastic.relaunches
    environ = {**launch.environ, "HVDTRAIN_MIN_NP": str(launch.elastic.min_np)}
    if relaunches:  # the run folder then belongs to all of these jobs, and they choose a checkpoint without being asked
        environ[RELAUNCH_VARIABLE] = secrets.token_hex(8)
    attempt = 0
    with catch_stop_signals() as inbox:
        while True:
            with tempfile.TemporaryDirectory(prefix="hvdtrain-") as folder:
                result = run(launch.job(Path(folder) / "hosts.json", environ, resume=attempt > 0), inbox)
            if result.is_final or result.exit_code not in (EXIT_FAILED, EXIT_REQUEUE) or attempt == relaunches:
                return result.exit_code
            pause = min(launch.limits.relaunch_first * 2**attempt, launch.limits.relaunch_longest)
            attempt += 1
            print(f"hvdtrain: the job was lost: relaunch {attempt} of {relaunches} in {pause:g} s", file=sys.stderr)
            if number := inbox.wait_for_signal(pause):
                return EXIT_REQUEUE if number == signal.SIGUSR1 else 128 + number
