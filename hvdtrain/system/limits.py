"""Time limits, in seconds: the defaults of each part of hvdtrain on one page.

A limit is a field of the object of its part, which is passed to what waits; a test, or a site, passes another one. The
limits that a variable of the environment can change are read by `from_environment`; all variables take 0.1 to 604800.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from hvdtrain.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SshLimits:
    """Limits of ssh to other hosts.

    Attributes:
        connect: for ssh to connect (its ConnectTimeout, in whole seconds).
        read_config: for ssh to print its configuration.
    """

    connect: int = 5
    read_config: float = 10.0


@dataclass(frozen=True, kw_only=True)
class NativeLimits:
    """Limits of `hvdtrain horovod build` and `check`.

    Attributes:
        download: for each download.
        build: for a build, which takes one to five minutes.
        install: for pip to install a wheel.
        load: for the installed library to be loaded once.
        ask_torch: for torch to be imported, in a process of its own.
        ask_mpi: for mpirun to print its version.
        ask_nvcc: for nvcc to print its version.
        ask_python: for a Python to print its version.
        probe: for the all-reduce over one transport, start included.
        probe_exit: for horovodrun and mpirun to stop their ranks, before they are killed.
    """

    download: float = 600.0
    build: float = 3600.0
    install: float = 600.0
    load: float = 300.0
    ask_torch: float = 300.0
    ask_mpi: float = 30.0
    ask_nvcc: float = 60.0
    ask_python: float = 30.0
    probe: float = 120.0
    probe_exit: float = 10.0


@dataclass(frozen=True, kw_only=True)
class RendezvousLimits:
    """Limits of the meeting of ranks that srun has started.

    Attributes:
        server_start: for rank 0 to serve; HOROVOD_START_TIMEOUT overrides it.
        server_response: for rank 0's server to answer a request.
        poll: between two requests until it serves.
        pmix_connect: for an MPI job's own server, named in the environment, to accept a connection.
    """

    server_start: float = 120.0
    server_response: float = 5.0
    poll: float = 0.1
    pmix_connect: float = 5.0

    @staticmethod
    def from_environment(environ: Mapping[str, str] = os.environ) -> RendezvousLimits:
        """Return the limits with what the environment overrides. Raises UserError."""
        server_start = read_time_limit(environ, "HOROVOD_START_TIMEOUT", RendezvousLimits.server_start)
        return RendezvousLimits(server_start=server_start)


@dataclass(frozen=True, kw_only=True)
class LaunchLimits:
    """Limits of `hvdtrain launch`; the time that ranks may take to save is an option (--grace).

    Attributes:
        hold_line: until a launcher's own line is shown; a rank's message makes it unnecessary.
        launcher_exit: for the launcher to end when all ranks have finished.
        standstill: from the first rank's report that it makes no step to the line about it; the others' come meanwhile.
        terminate: between SIGTERM and SIGKILL to the processes of a job.
        kill: for killed processes to end; one that does not hangs in the kernel.
        remote_kill: for ssh to end ranks on other hosts.
        relaunch_first: before the first relaunch of a lost job; doubled for each further one.
        relaunch_longest: before any relaunch.
        discovery: for a discovery script to answer; HVDTRAIN_DISCOVERY_SECONDS overrides it.
    """

    hold_line: float = 5.0
    launcher_exit: float = 10.0
    standstill: float = 3.0
    terminate: float = 5.0
    kill: float = 10.0
    remote_kill: float = 10.0
    relaunch_first: float = 2.0
    relaunch_longest: float = 60.0
    discovery: float = 5.0

    @staticmethod
    def from_environment(environ: Mapping[str, str] = os.environ) -> LaunchLimits:
        """Return the limits with what the environment overrides. Raises UserError."""
        return LaunchLimits(discovery=read_time_limit(environ, "HVDTRAIN_DISCOVERY_SECONDS", LaunchLimits.discovery))


@dataclass(frozen=True, kw_only=True)
class ProgramLimits:
    """Limits of a program that each rank runs (hvdtrain.launch.program_rank).

    Attributes:
        start: for all ranks to have started, before any starts its program; HOROVOD_START_TIMEOUT overrides it.
        store: for the store to answer a request.
        poll: between two requests for a value that is not there yet.
        hold_traceback: from a traceback on standard error until it is shown: a program that ends meanwhile has failed
            by it; the exit handlers of Horovod and torch may take long.
        hold_followed: the same once the program has printed more, some time after the traceback.
        head_start: that a rank which has lost another one leaves that one to report why, before its own end makes the
            launcher end all.
        watch: between two looks whether `hvdtrain launch` still serves, over several hosts.
        launch_silent: without an answer of `hvdtrain launch`, until a program is ended.
        outlived: after the failure of an elastic worker, until the others have outlived it.
    """

    start: float = 120.0
    store: float = 5.0
    poll: float = 0.1
    hold_traceback: float = 15.0
    hold_followed: float = 2.0
    head_start: float = 1.0
    watch: float = 5.0
    launch_silent: float = 60.0
    outlived: float = 5.0

    @staticmethod
    def from_environment(environ: Mapping[str, str] = os.environ) -> ProgramLimits:
        """Return the limits with what the environment overrides. Raises UserError."""
        return ProgramLimits(start=read_time_limit(environ, "HOROVOD_START_TIMEOUT", ProgramLimits.start))


@dataclass(frozen=True, kw_only=True)
class DiagnosisLimits:
    """Limits of `hvdtrain.diagnose` in a program.

    Attributes:
        send: for rank 0 to answer a message of another rank.
        last_messages: at the end, for rank 0 to wait for the others' last messages, and for them to send those.
        report: for rank 0 to write its report after an exception.
    """

    send: float = 5.0
    last_messages: float = 5.0
    report: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DoctorLimits:
    """Limits of `hvdtrain doctor` and of the check before a launch.

    Attributes:
        query: for a host to answer a query; Python may take long to start from a file server that nobody has read from
            today.
        connect_back: for a host to connect to this one.
        first_line: for a program (a compiler, nvidia-smi) to print its version.
        gpus: for nvidia-smi to list the GPUs.
        worker_join: for all ranks of a network test to connect to the coordinator.
        coordinator_connect: for a rank to connect to the coordinator.
        command_send: for a rank to accept a command.
        command: for a rank to carry out a command.
        all_reduce: for the all-reduces over pairs of ranks, start of Horovod included.
        link_connect: for a rank to connect to another one.
        launcher_exit: for the launcher of the ranks to end by itself.
        launcher_terminate: for it to end after each of two SIGTERMs; then it is killed.
    """

    query: float = 30.0
    connect_back: float = 3.0
    first_line: float = 5.0
    gpus: float = 10.0
    worker_join: float = 60.0
    coordinator_connect: float = 10.0
    command_send: float = 5.0
    command: float = 15.0
    all_reduce: float = 90.0
    link_connect: float = 2.5
    launcher_exit: float = 10.0
    launcher_terminate: float = 2.0


@dataclass(frozen=True, kw_only=True)
class HangLimits:
    """When a rank that makes no step is named, and ended (hvdtrain.system.activity); the hang limit is an option.

    Attributes:
        notice: in one activity until it is named; HVDTRAIN_HANG_NOTICE overrides it.
        watch: between two looks.
        blocked: on top of three hang limits, until a process whose interpreter runs no thread is ended.
    """

    notice: float = 45.0
    watch: float = 1.0
    blocked: float = 60.0

    @staticmethod
    def from_environment(environ: Mapping[str, str] = os.environ) -> HangLimits:
        """Return the limits with what the environment overrides. Raises UserError."""
        return HangLimits(notice=read_time_limit(environ, "HVDTRAIN_HANG_NOTICE", HangLimits.notice))


@dataclass(frozen=True, kw_only=True)
class SupervisorLimits:
    """Limits of the supervisor of a slot of an elastic run (hvdtrain.elastic.supervisor).

    Attributes:
        poll_interval: between two looks at its worker.
        heartbeat_interval: between its heartbeats, and between two looks at the others'.
        round_interval: between horovodrun's rounds of assignment.
        lease: without a heartbeat, until a supervisor counts as lost; also for a worker that is stopped, until it is
            killed; HVDTRAIN_LEASE overrides it.
        join_grace: for newcomers that are starting, while another one is ready.
        end_propagation: for all supervisors to learn that the run has ended.
        worker_exit: for a worker to end once the run is over.
    """

    poll_interval: float = 0.25
    heartbeat_interval: float = 1.0
    round_interval: float = 2.0
    lease: float = 10.0
    join_grace: float = 3.0
    end_propagation: float = 5.0
    worker_exit: float = 30.0

    @staticmethod
    def from_environment(environ: Mapping[str, str] = os.environ) -> SupervisorLimits:
        """Return the limits with what the environment overrides. Raises UserError."""
        return SupervisorLimits(lease=read_time_limit(environ, "HVDTRAIN_LEASE", SupervisorLimits.lease))


@dataclass(frozen=True, kw_only=True)
class GenerationLimits:
    """Limits of workers that form a generation of an elastic run (hvdtrain.elastic.generation).

    Attributes:
        poll: between two looks for a plan, or for who follows it.
        fast_polls: until a worker looks only a tenth as often: the others may train for long.
        first_plan: of the first generation, for slots that do not come.
        proposer: for the first in line to propose a plan, before another does.
        follow: for all of a plan to write that they follow it.
        store: for the key-value server to answer.
    """

    poll: float = 0.02
    fast_polls: float = 10.0
    first_plan: float = 60.0
    proposer: float = 1.0
    follow: float = 10.0
    store: float = 10.0


@dataclass(frozen=True, kw_only=True)
class ExitLimits:
    """Limits of the end of a process whose command is done.

    Attributes:
        stragglers: for threads and children of a recipe to end by themselves.
        exit_handlers: for exit handlers.
        terminate: between SIGTERM and SIGKILL to processes that are left.
    """

    stragglers: float = 2.0
    exit_handlers: float = 10.0
    terminate: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LockLimits:
    """Limits of a process that waits for another one of this host to release a lock (hvdtrain.system.turns).

    Attributes:
        wait: for the lock; HVDTRAIN_DATA_WAIT overrides it.
        silent: until the wait is announced.
        poll: between two attempts.
    """

    wait: float = 3600.0
    silent: float = 5.0
    poll: float = 0.1

    @staticmethod
    def from_environment(environ: Mapping[str, str] = os.environ) -> LockLimits:
        """Return the limits with what the environment overrides. Raises UserError."""
        return LockLimits(wait=read_time_limit(environ, "HVDTRAIN_DATA_WAIT", LockLimits.wait))


def read_time_limit(environ: Mapping[str, str], name: str, default: float) -> float:
    """Return the seconds that a variable of the environment gives, or the default. Raises UserError if it is wrong."""
    text = environ.get(name, "")
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 604_800:
        raise UserError(f"{name} is {text!r}; expected seconds, from 0.1 to 604800")
    return seconds
