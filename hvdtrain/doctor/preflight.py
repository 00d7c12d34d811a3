"""Check hosts before a launch: what would make a rank fail or hang on one of them is reported before any starts."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace

from hvdtrain.doctor.findings import diagnose_hosts
from hvdtrain.doctor.host_facts import FactsRequest, HostFacts, SoftwareFacts
from hvdtrain.doctor.query import query_hosts_and_connect_back
from hvdtrain.system.errors import RunError
from hvdtrain.system.network import is_local_host

NO_FILES = FactsRequest()


def check_hosts(
    hosts: Sequence[str], request: FactsRequest = NO_FILES, *, nic: str | None = None, ssh: Sequence[str] = ()
) -> None:
    """Check that ranks can run on all hosts, unless all are this one; print warnings. Takes less than a second if so.

    Args:
        hosts: their names.
        request: which files and folders they must have. If there are files, ranks run a program, which may need
            neither torch nor Horovod: these are not compared.
        nic: the interface that they will use; None: the one toward each host.
        ssh: more options for ssh.

    Raises:
        RunError: hosts cannot take part, a line for each. The command line is right, so it is not a UserError.
        UserError: this host has no interface `nic`.
    """
    if all(is_local_host(host) for host in hosts):
        return
    replies = query_hosts_and_connect_back(hosts, nic, replace(request, full=False), ssh)
    if request.programs:
        replies = [replace(reply, facts=without_frameworks(reply.facts)) for reply in replies]
    found = diagnose_hosts(replies, nic)
    for finding in found:
        if not finding.bad:
            print(f"hvdtrain: warning: {finding}", file=sys.stderr)
    wrong = [str(finding) for finding in found if finding.bad]
    if wrong:
        raise RunError("\n".join(wrong))


def without_frameworks(facts: HostFacts) -> HostFacts:
    """Return the facts of a host without those of torch and Horovod."""
    software = facts.software
    return replace(facts, software=SoftwareFacts(software.python, software.executable, software.hvdtrain))


def parse_run_dir(args: Sequence[str]) -> list[str]:
    """Return the folder in which `hvdtrain ARGS` writes, none unless it is `hvdtrain train`."""
    if args[:1] != ["train"]:
        return []
    found = [arg.partition("=")[2] for arg in args if arg.startswith("--run-dir=")]
    found += [after for arg, after in itertools.pairwise(args) if arg == "--run-dir"]
    return found[-1:] or ["runs"]
