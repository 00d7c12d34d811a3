"""One rank of a program that is not a recipe: `python -m hvdtrain.launch.program_rank [--OPTIONS] -- COMMAND ...`.

Each launcher starts it in each slot. It sets the variables by which frameworks find their ranks, starts COMMAND, passes
signals and output on, and reports start, failure and end to `hvdtrain launch`. Imports neither torch nor Horovod.
"""

from __future__ import annotations

import itertools
import os
import re
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvdtrain.comm import srun
from hvdtrain.launch.launch_watch import watch_launch
from hvdtrain.launch.places import (
    OTHER_DEVICE_FILES,
    STORE_VARIABLE,
    RankPlace,
    derive_local_world,
    find_place,
    find_rank,
    find_store,
    gpu_variables,
    meet_ranks,
    place_variables,
    read_stop_signal,
    world_variables,
)
from hvdtrain.launch.program_process import ProgramProcess, describe_end, explain_start_error, start_program
from hvdtrain.launch.rank_output import ByteCarrier, TracebackHolder, find_error_before_abort
from hvdtrain.system import cpus, messages
from hvdtrain.system.errors import EXIT_FAILED, EXIT_REQUEUE, KnownError
from hvdtrain.system.limits import ProgramLimits
from hvdtrain.system.messages import RankFailed, RankFinished, RankStarted, send_message
from hvdtrain.system.network import find_interface
from hvdtrain.system.signals import SAME_STOP_SECONDS, SignalInbox
from hvdtrain.system.streams import DroppingFile

READ_BYTES = 1 << 16
# What a rank prints that has lost another one: Horovod, torch.distributed over Gloo, NCCL and its store, JAX.
LOST_PEER = re.compile(
    r"HorovodInternalError|Horovod has been shut down|Dist(Backend|Network|Store)Error|ProcessGroup|TCPStore|c10d"
    r"|gloo.*(closed|reset|[Tt]imed? ?out)|Gloo \S+ failed|Timed out waiting|monitoredBarrier"
    r"|[Cc]onnection (closed|reset) by peer|Broken pipe|nccl(Remote|System|Internal)Error"
    r"|(Jax|Xla)RuntimeError: (UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL)"
    r"|coordination (service|agent)|distributed service detected fatal errors"
)
# Slurm's variables of a task and of its step; those of the job are left.
SLURM_TASK = re.compile(r"SLURM_(PROCID|LOCALID|NODEID|NTASKS|NPROCS|GTIDS|TASK_PID|STEP_\w+|STEPID)$")


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """What is before `--` on the command line.

    Attributes:
        command: what is after it.
        is_elastic: no rank has a number or a world that holds for the program's life.
        gpu_per_rank: the program sees one GPU only.
        kept: variables whose values in the environment are the user's choice.
    """

    command: Sequence[str]
    is_elastic: bool = False
    gpu_per_rank: bool = False
    kept: Sequence[str] = ()


@dataclass
class RankEnvironment:
    """The environment of a rank's program.

    Attributes:
        place: the rank among all.
        variables: the whole environment.
        keep_alive: what has to live as long as the program: rank 0's server under srun.
    """

    place: RankPlace
    variables: dict[str, str]
    keep_alive: list[object] = field(default_factory=list)


def parse_options(args: Sequence[str]) -> RankOptions:
    """Return the options of a command line, which `Program.rank_command` has made."""
    end = args.index("--")
    given = args[:end]
    kept = [value for name, value in itertools.pairwise(given) if name == "--keep"]
    return RankOptions(
        command=args[end + 1 :],
        is_elastic="--elastic" in given,
        gpu_per_rank="--gpu-per-rank" in given,
        kept=kept,
    )


def main(args: Sequence[str]) -> int:
    """Run the program of a rank; return its exit code, as a shell would."""
    options = parse_options(args)
    environ = dict(os.environ)
    try:
        rank = make_environment(options, environ)
    except KnownError as error:
        return report_failure(find_rank(environ), error.exit_code, str(error))
    with SignalInbox() as inbox:
        return RunningProgram(options, rank, inbox).run()


