"""One worker of the network test: carries out the coordinator's commands and replies to each."""

from __future__ import annotations

import socket

from hvdtrain.doctor.network_test.links import measure_cpu, probe_link, serve_probe
from hvdtrain.doctor.network_test.messages import (
    AllReduceReply,
    AllReduceResult,
    Command,
    CpuReply,
    EndTest,
    Failure,
    Hello,
    MeasureCpu,
    Pair,
    ProbeLink,
    Reply,
    ServeProbe,
    encode_message,
    parse_command,
)
from hvdtrain.doctor.network_test.signed_lines import MAX_FIRST_LINE_BYTES, MAX_LINE_BYTES, join_session
from hvdtrain.system.limits import DoctorLimits
from hvdtrain.system.network import interface_address
from hvdtrain.system.records import encode_record
from hvdtrain.system.signed_http import MOST_STRANGERS


def run_worker(coordinator: tuple[str, int], key: bytes, rank: int, nic: str | None) -> None:
    """Connect to the coordinator and carry out its commands until it ends the test.

    Args:
        coordinator: its address and port.
        key: the secret of the run.
        rank: of this worker.
        nic: the interface at which other workers connect to this one; None: that toward the coordinator.

    Raises:
        OSError: the coordinator cannot be reached, has closed the connection, or does not know the secret.
    """
    with socket.create_connection(coordinator, DoctorLimits.coordinator_connect) as connection:
        connection.settimeout(None)
        own = interface_address(nic) if nic else connection.getsockname()[0]
        with socket.create_server((own, 0), backlog=MOST_STRANGERS) as listener, connection.makefile("rb") as received:
            lines, prefix = join_session(key, received.readline(MAX_FIRST_LINE_BYTES))
            address, port = listener.getsockname()[:2]
            connection.sendall(prefix + lines.sign_line(encode_record(Hello(rank, (address, port)))))
            while line := received.readline(MAX_LINE_BYTES):
                try:
                    number, command = parse_command(lines.verify_line(line))
                except ValueError as error:
                    raise ConnectionError(f"the coordinator sends {error}") from None
                if isinstance(command, EndTest):
                    return
                connection.sendall(lines.sign_line(encode_message(number, run_command(command, listener))))
    raise ConnectionError("the coordinator closed the connection")


def run_command(command: Command, listener: socket.socket) -> Reply:
    """Run a command and return its reply, also if it fails.

    Args:
        command: to run.
        listener: where other workers connect to this one.
    """
    try:
        if isinstance(command, MeasureCpu):
            return CpuReply(measure_cpu())
        if isinstance(command, ProbeLink):
            return probe_link(command)
        if isinstance(command, ServeProbe):
            return serve_probe(listener, command.ticket)
        if isinstance(command, EndTest):
            return Failure("the test has ended")
        return run_all_reduces(command.pairs)
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}")


def run_all_reduces(pairs: list[Pair]) -> AllReduceReply:
    """Start Horovod and all-reduce over each pair of ranks."""
    from hvdtrain.bench.pairs import benchmark_pairs  # imports torch

    results = benchmark_pairs(pairs)
    return AllReduceReply([AllReduceResult(pair, seconds, right) for pair, (seconds, right) in results.items()])
