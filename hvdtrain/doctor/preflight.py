"""Before a launch over several hosts: what would make a rank fail, or hang, on one of them, said before any starts."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

from hvdtrain.doctor.ask import query_hosts_and_connect_back
from hvdtrain.doctor.findings import diagnose_hosts
from hvdtrain.system.errors import RunError
from hvdtrain.system.network import is_local_host


def check_hosts(
    hosts: Sequence[str], args: Sequence[str] = (), *, nic: str | None = None, ssh: Sequence[str] = ()
) -> None:
    """Ask all hosts at once what they have, unless all are this one; warn of what may be harmless.

    args: of the command that ranks will run: its --run-dir must be writable. nic: the interface that they will use.
    ssh: options for ssh. Takes less than a second where all is well.
    Raises RunError with a line for each host that cannot take part: that is no mistake in the command line, so it ends
    as a rank that fails would. Raises UserError if this host has no interface `nic`.
    """
    if all(is_local_host(host) for host in hosts):
        return
    answers = query_hosts_and_connect_back(hosts, nic, full=False, first=parse_run_dir(args), ssh=ssh)
    found = diagnose_hosts(answers, nic)
    for finding in found:
        if not finding.bad:
            print(f"hvdtrain: warning: {finding}", file=sys.stderr)
    wrong = [str(finding) for finding in found if finding.bad]
    if wrong:
        raise RunError("\n".join(wrong))


def parse_run_dir(args: Sequence[str]) -> list[str]:
    """Where `hvdtrain ARGS` writes, if it is a training."""
    if args[:1] != ["train"]:
        return []
    found = [arg.partition("=")[2] for arg in args if arg.startswith("--run-dir=")]
    found += [after for arg, after in itertools.pairwise(args) if arg == "--run-dir"]
    return found[-1:] or ["runs"]