def make_environment(options: RankOptions, environ: dict[str, str]) -> RankEnvironment:
    """Return the environment of the program.

    Args:
        options: of the command line.
        environ: this process's environment, which is changed.

    Raises:
        RunError: the other ranks do not start, or a GPU is missing.
        UserError: Slurm's variables cannot be parsed.
    """
    keep_alive: list[object] = []
    if find_place(environ) is None and "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        variables, server = srun.join_rendezvous(environ)
        keep_alive.append(server)
        environ |= variables
    else:
        for name in [name for name in environ if SLURM_TASK.match(name)]:
            del environ[name]  # of the batch script, which is task 0 on each rank, or of a launcher's own processes
    place = find_place(environ) or RankPlace(rank=0, size=1, local_rank=0, local_size=1)
    own: dict[str, str] = {}
    if not options.is_elastic:
        own |= place_variables(place)
        store = find_store(environ)
        world = meet_ranks(place, store, environ) if store else derive_local_world(place, environ)
        if world is not None:
            own |= world_variables(world, place.rank)
            # By itself torch's Gloo takes the address of the host's name, which Debian's installer makes 127.0.1.1.
            if interface := find_interface(world[place.rank].address):
                environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            if keep_alive and place.rank == 0:
                srun.remove_secret(environ)
        elif place.size > 1 and place.rank == 0:
            print(
                "hvdtrain: MASTER_ADDR, JAX_COORDINATOR_ADDRESS and TF_CONFIG are not set: over several hosts only "
                "`hvdtrain launch` serves the store in which ranks agree on them",
                file=sys.stderr,
            )
    if options.gpu_per_rank:
        own |= gpu_variables(place.local_rank, environ)
    if not any(file.exists() for file in (cpus.GPU_DRIVER_FILE, *map(Path, OTHER_DEVICE_FILES))):
        environ.setdefault("ACCELERATE_USE_CPU", "true")  # else Accelerate's ranks would each train alone
    own = {name: value for name, value in own.items() if name not in options.kept or not environ.get(name)}
    environ |= own
    cpus.set_threads(place.local_size, environ)
    for name in ("HVDTRAIN_LAUNCH", STORE_VARIABLE):  # the program itself is not what launch listens to
        environ.pop(name, None)
    return RankEnvironment(place, environ, keep_alive)


def report_failure(rank: int, code: int, error: str, trace: str = "", *, lost_peer: bool = False) -> int:
    """Report that the rank failed, to launch or else on standard error; return the exit code."""
    host = socket.gethostname()
    if messages.is_launched():
        send_message(RankFailed(rank, host, os.getpid(), code, error, trace, waits=lost_peer))
    else:
        print(f"{trace}hvdtrain: error: rank {rank} on {host} failed: {error}", file=sys.stderr, flush=True)
    return code


