"""Ranks that `srun` started without a PMI library: their places from Slurm's variables, a server where they meet.

Slurm tells each task its place, but none where the others listen. Rank 0, which is on the step's first node, serves
Horovod's store at a port that follows from the numbers of job and step.
"""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

from hvdtrain.collectives.rendezvous import Server
from hvdtrain.errors import RunError
from hvdtrain.network import address, address_of, interface_to, is_here
from hvdtrain.nodelist import counts, nodes

PORTS = range(20_000, 32_000)  # below those that Linux gives to outgoing connections
WAIT_SECONDS = 120.0  # for rank 0 to serve; HOROVOD_START_TIMEOUT, if set
NAME = "/hvdtrain.job/name"  # under which the server tells whose it is


def tasks(environ: Mapping[str, str] = os.environ) -> int:
    """How many tasks srun started along with this process; 1 outside of srun."""
    number = environ.get("SLURM_STEP_NUM_TASKS", "")
    return int(number) if number.isdecimal() and "SLURM_PROCID" in environ else 1


def place(environ: Mapping[str, str]) -> dict[str, str]:
    """Horovod's variables for the place of this task, for Gloo, but for where the server is.

    Raises UserError for variables that are not understood.
    """
    rank, local_rank, node = (int(environ[f"SLURM_{name}"]) for name in ("PROCID", "LOCALID", "NODEID"))
    on_nodes = counts(environ["SLURM_STEP_TASKS_PER_NODE"], "SLURM_STEP_TASKS_PER_NODE")
    across = [number for number, on_node in enumerate(on_nodes) if on_node > local_rank]
    return {
        "HOROVOD_RANK": str(rank),
        "HOROVOD_SIZE": str(sum(on_nodes)),
        "HOROVOD_LOCAL_RANK": str(local_rank),
        "HOROVOD_LOCAL_SIZE": str(on_nodes[node]),
        "HOROVOD_CROSS_RANK": str(across.index(node)),
        "HOROVOD_CROSS_SIZE": str(len(across)),
        "HOROVOD_HOSTNAME": environ["SLURMD_NODENAME"],
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
    }


def port(environ: Mapping[str, str]) -> int:
    """Where rank 0 serves: a reserved port of the step (srun --resv-ports), or else one that its numbers give."""
    reserved = environ.get("SLURM_STEP_RESV_PORTS", "").partition("-")[0].partition(",")[0]
    if reserved.isdecimal():
        return int(reserved)
    return PORTS[(int(environ["SLURM_JOB_ID"]) * 17 + int(environ["SLURM_STEP_ID"])) % len(PORTS)]


def meet(environ: Mapping[str, str]) -> tuple[dict[str, str], Server | None]:
    """Horovod's variables for this task; rank 0's with the server, which is to live as long as the process.

    Returns when the server answers. HOROVOD_GLOO_IFACE in `environ` chooses the interface.
    Raises UserError where the nodes' names do not resolve; RunError if rank 0 cannot serve, or does not in time.
    """
    own = place(environ)
    names = nodes(environ["SLURM_STEP_NODELIST"], "SLURM_STEP_NODELIST")
    here = environ["SLURMD_NODENAME"]
    one_machine = len(names) == 1 or all(is_here(name) for name in names)  # which several nodes can be
    others = [name for name in names if name != here]
    interface = environ.get("HOROVOD_GLOO_IFACE") or ("lo" if one_machine else interface_to(others))
    # On the first node its own name may be that of the loopback.
    first = address_of(interface) if one_machine or here == names[0] else address(names[0])
    job = f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"
    number = port(environ)
    own |= {
        "HOROVOD_GLOO_IFACE": interface,
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": first,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(number),
    }
    server = None
    if own["HOROVOD_RANK"] == "0":
        try:
            server = Server(first, {}, number)
        except OSError as error:
            raise RunError(f"rank 0 cannot serve the others at {first}:{number}: {error.strerror}") from None
        server.values[NAME] = job.encode()
    wait_for(f"{first}:{number}", job, float(environ.get("HOROVOD_START_TIMEOUT", WAIT_SECONDS)))
    return own, server


def wait_for(where: str, job: str, seconds: float) -> None:
    """Return when the server of this job answers. Raises RunError if it does not in time."""
    until = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"http://{where}{NAME}", timeout=5) as answer:
                said = answer.read().decode(errors="replace")
            problem = f"another job's ({said}) is there" if said != job else ""
        except (OSError, urllib.error.URLError) as error:
            problem = str(getattr(error, "reason", error))
        if not problem:
            return
        if time.monotonic() > until:
            raise RunError(f"rank 0 does not serve at {where} within {seconds:g} s: {problem}")
        time.sleep(0.1)
