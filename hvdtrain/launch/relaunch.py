"""Elastic jobs: their command line; and starting a job again that is lost as a whole, or a program's that failed.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from hvdtrain.launch.discovery import debounce
from hvdtrain.launch.hosts import Host, format_hosts
from hvdtrain.launch.job import JobSpec
from hvdtrain.launch.launcher import LaunchPlan, hvdtrain_command
from hvdtrain.launch.options import ElasticOptions, LaunchOptions
from hvdtrain.launch.program import Program
from hvdtrain.launch.run import JobResult, run_job
from hvdtrain.launch.signals import catch_stop_signals
from hvdtrain.system.errors import EXIT_FAILED, EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from hvdtrain.system.limits import LaunchLimits
from hvdtrain.system.signals import SignalInbox
from hvdtrain.training.lease import RELAUNCH_VARIABLE

DEFAULT_LIMITS = LaunchLimits()


@dataclass(frozen=True, kw_only=True)
class ElasticLaunch:
    """What all jobs of an elastic launch have in common.

    Attributes:
        options: where ranks run and what starts them.
        elastic: how many there may be, and which hosts there are.
        hosts: the fixed list of hosts; empty if there is a discovery program.
        train_args: what follows `hvdtrain train`.
        environ: what the launcher runs in.
        program: what ranks run instead of `hvdtrain train`.
        limits: how long to wait before a relaunch.
    """

    options: LaunchOptions
    elastic: ElasticOptions
    hosts: Sequence[Host]
    train_args: Sequence[str]
    environ: Mapping[str, str]
    program: Program | None = None
    limits: LaunchLimits = field(default_factory=LaunchLimits)

    def command_line(self, state: Path, *, resume: bool = False) -> list[str]:
        """Return the launcher's command line.

        Args:
            state: a file in which the discovery command keeps its last answers.
            resume: ranks resume from a checkpoint, whether the user asked for it or not.
        """
        args = ["train", *self.train_args, *(["--resume"] if resume and "--resume" not in self.train_args else [])]
        command = hvdtrain_command(args)
        if self.program is not None:
            command = self.program.rank_command(self.options.forward_env, elastic=True)
        plan = LaunchPlan(
            hosts=self.hosts,
            command=command,
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
            is_program=self.program is not None,
            ssh=self.options.ssh,
            grace=self.options.grace,
            list_hosts=partial(self.reported_hosts, state),
        )

    @contextmanager
    def prepare_job(self) -> Iterator[JobSpec]:
        """Yield a job of a program, with a folder for what discovery answers while it runs."""
        with tempfile.TemporaryDirectory(prefix="hvdtrain-") as folder:
            yield self.job(Path(folder) / "hosts.json", self.environ, resume=False)

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

    def run_attempt(attempt: int, inbox: SignalInbox) -> JobResult:
        with tempfile.TemporaryDirectory(prefix="hvdtrain-") as folder:
            return run(launch.job(Path(folder) / "hosts.json", environ, resume=attempt > 0), inbox)

    def is_lost(result: JobResult) -> bool:
        return not result.is_final and result.exit_code in (EXIT_FAILED, EXIT_REQUEUE)

    return run_repeatedly(run_attempt, is_lost, relaunches, launch.limits)


def run_program_jobs(
    prepare_job: Callable[[], AbstractContextManager[JobSpec]], relaunches: int, limits: LaunchLimits = DEFAULT_LIMITS
) -> int:
    """Run a program's job, and again if it fails, up to `relaunches` times; return the exit code.

    Neither a stop by the user, nor exit code 75 (to be requeued), nor 2 (a mistake in the command line) is a failure.

    Args:
        prepare_job: gives the job, and what it needs while it runs.
        relaunches: how often it may be started again.
        limits: how long to wait before a relaunch.
    """

    def run_attempt(attempt: int, inbox: SignalInbox) -> JobResult:
        with prepare_job() as spec:
            count = {RELAUNCH_VARIABLE: str(attempt)} if relaunches else {}
            return run_job(replace(spec, environ={**spec.environ, **count}), inbox)

    def has_failed(result: JobResult) -> bool:
        return not result.is_final and result.exit_code not in (0, EXIT_USER_ERROR, EXIT_REQUEUE)

    return run_repeatedly(run_attempt, has_failed, relaunches, limits)


def run_repeatedly(
    run_attempt: Callable[[int, SignalInbox], JobResult],
    must_repeat: Callable[[JobResult], bool],
    relaunches: int,
    limits: LaunchLimits,
) -> int:
    """Run a job, and again up to `relaunches` times, with pauses that grow; return the exit code.

    Args:
        run_attempt: runs it, given the number of the attempt, from 0; it leaves signals that come at its end in the
            inbox.
        must_repeat: whether a job with a result is to be run again.
        relaunches: how often it may be.
        limits: how long to wait before a relaunch.
    """
    attempt = 0
    with catch_stop_signals() as inbox:
        while True:
            result = run_attempt(attempt, inbox)
            if attempt == relaunches or not must_repeat(result):
                return result.exit_code
            pause = min(limits.relaunch_first * 2**attempt, limits.relaunch_longest)
            attempt += 1
            ended = f"the job ended with code {result.exit_code}"
            print(f"hvdtrain: {ended}: relaunch {attempt} of {relaunches} in {pause:g} s", file=sys.stderr)
            if number := inbox.wait_for_signal(pause):
                return EXIT_REQUEUE if number == signal.SIGUSR1 else 128 + number