class RunningProgram:
    """A rank's program while it runs: its output and the signals for it pass through here."""

    def __init__(self, options: RankOptions, rank: RankEnvironment, inbox: SignalInbox) -> None:
        self.options, self.rank, self.inbox = options, rank, inbox
        self.forwarded: dict[int, float] = {}  # signals that were passed on, with the monotonic time
        self.holder = TracebackHolder()
        self.error = self.trace = ""  # by which it ended

    def run(self) -> int:
        """Run the program to its end and report it; return the exit code, as a shell would."""
        if not messages.is_launched():
            # Nobody reads messages: the streams are the program's own, and so is what it prints of an error.
            try:
                return self.wait_for_program(start_program(self.options.command, self.rank.variables))
            except OSError as error:
                return self.report_start_error(error)
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        try:
            program = start_program(self.options.command, self.rank.variables, stdout=out_end, stderr=err_end)
        except OSError as error:
            return self.report_start_error(error)
        finally:
            os.close(out_end)
            os.close(err_end)
        place = self.rank.place
        reach = os.environ.get("HOROVOD_HOSTNAME") if self.options.is_elastic else None
        send_message(RankStarted(place.rank, socket.gethostname(), os.getpid(), reach=reach))
        watch_launch(os.environ, program.kill)
        return self.report_end(self.relay_output(program, out, err))

    def report_start_error(self, error: OSError) -> int:
        """Report that the program cannot be started; return the exit code."""
        code, text = explain_start_error(str(self.options.command[0]), error)
        return report_failure(self.rank.place.rank, code, text)

    def wait_for_program(self, program: ProgramProcess) -> int:
        """Pass signals on until the program has ended; return its exit code, as a shell would."""
        with selectors.DefaultSelector() as selector:
            selector.register(program.status, selectors.EVENT_READ)
            selector.register(self.inbox, selectors.EVENT_READ)
            while not any(key.fd == program.status for key, _ in selector.select()):
                self.forward_signals(program)
        code = program.wait_for_end()
        return code if code >= 0 else 128 - code

    def forward_signals(self, program: ProgramProcess) -> None:
        """Pass the signals that have come on to the program; end it at once if it has been asked to end before."""
        self.inbox.clear_wakeups()
        now = time.monotonic()
        while self.inbox.received:
            number = self.inbox.received.popleft()
            if number == signal.SIGUSR1 and "SLURM_PROCID" in os.environ:  # srun passes no other signal on
                number = read_stop_signal(os.environ) or number
            asked = [at for one, at in self.forwarded.items() if one in (signal.SIGINT, signal.SIGTERM)]
            if number == signal.SIGTERM and asked and now - min(asked) > SAME_STOP_SECONDS:
                self.forwarded[signal.SIGKILL] = now
                program.kill()
            else:
                self.forwarded.setdefault(number, now)
                program.send_signal(number)

    def relay_output(self, program: ProgramProcess, out: int, err: int) -> int:
        """Pass output and signals on until the program has ended; return its exit code, below 0 for a signal.

        Args:
            program: what runs.
            out: the reading end of its standard output.
            err: that of its standard error.
        """
        sinks = {out: (DroppingFile(1), ByteCarrier()), err: (DroppingFile(2), ByteCarrier())}

        def pass_on(stream: int, data: bytes, *, last: bool = False) -> None:
            file, carrier = sinks[stream]
            if converted := carrier.convert(data, last=last):
                file.write(converted)

        with selectors.DefaultSelector() as selector:
            for descriptor in (out, err, program.status, self.inbox):
                selector.register(descriptor, selectors.EVENT_READ)
            while len(selector.get_map()) > 1:  # the inbox stays
                for key, _ in selector.select(self.holder.seconds_left()):
                    if key.fileobj is self.inbox:
                        self.forward_signals(program)
                    elif key.fd == program.status:
                        selector.unregister(key.fd)
                    elif data := os.read(key.fd, READ_BYTES):
                        if key.fd == out:
                            self.holder.note_output()
                        pass_on(key.fd, self.holder.add(data) if key.fd == err else data)
                    else:
                        selector.unregister(key.fd)
                pass_on(err, self.holder.release_due())
        code = program.wait_for_end()
        pass_on(out, b"", last=True)
        self.error, self.trace = ("", "") if code == 0 else self.holder.take_error()
        if self.trace and self.is_stopped(code) and not self.error.startswith("KeyboardInterrupt"):
            pass_on(err, self.trace.encode())
        pass_on(err, self.holder.release(), last=True)
        return code

    def is_stopped(self, code: int) -> bool:
        """Return whether the program ended as it was asked to: to be requeued, or by a signal that was passed on."""
        # One that handles the signal may end with any code. One that has failed may still be in its exit handlers when
        # its launcher, which has lost another rank meanwhile, sends the signal.
        has_failed = bool(self.error) and not self.error.startswith(("KeyboardInterrupt", "SystemExit"))
        crashed = code < 0 and -code not in self.forwarded
        return code == EXIT_REQUEUE or (bool(self.forwarded) and not has_failed and not crashed)

    def report_end(self, code: int) -> int:
        """Report how the program ended; return its exit code, as a shell would."""
        rank, shell_code = self.rank.place.rank, code if code >= 0 else 128 - code
        if code == 0 or self.is_stopped(code):
            send_message(RankFinished(rank, shell_code, socket.gethostname(), os.getpid()))
            # A launcher would end the other ranks at once, or in an elastic run start another worker.
            return 0 if code == EXIT_REQUEUE or self.options.is_elastic else shell_code
        if (error := self.error) and -code in self.forwarded:
            code = shell_code = EXIT_FAILED  # it had failed before
        tail = self.holder.tail.decode(errors="replace") if code == -signal.SIGABRT else ""
        failed_before = find_error_before_abort(tail, LOST_PEER)
        lost_peer = not failed_before and bool(LOST_PEER.search(error or tail))
        if not error or code < 0:
            error = failed_before or describe_end(code)
        if self.options.is_elastic and "environment variable RANK expected" in error:
            error += (
                "; ranks of --elastic have no RANK, as it would change: only scripts of hvd.elastic.run are elastic"
            )
        report_failure(rank, shell_code, error, self.trace, lost_peer=lost_peer)
        if lost_peer:
            time.sleep(ProgramLimits.head_start)
        return shell_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
