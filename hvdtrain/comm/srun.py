"""Ranks that `srun` started without a PMI library: their places from Slurm's variables, a server where they meet.

Slurm tells each task its place, but none where the others listen. Rank 0, which is on the step's first node, serves
Horovod's store at a port that follows from the numbers of job and step. The run's secret is in the environment
(`hvdtrain launch` puts it there, or the job script: srun hands it on); where it is not, rank 0 makes one and leaves it
for the others in a file in the home folder that only its user can read, until all have met.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from hvdtrain.comm.rendezvous import RendezvousServer
from hvdtrain.system import signed_http
from hvdtrain.system.errors import RunError
from hvdtrain.system.http import request_signed
from hvdtrain.system.limits import RendezvousLimits
from hvdtrain.system.network import interface_address, interface_toward, is_local_host, resolve_address
from hvdtrain.system.nodelist import parse_node_list, parse_repeated_counts
from hvdtrain.system.processes import Deadline
from hvdtrain.system.signed_http import SECRET, NotSigned, SignedClient

RENDEZVOUS_PORTS = range(20_000, 32_000)  # below those that Linux gives to outgoing connections
JOB_KEY = "/hvdtrain.job/name"  # under which the server tells whose it is


def count_tasks(environ: Mapping[str, str] = os.environ) -> int:
    """How many tasks srun started along with this process; 1 outside of srun."""
    number = environ.get("SLURM_STEP_NUM_TASKS", "")
    return int(number) if number.isdecimal() and "SLURM_PROCID" in environ else 1


def task_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Horovod's variables for the place of this task, for Gloo, but for where the server is.

    Raises UserError for variables that are not understood.
    """
    rank, local_rank, node = (int(environ[f"SLURM_{name}"]) for name in ("PROCID", "LOCALID", "NODEID"))
    on_nodes = parse_repeated_counts(environ["SLURM_STEP_TASKS_PER_NODE"], "SLURM_STEP_TASKS_PER_NODE")
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


def rendezvous_port(environ: Mapping[str, str]) -> int:
    """Where rank 0 serves: a reserved port of the step (srun --resv-ports), or else one that its numbers give."""
    reserved = environ.get("SLURM_STEP_RESV_PORTS", "").partition("-")[0].partition(",")[0]
    if reserved.isdecimal():
        return int(reserved)
    return RENDEZVOUS_PORTS[(int(environ["SLURM_JOB_ID"]) * 17 + int(environ["SLURM_STEP_ID"])) % len(RENDEZVOUS_PORTS)]


def join_rendezvous(environ: Mapping[str, str]) -> tuple[dict[str, str], RendezvousServer | None]:
    """Horovod's variables for this task; rank 0's with the server, which is to live as long as the process.

    Returns when the server answers. HOROVOD_GLOO_IFACE in `environ` chooses the interface.
    Raises UserError where the nodes' names do not resolve; RunError if rank 0 cannot serve, or does not in time.
    """
    own = task_environment(environ)
    names = parse_node_list(environ["SLURM_STEP_NODELIST"], "SLURM_STEP_NODELIST")
    here = environ["SLURMD_NODENAME"]
    one_machine = len(names) == 1 or all(is_local_host(name) for name in names)  # which several nodes can be
    others = [name for name in names if name != here]
    interface = environ.get("HOROVOD_GLOO_IFACE") or ("lo" if one_machine else interface_toward(others))
    # On the first node its own name may be that of the loopback.
    first = interface_address(interface) if one_machine or here == names[0] else resolve_address(names[0])
    job = f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"
    number = rendezvous_port(environ)
    own |= {
        "HOROVOD_GLOO_IFACE": interface,
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": first,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(number),
    }
    server = None
    if own["HOROVOD_RANK"] == "0":
        if SECRET not in environ:
            own[SECRET] = write_secret(secret_path(environ))
        try:
            server = RendezvousServer(first, {}, number, signed_http.read_key({**environ, **own}))
        except OSError as error:
            raise RunError(f"rank 0 cannot serve the others at {first}:{number}: {error.strerror or error}") from None
        server.values[JOB_KEY] = job.encode()
    own[SECRET] = wait_for_server((first, number), job, {**environ, **own})
    return own, server


def wait_for_server(server: tuple[str, int], job: str, environ: Mapping[str, str]) -> str:
    """Return the run's secret when the server of this job answers to it.

    Raises:
        RunError: it does not in time.
    """
    limits = RendezvousLimits.from_environment(environ)
    deadline = Deadline(limits.server_start)
    while True:
        try:
            secret = environ.get(SECRET) or read_secret(secret_path(environ))
            client = SignedClient(signed_http.read_key({SECRET: secret}))
            _, answer = request_signed(client, server, "GET", JOB_KEY, timeout=limits.server_response)
            if answer.decode(errors="replace") == job:
                return secret
            problem = f"another job's server ({answer.decode(errors='replace')}) is there"
        except NotSigned as error:
            problem = str(error)
        except FileNotFoundError as error:
            problem = f"{error.filename} is not there; if the nodes do not share it, export {SECRET} in the job script"
        except OSError as error:
            problem = str(error)
        if not deadline.wait(limits.poll):
            where = f"{server[0]}:{server[1]}"
            raise RunError(f"rank 0 does not serve at {where} within {limits.server_start:g} s: {problem}")


def secret_path(environ: Mapping[str, str]) -> Path:
    """Where rank 0 leaves the secret of this job's step."""
    names = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    words = [re.sub(r"[^\w-]", "", environ.get(name, "")) for name in names]
    return Path.home() / ".hvdtrain" / f"secret-{'.'.join(words)}"


def write_secret(path: Path) -> str:
    """Make a secret, and leave it in a file that only this user can read.

    Raises:
        RunError: it cannot be written.
    """
    secret = signed_http.new_secret()
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.unlink(missing_ok=True)  # of a run that was ended
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secret)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; export {SECRET} in the job script") from None
    return secret


def read_secret(path: Path) -> str:
    """The secret that rank 0 has left.

    Raises:
        FileNotFoundError: it has not yet.
        NotSigned: the file is not only this user's.
    """
    os.listdir(path.parent)  # noqa: PTH208 - opening the folder makes NFS look again
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise NotSigned(f"{path} belongs to another user, or others can read it")
        return file.read()


def remove_secret(environ: Mapping[str, str]) -> None:
    """Remove what rank 0 has left, once all ranks have met."""
    with contextlib.suppress(OSError):
        secret_path(environ).unlink(missing_ok=True)
