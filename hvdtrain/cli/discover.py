"""`hvdtrain discover`: print which hosts there are now, for horovodrun's and launch's discovery.

It starts once a second: it imports little.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import click

from hvdtrain.system.errors import RunError, UserError

COMMAND_SETTINGS = {"max_content_width": 100}


@click.group("discover", invoke_without_command=True, context_settings=COMMAND_SETTINGS)
@click.pass_context
def discover_command(context: click.Context) -> None:
    """Print the current hosts, `host:slots` on a line, for elastic training.

    Exit codes: 0 printed, perhaps no host; 1 the hosts cannot be found out, and why is one line; 2 a mistake in the
    command line.
    """
    if context.invoked_subcommand is None:
        raise UserError("`hvdtrain discover` needs a command: membership, slurm or kubernetes")


@discover_command.command("membership", short_help="Hosts of a membership folder.", context_settings=COMMAND_SETTINGS)
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--stale", type=float, default=10, show_default=True, help="Seconds until a silent host is dead.")
@click.option("--settle", type=float, default=3, show_default=True, help="Seconds alive until a host is offered.")
@click.option("--flaps", type=int, default=3, show_default=True, help="How often a host may go within --within.")
@click.option("--within", type=float, default=10, show_default=True, help="Minutes.")
@click.option("--limit", type=float, default=1.5, show_default=True, help="Seconds that the folder may take to answer.")
@click.option(
    "--state", type=click.Path(path_type=Path), metavar="FILE", help="Default: one of DIR's own among temporary files."
)
def membership_command(folder: Path, state: Path | None, **given: Any) -> int:
    """Print the hosts of a membership folder that are alive and not about to be preempted.

    DIR is the --membership of `hvdtrain agent`. What was seen when is kept from one call to the next, in --state. If
    the file system hangs, the last good answer is printed; if there is none, the exit code is 1.
    """
    from hvdtrain.launch.discovery.membership import MembershipOptions, find_live_hosts

    try:
        return print_hosts(find_live_hosts(folder, MembershipOptions(**given), state))
    except (OSError, RunError) as error:
        raise RunError(f"{folder}: {getattr(error, 'strerror', None) or error}") from None


@discover_command.command("slurm", short_help="Nodes of Slurm jobs.", context_settings=COMMAND_SETTINGS)
@click.option("--job", metavar="ID", help="The number of a job, or of a job array.")
@click.option("--name", help="The name of jobs.")
@click.option("--user", help="Whose jobs, with --name. Default: one's own.")
@click.option("--slots", type=click.IntRange(min=1), help="Ranks of each node. Default: its GPUs, or else its tasks.")
@click.option("--limit", type=float, default=5, show_default=True, help="Seconds that squeue may take.")
def slurm_command(job: str | None, name: str | None, user: str | None, slots: int | None, limit: float) -> int:
    """Print the nodes of a Slurm job, or of the running tasks of all jobs of one name.

    With --name, a job array of small preemptible tasks is one pool of nodes that grows and shrinks. Without --job and
    --name, the nodes are those of the job that this runs in. A node that is about to be preempted is listed until its
    task ends; with `hvdtrain agent --source slurm` and `hvdtrain discover membership` it leaves at the notice.
    """
    from hvdtrain.launch.discovery.slurm import find_job_nodes, find_own_nodes, select_jobs

    if job and name:
        raise UserError("give --job or --name, not both")
    try:
        if job or name:
            found = find_job_nodes(select_jobs(job, name, user), slots, limit)
        else:
            found = find_own_nodes(os.environ, slots)
    except OSError as error:
        raise RunError(str(error)) from None
    return print_hosts(f"{host}:{found[host]}" for host in sorted(found))


@discover_command.command("kubernetes", short_help="Ready pods of a label selector.", context_settings=COMMAND_SETTINGS)
@click.option("--selector", required=True, metavar="LABELS", help="As kubectl's --selector.")
@click.option("--namespace", metavar="NAME", help="Default: this pod's own.")
@click.option(
    "--slots", type=click.IntRange(min=1), help="Ranks of each pod. Default: its GPUs (nvidia.com/gpu), or 1."
)
@click.option("--by", type=click.Choice(["ip", "name"]), default="ip", show_default=True, help="How pods are reached.")
@click.option("--domain", default="", metavar="NAME", help="Follows each name, such as .workers.")
@click.option("--url", help="Default: this cluster's API.")
@click.option("--token-file", type=click.Path(path_type=Path), metavar="FILE", help="Default: the service account's.")
@click.option("--ca-file", type=click.Path(path_type=Path), metavar="FILE", help="Default: the service account's.")
@click.option("--limit", type=float, default=5, show_default=True, help="Seconds that the API may take.")
def kubernetes_command(selector: str, by: str, **given: Any) -> int:
    """Print the pods of a label selector that are ready and are not being deleted.

    Within a pod, asks the cluster's API as the pod's service account, which needs `get` and `list` on pods.
    """
    from hvdtrain.launch.discovery.kubernetes import ApiAccess, PodSelection, find_ready_pods

    def end_in_time(*_: object) -> NoReturn:
        raise RunError("the API has not answered in time")

    # The time-out of a socket is for each packet: this one is for all.
    signal.signal(signal.SIGALRM, end_in_time)
    signal.setitimer(signal.ITIMER_REAL, given["limit"])
    given = {name: value for name, value in given.items() if value is not None}
    chosen = {name: given.pop(name) for name in ("namespace", "slots", "domain") if name in given}
    selection = PodSelection(selector=selector, by_name=by == "name", **chosen)
    return print_hosts(find_ready_pods(selection, ApiAccess(**given)))


def print_hosts(lines: Iterable[str]) -> int:
    """Print a host a line; return the exit code."""
    click.echo("".join(f"{line}\n" for line in lines), nl=False)
    return 0
