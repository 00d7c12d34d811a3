"""Ask many hosts for their facts at the same time: this one directly, others over ssh as the launchers reach them.

If a host sends none, the exit code and the output of ssh show why.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from hvdtrain.doctor.facts import gather_facts
from hvdtrain.doctor.host_facts import FactsRequest, HostFacts, dump_request, find_facts_line
from hvdtrain.system.errors import UserError
from hvdtrain.system.limits import DoctorLimits
from hvdtrain.system.network import interface_address, is_local_host, local_address_toward
from hvdtrain.system.processes import TO_STDOUT, Child, Deadline, ProcessTimeout, completed_children
from hvdtrain.system.signed_http import MOST_STRANGERS
from hvdtrain.system.ssh import build_ssh_command

EXIT_NO_FOLDER, EXIT_NO_PYTHON, EXIT_SSH_FAILED = 93, 94, 255
FORWARDED_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "TMPDIR")


@dataclass(frozen=True)
class HostReply:
    """What a host replied.

    Attributes:
        host: its name.
        facts: of the host; without content if there is an error.
        error: why it sent no facts.
        clock_offset: seconds by which its clock is at least ahead of this host's; negative if behind.
    """

    host: str
    facts: HostFacts = field(default_factory=HostFacts)
    error: str | None = None
    clock_offset: float = 0.0


def query_hosts(requests: Mapping[str, FactsRequest], ssh: Sequence[str] = ()) -> list[HostReply]:
    """Ask all hosts for facts; takes about as long as the slowest of them, and DoctorLimits.query at most.

    Args:
        requests: by the name of the host.
        ssh: more options for ssh.

    Returns:
        the replies in the same order.
    """
    local = [host for host in requests if is_local_host(host)]
    replies: dict[str, HostReply] = {}
    with contextlib.ExitStack() as undo:
        others = [host for host in requests if host not in local]
        with ThreadPoolExecutor(16) as pool:  # `ssh -G` reads the configuration for each
            commands = list(pool.map(lambda host: build_query_command(host, requests[host], ssh), others))
        queries = {
            undo.enter_context(Child(command, stderr=TO_STDOUT)): host
            for host, command in zip(others, commands, strict=True)
        }
        deadline = Deadline(DoctorLimits.query)
        for host in local:
            replies[host] = HostReply(host, gather_facts(requests[host]))
        for child in completed_children(list(queries), deadline):
            with contextlib.suppress(ProcessTimeout):
                replies[queries[child]] = read_host_reply(queries[child], child, deadline)
    late = f"did not answer within {DoctorLimits.query:g} s"
    return [replies[host] if host in replies else HostReply(host, error=late) for host in requests]


def build_query_command(host: str, request: FactsRequest, ssh: Sequence[str]) -> list[str]:
    """Return the ssh command that asks a host.

    Raises:
        UserError: there is no ssh.
    """
    if shutil.which("ssh") is None:
        raise UserError(f"host {host!r} is not this one, and there is no ssh on the PATH to reach it")
    return build_ssh_command(host, [build_remote_command(request)], ssh)


def build_remote_command(request: FactsRequest) -> str:
    """Return the command for a host's shell: the same Python in the same folder, as the launchers start ranks."""
    names = [name for name in os.environ if name in FORWARDED_VARIABLES or name.startswith("PYTHON")]
    python = ["env", *(f"{name}={os.environ[name]}" for name in names), sys.executable, "-m", "hvdtrain.doctor.facts"]
    lines = [
        f"cd {shlex.quote(working_folder())} 2>/dev/null || exit {EXIT_NO_FOLDER}",
        f"test -x {shlex.quote(sys.executable)} || exit {EXIT_NO_PYTHON}",
        f"exec {shlex.join([*python, dump_request(request)])}",
    ]
    # The login shell may be any other.
    return shlex.join(["sh", "-c", "; ".join(lines)])


def working_folder() -> str:
    """Return the current folder as text."""
    return os.getcwd()  # noqa: PTH109 - with the symbolic links of its path


def read_host_reply(host: str, child: Child, deadline: Deadline) -> HostReply:
    """Return the facts that the ssh to a host has printed, or why there are none.

    Raises:
        ProcessTimeout: ssh still runs at the deadline.
    """
    received_at, code = time.time(), child.wait_for_exit(deadline)
    output = child.stdout.decode(errors="replace")
    try:
        facts = find_facts_line(output) if code == 0 else None
    except ValueError as error:
        return HostReply(host, error=f"sends facts that this hvdtrain cannot read: {error}; install the same one there")
    if facts is None:
        return HostReply(host, error=explain_failure(code, output))
    # Its clock was read at some time between started_at and received_at.
    clock = max(0.0, facts.time - received_at) - max(0.0, child.started_at - facts.time)
    return HostReply(host, facts, clock_offset=clock)


def explain_failure(code: int, output: str) -> str:
    """Return why a host sent no facts, from the exit code and the output of ssh."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = lines[-1].removeprefix("ssh: ") if lines else "ssh printed nothing"
    if code == EXIT_NO_FOLDER:
        return f"has no folder {working_folder()}, which the ranks start in"
    if code == EXIT_NO_PYTHON:
        return f"has no {sys.executable}: it needs this Python at the same path"
    if code == EXIT_SSH_FAILED:
        if "banner exchange" in output:
            return "accepts connections but does not respond: hung or overloaded"
        if "Permission denied" in output or "Too many authentication failures" in output:
            return f"rejects this host's ssh keys: {last}"
        return f"cannot be reached: {last}"
    if re.search(r"No module named '?hvdtrain|cannot import name '\w+' from 'hvdtrain", output):
        return f"has no hvdtrain in {sys.executable}, or another version"
    return f"cannot run {sys.executable}: exit code {code}: {last[:300]}"


def local_address_or_none(name: str) -> str | None:
    """Return this host's address on the way to another one, None if there is no route."""
    try:
        return local_address_toward(name)
    except UserError:
        return None


def query_hosts_and_connect_back(
    hosts: Sequence[str], nic: str | None, request: FactsRequest, ssh: Sequence[str]
) -> list[HostReply]:
    """Ask all hosts for facts, and to connect back to this one.

    Args:
        hosts: their names.
        nic: this host's interface to connect to; None: the one toward each host.
        request: what to ask for; its folders are those of the first host, where rank 0 writes.
        ssh: more options for ssh.

    Raises:
        UserError: this host has no such interface.
    """
    own = interface_address(nic) if nic else None
    # Nothing is read from connections: it is enough that a host can connect.
    with socket.create_server((own or "", 0), backlog=len(hosts) + MOST_STRANGERS) as listener:
        port = listener.getsockname()[1]
        requests = {}
        for host in hosts:
            folders, address = request.folders if host == hosts[0] else [], own or local_address_or_none(host)
            requests[host] = replace(request, folders=folders, back=(address, port) if address else None)
        return query_hosts(requests, ssh)
