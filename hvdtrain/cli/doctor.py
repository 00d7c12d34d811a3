"""`hvdtrain doctor`: what is wrong with this host, or with several hosts and the network between them."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import click
from click.core import ParameterSource

from hvdtrain.cli.launch_options import add_launch_options
from hvdtrain.cli.rank import exit_immediately, exit_on_failure, set_rank_threads
from hvdtrain.comm.world import rank_from_environment
from hvdtrain.doctor.findings import DoctorFinding, diagnose_host, sort_by_severity
from hvdtrain.doctor.report import format_verdict
from hvdtrain.launch.options import LaunchOptions
from hvdtrain.launch.start import launch_ranks
from hvdtrain.system import messages, signed_http
from hvdtrain.system.errors import EXIT_FAILED, UserError
from hvdtrain.system.strict_json import encode_json

# Of the launch options: those that the doctor does not have, and those that name the hosts.
EXCLUDED_OPTIONS = {"num_ranks", "dry_run"}
HOST_OPTIONS = {"hosts", "hostfile", "scheduler"}


@click.command("doctor", context_settings={"max_content_width": 100})
@add_launch_options
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--meet", hidden=True, help="Address of the coordinator, for a worker of the network test.")
@click.pass_context
def doctor_command(context: click.Context, /, as_json: bool, meet: str | None, launch_options: LaunchOptions) -> int:
    """Find what is wrong with this host, or with several hosts and the network between them.

    \b
    hvdtrain doctor                           this host: a report to paste into a message
    hvdtrain doctor -H a:4,b:4 --nic eth0     the hosts of a run, reached as `hvdtrain launch` does

    For several hosts it prints what differs; then, measured by one rank on each, the CPU slowdown, the round trip and
    the bandwidth of each link, and an all-reduce over each pair (with more than 6 hosts: over neighbours and outliers).
    The last line is `all fine`, or the worst finding: which host or link is bad, and why.

    Exit codes: 0 a run can start; 1 something prevents it; 2 a mistake in the command line.
    """
    if meet is not None:
        if rank_from_environment() is not None:
            return run_doctor_worker(meet, launch_options.nic)
        return launch_workers(meet, launch_options)
    launcher = launch_options.launcher
    if launcher.batch_system is not None:
        raise UserError(f"--launcher {launcher.name}: the doctor queries hosts over ssh; expected horovodrun or mpirun")
    hosts = launch_options.source.read_hosts(os.environ)
    if hosts:
        return report_on_hosts([host.name for host in hosts], context, as_json, launch_options)
    from hvdtrain.doctor.facts import gather_facts
    from hvdtrain.doctor.host_facts import FactsRequest
    from hvdtrain.doctor.report import describe_host
    from hvdtrain.native.cache import wheel_folder

    facts = gather_facts(FactsRequest(["runs", str(wheel_folder())]))
    found = sort_by_severity(diagnose_host(facts))
    return print_findings(found, {"facts": facts.encode_json()}, describe_host(facts), as_json)


doctor_command.params = [parameter for parameter in doctor_command.params if parameter.name not in EXCLUDED_OPTIONS]


def report_on_hosts(hosts: list[str], context: click.Context, as_json: bool, launch: LaunchOptions) -> int:
    """Examine hosts and print what was found. Returns the exit code."""
    from hvdtrain.doctor.examine import build_json_report, describe_hosts, examine_hosts

    launch.ssh.check_identity()
    options = ["-H", ",".join(f"{host}:1" for host in hosts), *collect_launch_options(context)]
    result = examine_hosts(hosts, nic=launch.nic, ssh=launch.ssh.ssh_arguments(), options=options)
    return print_findings(result.findings, build_json_report(result), describe_hosts(result), as_json)


def collect_launch_options(context: click.Context) -> list[str]:
    """Return the launch options that were given, without those that name the hosts."""
    words = []
    for parameter in context.command.params:
        name = str(parameter.name)
        if (
            name in HOST_OPTIONS | {"as_json", "meet"}
            or context.get_parameter_source(name) != ParameterSource.COMMANDLINE
        ):
            continue
        value = context.params[name]
        for one in value if isinstance(value, tuple) else (value,):
            words += [parameter.opts[0]] if one is True else [parameter.opts[0], str(one)]
    return words


def print_findings(found: Sequence[DoctorFinding], facts: dict[str, object], text: str, as_json: bool) -> int:
    """Print what was found out, then what is wrong.

    Args:
        found: what is wrong, the worst first.
        facts: what was found out, for JSON.
        text: the same as text.
        as_json: whether to print JSON.

    Returns:
        the exit code.
    """
    if as_json:
        findings = [finding._asdict() for finding in found]
        click.echo(encode_json(facts | {"findings": findings, "verdict": format_verdict(found)}, indent=2))
    else:
        click.echo(f"{text}\n")
        for finding in found[1:]:
            click.echo(f"{'wrong' if finding.bad else 'warning'}: {finding}")
        click.echo(format_verdict(found))
    return EXIT_FAILED if any(finding.bad for finding in found) else 0


def launch_workers(meet: str, options: LaunchOptions) -> int:
    """Start a worker on each host. Returns the launcher's exit code."""
    nic = ["--nic", options.nic] if options.nic else []
    return launch_ranks(["doctor", "--meet", meet, *nic], options, lambda: None)


def run_doctor_worker(meet: str, nic: str | None) -> int:
    """Run a worker of the network test. Returns the exit code."""
    from hvdtrain.doctor.network_test.worker import run_worker

    set_rank_threads()
    rank = rank_from_environment()
    assert rank is not None
    messages.send_message(messages.RankStarted(rank, socket.gethostname(), os.getpid()))
    address, port = meet.split(":")
    with exit_on_failure():
        run_worker((address, int(port)), signed_http.read_key(), rank, nic)
    messages.send_message(messages.RankFinished(rank, 0))
    # Horovod's exit handler would wait for the others.
    exit_immediately(0)
