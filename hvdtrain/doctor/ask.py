"""The facts of many hosts, asked at the same time: over ssh as the launchers reach them, directly where it is this one.

A host that does not answer is told apart by how it does not.
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
from dataclasses import dataclass, field

from hvdtrain.doctor.facts import Facts, FactsRequest, dump_request, gather_facts, parse_facts
from hvdtrain.system.errors import UserError
from hvdtrain.system.limits import DoctorLimits
from hvdtrain.system.network import interface_address, is_local_host, local_address_toward
from hvdtrain.system.processes import TO_STDOUT, Child, Deadline, ProcessTimeout, completed_children
from hvdtrain.system.signed_http import MOST_STRANGERS
from hvdtrain.system.ssh import build_ssh_command

EXIT_NO_FOLDER, EXIT_NO_PYTHON, EXIT_SSH_FAILED = 93, 94, 255
FORWARDED_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "TMPDIR")
NO_SSH_OUTPUT = "ssh brings back nothing"


@dataclass(frozen=True)
class HostReply:
    """What a host said, or in `wrong` why it said nothing."""

    host: str
    facts: Facts = field(default_factory=dict)
    error: str | None = None
    clock_offset: float = 0.0  # seconds that its clock is ahead of this host's, at least; below 0 if behind


def query_hosts(wanted: Mapping[str, FactsRequest], ssh: Sequence[str] = ()) -> list[HostReply]:
    """Ask each host for the facts wanted of it; the answers in the same order.

    ssh: more options for ssh. Takes about as long as the slowest host, and DoctorLimits.query at most.
    """
    here = [host for host in wanted if is_local_host(host)]
    answers: dict[str, HostReply] = {}
    with contextlib.ExitStack() as undo:
        others = [host for host in wanted if host not in here]
        with ThreadPoolExecutor(16) as pool:  # for ssh's configuration of each
            commands = list(pool.map(lambda host: build_query_command(host, wanted[host], ssh), others))
        queries = {
            undo.enter_context(Child(command, stderr=TO_STDOUT)): host
            for host, command in zip(others, commands, strict=True)
        }
        deadline = Deadline(DoctorLimits.query)
        for host in here:
            answers[host] = HostReply(host, gather_facts(wanted[host]))
        for child in completed_children(list(queries), deadline):
            with contextlib.suppress(ProcessTimeout):
                answers[queries[child]] = parse_reply(queries[child], child, deadline)
        answers |= {
            host: HostReply(host, error=f"did not answer within {DoctorLimits.query:g} s")
            for host in wanted
            if host not in answers
        }
    return [answers[host] for host in wanted]


def build_query_command(host: str, wanted: FactsRequest, ssh: Sequence[str]) -> list[str]:
    """The ssh that asks a host. Raises UserError if there is no ssh."""
    if shutil.which("ssh") is None:
        raise UserError(f"host {host!r} is not this one, and there is no ssh on the PATH to reach it")
    return build_ssh_command(host, [build_remote_command(wanted)], ssh)


def build_remote_command(wanted: FactsRequest) -> str:
    """What a host's shell is to do: the same Python in the same folder, as the launchers start ranks."""
    names = [name for name in os.environ if name in FORWARDED_VARIABLES or name.startswith("PYTHON")]
    python = ["env", *(f"{name}={os.environ[name]}" for name in names), sys.executable, "-m", "hvdtrain.doctor.facts"]
    lines = [
        f"cd {shlex.quote(working_folder())} 2>/dev/null || exit {EXIT_NO_FOLDER}",
        f"test -x {shlex.quote(sys.executable)} || exit {EXIT_NO_PYTHON}",
        f"exec {shlex.join([*python, dump_request(wanted)])}",
    ]
    # Whatever the login shell is.
    return shlex.join(["sh", "-c", "; ".join(lines)])


def working_folder() -> str:
    """This folder, as text."""
    return os.getcwd()  # noqa: PTH109 - as it is written, not where links lead


def parse_reply(host: str, child: Child, deadline: Deadline) -> HostReply:
    """Return the facts that the ssh to a host has printed, or why there are none. Raises ProcessTimeout."""
    come, code = time.time(), child.wait_for_exit(deadline)
    said = child.stdout.decode(errors="replace")
    facts = parse_facts(said) if code == 0 else None
    if facts is None:
        return HostReply(host, error=explain_failure(code, said))
    # Its clock was read at some time between these two.
    clock = max(0.0, facts["time"] - come) - max(0.0, child.started_at - facts["time"])
    return HostReply(host, facts, clock_offset=clock)


def explain_failure(code: int, said: str) -> str:
    """Why a host told no facts, from ssh's code and words."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1].removeprefix("ssh: ") if lines else NO_SSH_OUTPUT
    if code == EXIT_NO_FOLDER:
        return f"has no folder {working_folder()}, which the ranks start in"
    if code == EXIT_NO_PYTHON:
        return f"has no {sys.executable}: it needs this Python at the same path"
    if code == EXIT_SSH_FAILED:
        if "banner exchange" in said:
            return "takes connections and does not answer: it hangs, or has no time"
        if "Permission denied" in said or "Too many authentication failures" in said:
            return f"lets nobody in by the ssh keys that are here: {last}"
        return f"cannot be reached: {last}"
    if re.search(r"No module named '?hvdtrain|cannot import name '\w+' from 'hvdtrain", said):
        return f"has no hvdtrain in {sys.executable}, or another one"
    return f"cannot run {sys.executable}, which ended with code {code}: {last[:300]}"


def local_address_or_none(name: str) -> str | None:
    """This host's address on the way to another one, None where there is no way."""
    try:
        return local_address_toward(name)
    except UserError:
        return None


def query_hosts_and_connect_back(
    hosts: Sequence[str], nic: str | None, *, full: bool, first: Sequence[str], ssh: Sequence[str]
) -> list[HostReply]:
    """As `ask`, and whether each host can connect to this one: by the interface `nic`, if given.

    first: folders of the first host, where rank 0 writes. Raises UserError if this host has no such interface.
    """
    # Nothing is read from it: that a host can connect is all.
    own = interface_address(nic) if nic else None
    with socket.create_server((own or "", 0), backlog=len(hosts) + MOST_STRANGERS) as door:
        port = door.getsockname()[1]
        wanted = {}
        for host in hosts:
            back = own or local_address_or_none(host)
            wanted[host] = FactsRequest(first if host == hosts[0] else (), (back, port) if back else None, full)
        return query_hosts(wanted, ssh)
