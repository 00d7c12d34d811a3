"""`hvdtrain doctor`: what is wrong with this host, or with several and what joins them."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

import click
from click.core import ParameterSource

from hvdtrain.cli.launch import launch_options, start
from hvdtrain.cli.rank import leaving_on_failure, quit_at_once, share_cores
from hvdtrain.comm.world import rank_from_environment
from hvdtrain.doctor.findings import Finding, of_host, worst_first
from hvdtrain.doctor.report import verdict
from hvdtrain.launch.schedulers import given
from hvdtrain.system import messages, signed_http
from hvdtrain.system.errors import EXIT_FAILED, UserError
from hvdtrain.system.ssh import Ssh
from hvdtrain.system.strict_json import encode_json

# Of the options that say where ranks run: those that have no use here, and those that name the hosts.
UNUSED = {"ranks", "dry_run"}
HOSTS = {"hosts", "hostfile", "source"}


@click.command("doctor", context_settings={"max_content_width": 100})
@launch_options
@click.option("--json", "as_json", is_flag=True, help="Print all that was found out as JSON.")
@click.option("--meet", hidden=True, help="Where a rank that the doctor has started meets it.")
@click.pass_context
def command(context: click.Context, /, as_json: bool, meet: str | None, **where: Any) -> int:
    """See what is wrong with this host, or with several and what joins them.

    \b
    hvdtrain doctor                           this host, to be pasted into a message
    hvdtrain doctor -H a:4,b:4 --nic eth0     the hosts of a run, started as `hvdtrain launch` does

    Of several hosts it shows what differs; then, by one rank on each, how busy they are, the round trip and the
    bandwidth of each link, and an all-reduce over each pair (of more than 6 hosts: of neighbours, and of what is odd).
    The last line is `all fine`, or the worst: which host or link is bad, and why.

    Exit codes: 0 nothing stands in the way of a run; 1 something does; 2 a mistake in the command line.
    """
    if meet is not None:
        return attend(meet, where["nic"]) if rank_from_environment() is not None else launch(meet, **where)
    if where["launcher"] == "srun":
        raise UserError("--launcher srun: the doctor asks hosts over ssh; expected horovodrun or mpirun")
    hosts = given(where["hosts"], where["hostfile"], where["source"], os.environ)
    if hosts:
        return several([host.name for host in hosts], context, as_json, where)
    from hvdtrain.doctor.facts import Wanted, gather
    from hvdtrain.doctor.report import describe
    from hvdtrain.native.cache import wheel_folder

    facts = gather(Wanted(("runs", str(wheel_folder()))))
    found = worst_first(of_host(facts))
    return tell(found, {"facts": facts}, describe(facts), as_json)


command.params = [parameter for parameter in command.params if parameter.name not in UNUSED]


def several(hosts: list[str], context: click.Context, as_json: bool, where: dict[str, Any]) -> int:
    """The doctor of some hosts; the exit code."""
    from hvdtrain.doctor.between import describe, examine, values

    ssh = Ssh(where["ssh_port"], where["ssh_identity"])
    ssh.check()
    options = ["-H", ",".join(f"{host}:1" for host in hosts), *options_of(context)]
    answers, measured, found = examine(hosts, nic=where["nic"], ssh=ssh.options(), options=options)
    return tell(found, values(answers, measured), describe(answers, measured), as_json)


def options_of(context: click.Context) -> list[str]:
    """The options that say how ranks are started, as they were given."""
    words = []
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in HOSTS | {"as_json", "meet"} or context.get_parameter_source(name) != ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        for one in value if isinstance(value, tuple) else (value,):
            words += [parameter.opts[0]] if one is True else [parameter.opts[0], str(one)]
    return words


def tell(found: Sequence[Finding], facts: dict[str, Any], text: str, as_json: bool) -> int:
    """Print what was found out, and what is wrong; the exit code."""
    if as_json:
        findings = [finding._asdict() for finding in found]
        click.echo(encode_json(facts | {"findings": findings, "verdict": verdict(found)}, indent=2))
    else:
        click.echo(f"{text}\n")
        for finding in found[1:]:
            click.echo(f"{'wrong' if finding.bad else 'warning'}: {finding}")
        click.echo(verdict(found))
    return EXIT_FAILED if any(finding.bad for finding in found) else 0


def launch(meet: str, **where: Any) -> int:
    """Start a rank on each host; the launcher's exit code."""
    nic = ["--nic", where["nic"]] if where["nic"] else []
    return start(["doctor", "--meet", meet, *nic], lambda: None, ranks=None, dry_run=False, **where)


def attend(meet: str, nic: str | None) -> int:
    """Be one of the ranks."""
    from hvdtrain.doctor import peer

    share_cores()
    rank = rank_from_environment()
    assert rank is not None
    messages.send("started", rank=rank, host=socket.gethostname(), pid=os.getpid())
    address, port = meet.split(":")
    with leaving_on_failure():
        peer.attend((address, int(port)), signed_http.read_key(), rank, nic)
    messages.send("finished", rank=rank, code=0)
    # Horovod's exit handler would wait for the others.
    quit_at_once(0)
