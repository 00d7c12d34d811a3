"""`hvdtrain agent`: keep a host in the membership folder until it is to be preempted."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import click

from hvdtrain.system.errors import UserError


@click.command("agent", context_settings={"max_content_width": 100})
@click.option(
    "--source",
    required=True,
    type=click.Choice(["aws", "gcp", "azure", "slurm", "signal", "file"]),
    help="Where notices come from: a cloud's metadata server, signals (slurm, signal), or --notice-file.",
)
@click.option(
    "--membership",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="The folder that all hosts and the launcher share.",
)
@click.option("--host", metavar="NAME", help="This host's name, as the launcher reaches it. Default: its own name.")
@click.option("--slots", type=click.IntRange(min=1), metavar="N", help="Ranks it takes. Default: its GPUs, or 1.")
@click.option("--url", metavar="BASE", help="Another metadata server, such as http://localhost:1338.")
@click.option("--notice-file", type=click.Path(path_type=Path), metavar="FILE", help="For file: its being there.")
@click.option("--rebalance", is_flag=True, help="For aws: leave at its earlier recommendation to rebalance, too.")
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="From a notice to the end, where the source does not say. Default: 30; for aws 120.",
)
@click.option(
    "--interval",
    type=click.FloatRange(min=0.05),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Between heartbeats.",
)
@click.option(
    "--boot-id",
    metavar="ID",
    help="What names this life of the host: once it was told to go, only another one may join. "
    "Default: the kernel's boot id; for slurm, with the job and its restarts.",
)
def agent_command(
    source: str,
    membership: Path,
    host: str | None,
    slots: int | None,
    url: str | None,
    notice_file: Path | None,
    rebalance: bool,
    grace: float | None,
    interval: float,
    boot_id: str | None,
) -> int:
    """Keep this host in the membership folder, and say there when it is about to be preempted.

    One for each host; cluster/discovery/membership.py offers the launcher those that are alive and stay. After a notice
    it writes NAME.draining, and goes on until the host ends. SIGTERM or Ctrl-C takes the host out of the folder; for
    slurm and signal SIGTERM and SIGUSR1 (slurm: SIGCONT, too) are the notice, and for signal a second SIGTERM ends it;
    for slurm it ends at the deadline.
    """
    from hvdtrain.launch.hosts import parse_host
    from hvdtrain.preemption.agent import Agent, AgentConfig
    from hvdtrain.preemption.membership_folder import host_boot_id
    from hvdtrain.preemption.notices import make_notice_source

    if (source == "file") != (notice_file is not None):
        raise UserError("--source file and --notice-file need each other")
    if url is not None and source not in ("aws", "gcp", "azure"):
        raise UserError(f"--url is for aws, gcp and azure, not for {source}")
    if url is not None and not url.startswith(("http://", "https://")):
        raise UserError(f"--url {url!r} does not begin with http:// or https://")
    if rebalance and source != "aws":
        raise UserError(f"--rebalance is for aws, not for {source}")
    name = socket.gethostname() if host is None else host
    if ":" in name:
        raise UserError(f"--host {name!r} is not a host name or IPv4 address; --slots says how many ranks it takes")
    parse_host(name, "--host")
    try:
        membership.mkdir(exist_ok=True)  # but not its parents: they may be what is not mounted
        life = boot_id or host_boot_id(os.environ, slurm=source == "slurm")
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    watched = make_notice_source(source, url, name, notice_file, grace, rebalance=rebalance)
    grace = 30.0 if grace is None else grace
    Agent(AgentConfig(membership, name, slots or count_gpu_devices() or 1, life, source, grace, interval)).run_agent(
        watched
    )
    return 0


def count_gpu_devices() -> int:
    """How many NVIDIA GPUs this host shows, without asking torch."""
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))
