"""Connect ranks that `srun` started without a PMI library: ranks from Slurm's variables, and a server to meet at.

Slurm gives each task its rank, but not where the others listen. Rank 0, which is on the step's first node, serves
Horovod's store at a port that follows from the numbers of job and step. The run's secret is in the environment
(`hvdtrain launch` or the job script puts it there, and srun passes it on). If it is not, rank 0 makes one and writes it
to a file in the home folder that only its user can read, and removes the file once all ranks have met.
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
JOB_KEY = "/hvdtrain.job/name"  # key of the name of the job to which the server belongs


def count_tasks(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many tasks srun started, this process among them; 1 outside of srun."""
    number = environ.get("SLURM_STEP_NUM_TASKS", "")
    return int(number) if number.isdecimal() and "SLURM_PROCID" in environ else 1


def task_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return Horovod's variables for this task's rank, with Gloo, except for those that name the server.

    Raises:
        UserError: Slurm's variables cannot be parsed.
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
    """Return the port of rank 0's server: one reserved for the step (srun --resv-ports), or one from its numbers."""
    reserved = environ.get("SLURM_STEP_RESV_PORTS", "").partition("-")[0].partition(",")[0]
    if reserved.isdecimal():
        return int(reserved)
    return RENDEZVOUS_PORTS[(int(environ["SLURM_JOB_ID"]) * 17 + int(environ["SLURM_STEP_ID"])) % len(RENDEZVOUS_PORTS)]


def join_rendezvous(environ: Mapping[str, str]) -> tuple[dict[str, str], RendezvousServer | None]:
    """Start the server on rank 0, and wait until it answers.

    Args:
        environ: Slurm's variables; HOROVOD_GLOO_IFACE chooses the interface.

    Returns:
        Horovod's variables for this task, and on rank 0 the server, which has to live as long as the process.

    Raises:
        UserError: the nodes' names do not resolve.
        RunError: rank 0 cannot serve, or does not in time.
    """
    own = task_environment(environ)
    names = parse_node_list(environ["SLURM_STEP_NODELIST"], "SLURM_STEP_NODELIST")
    here = environ["SLURMD_NODENAME"]
    one_machine = len(names) == 1 or all(
        is_local_host(name) for name in names
    )  # several nodes of Slurm can be one machine
    others = [name for name in names if name != here]
    interface = environ.get("HOROVOD_GLOO_IFACE") or ("lo" if one_machine else interface_toward(others))
    # On the first node its own name may resolve to the loopback address.
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
            raise RunError(f"rank 0 cannot serve at {first}:{number}: {error.strerror or error}") from None
        server.values[JOB_KEY] = job.encode()
    own[SECRET] = wait_for_server((first, number), job, {**environ, **own})
    return own, server


def wait_for_server(server: tuple[str, int], job: str, environ: Mapping[str, str]) -> str:
    """Wait until the server of this job answers, and return the run's secret.

    Raises:
        RunError: it does not answer in time.
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
    """Return the file in which rank 0 leaves the secret of this job's step."""
    names = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    words = [re.sub(r"[^\w-]", "", environ.get(name, "")) for name in names]
    return Path.home() / ".hvdtrain" / f"secret-{'.'.join(words)}"


def write_secret(path: Path) -> str:
    """Make a secret, and write it to a file that only this user can read.

    Raises:
        RunError: it cannot be written.
    """
    secret = signed_http.new_secret()
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.unlink(missing_ok=True)  # left by a run that was killed
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secret)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; export {SECRET} in the job script") from None
    return secret


def read_secret(path: Path) -> str:
    """Return the secret that rank 0 has written.

    Raises:
        FileNotFoundError: it has not written it yet.
        NotSigned: others can write or read the file.
    """
    os.listdir(path.parent)  # noqa: PTH208 - opening the folder makes NFS look again
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise NotSigned(f"{path} belongs to another user, or others can read it")
        return file.read()


def remove_secret(environ: Mapping[str, str]) -> None:
    """Remove the file with the secret, once all ranks have met."""
    with contextlib.suppress(OSError):
        secret_path(environ).unlink(missing_ok=True)
