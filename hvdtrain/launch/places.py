"""Where a rank of a program is among all ranks, and the variables by which each framework finds its ranks.

Every rank reports its place, its address and free ports of its host to a store; rank 0 puts all of them together:

    rank k   PUT /program/k        RankPlace            for all k
    rank 0   GET /program/k        for all k
    rank 0   PUT /program/world    list of RankPlace
    rank k   GET /program/world

The store is that of `hvdtrain launch` (HVDTRAIN_STORE); without one, horovodrun's own, or under srun rank 0's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hvdtrain.comm.srun import RENDEZVOUS_PORTS
from hvdtrain.system import signed_http
from hvdtrain.system.errors import RunError
from hvdtrain.system.http import request_signed
from hvdtrain.system.limits import ProgramLimits
from hvdtrain.system.network import local_address_toward
from hvdtrain.system.processes import Deadline
from hvdtrain.system.records import encode_record, parse_record
from hvdtrain.system.signed_http import NotSigned, SignedClient
from hvdtrain.system.strict_json import parse_strict_json

STORE_VARIABLE = "HVDTRAIN_STORE"  # address:port of the store of `hvdtrain launch`
KEY_PREFIX = "/program/"
STOP_KEY = f"{KEY_PREFIX}stop"  # the name of the signal that the user has sent, TERM for example
# By launcher, the variables of a rank, the number of ranks, the rank on its host and the number there.
PLACE_VARIABLES = (
    ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    (
        *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
# Devices of other makers than NVIDIA that torch and JAX compute on.
OTHER_DEVICE_FILES = ("/dev/kfd", "/dev/accel", "/dev/davinci_manager")


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """A rank among all ranks, and what the others need to reach it.

    Attributes:
        rank, size: its number and how many there are.
        local_rank, local_size: the same on its host.
        address: of its host, toward the others.
        ports: free ports of its host: for MASTER_PORT, JAX's coordinator and TensorFlow's server.
        node: what its launcher calls its host.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str = "127.0.0.1"
    ports: tuple[int, int, int] = (0, 0, 0)
    node: str = ""


def find_place(environ: Mapping[str, str]) -> RankPlace | None:
    """Return a rank's place by the variables of its launcher, without address and ports; None if there are none."""
    for names in PLACE_VARIABLES:
        values = [environ.get(name, "") for name in names]
        if all(value.isdecimal() for value in values):
            rank, size, local_rank, local_size = map(int, values)
            node = environ.get("HOROVOD_HOSTNAME", "")
            return RankPlace(rank=rank, size=size, local_rank=local_rank, local_size=local_size, node=node)
    return None


def find_rank(environ: Mapping[str, str]) -> int:
    """Return the number of a rank whose place may not be known yet, as a task of srun; 0 if it is alone."""
    place, task = find_place(environ), environ.get("SLURM_PROCID", "")
    return place.rank if place else int(task) if task.isdecimal() else 0


def find_store(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Return the address and port of the store; None if there is none."""
    address, _, port = environ.get(STORE_VARIABLE, "").rpartition(":")
    if not address:
        address, port = (environ.get(f"HOROVOD_GLOO_RENDEZVOUS_{name}", "") for name in ("ADDR", "PORT"))
    return (address, int(port)) if address and port.isdecimal() else None


def choose_ports(place: RankPlace, address: str) -> tuple[int, int, int]:
    """Return three free ports of a rank's host, outside of those that Linux gives to outgoing connections.

    Each rank of a host chooses from ports of its own, so that no two choose the same one.

    Args:
        place: the rank.
        address: of the host.

    Raises:
        RunError: there are fewer.
    """
    candidates = RENDEZVOUS_PORTS[place.local_rank :: place.local_size]
    ports: list[int] = []
    for port in random.SystemRandom().sample(candidates, len(candidates)):
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == 3:
            return ports[0], ports[1], ports[2]
    raise RunError(f"{address} has no three free ports from {RENDEZVOUS_PORTS[0]} to {RENDEZVOUS_PORTS[-1]}")


def meet_ranks(place: RankPlace, store: tuple[str, int], environ: Mapping[str, str]) -> list[RankPlace]:
    """Report a rank's place and ports to the store, wait for those of all ranks, and return them by rank.

    Raises:
        RunError: a rank has not started in time, or the store does not answer.
    """
    limits = ProgramLimits.from_environment(environ)
    address = local_address_toward(store[0])
    place = replace(place, address=address, ports=choose_ports(place, address))
    client = SignedClient(signed_http.read_key(environ))
    deadline = Deadline(limits.start)

    def request(method: str, key: str, body: bytes = b"") -> bytes | None:
        while True:
            try:
                status, answer = request_signed(client, store, method, KEY_PREFIX + key, body, timeout=limits.store)
                return answer if status == 200 else None
            except OSError as error:  # with hundreds of ranks it may be overloaded for a moment
                if isinstance(error, NotSigned) or not deadline.wait(limits.poll):
                    raise

    def wait_for(key: str, what: str) -> bytes:
        while (answer := request("GET", key)) is None:
            if not deadline.wait(limits.poll):
                raise RunError(f"{what} has not started within {limits.start:g} s; HOROVOD_START_TIMEOUT gives it more")
        return answer

    try:
        request("PUT", str(place.rank), encode_places([place]))
        if place.rank == 0:
            world = [parse_places(wait_for(str(rank), f"rank {rank}"))[0] for rank in range(place.size)]
            request("PUT", "world", encode_places(world))
            return world
        return parse_places(wait_for("world", "one of the other ranks"))
    except (OSError, ValueError) as error:
        raise RunError(f"the store at {store[0]}:{store[1]} does not answer: {error}") from None


def read_stop_signal(environ: Mapping[str, str]) -> int | None:
    """Return the signal by which the user stops the ranks, if `hvdtrain launch` has announced one in its store."""
    if STORE_VARIABLE not in environ or (store := find_store(environ)) is None:
        return None
    with contextlib.suppress(OSError):
        client, limit = SignedClient(signed_http.read_key(environ)), ProgramLimits.store
        status, name = request_signed(client, store, "GET", STOP_KEY, timeout=limit)
        if status == 200:
            return signal.Signals[f"SIG{name.decode()}"]
    return None


def derive_local_world(place: RankPlace, environ: Mapping[str, str]) -> list[RankPlace] | None:
    """Return all ranks of an MPI job without a store, with ports that follow from the job's name.

    So a line of mpirun that `--dry-run` has printed starts a program on one host; None over several hosts.
    """
    job = environ.get("PMIX_NAMESPACE", "")
    if not job or place.size != place.local_size:
        return None
    start = int(hashlib.sha256(job.encode()).hexdigest(), 16) % (len(RENDEZVOUS_PORTS) - place.size - 2)
    master, coordinator, *servers = RENDEZVOUS_PORTS[start : start + place.size + 2]
    return [
        replace(place, rank=rank, local_rank=rank, ports=(master, coordinator, server))
        for rank, server in enumerate(servers)
    ]


def encode_places(places: Sequence[RankPlace]) -> bytes:
    """Return places as JSON."""
    return json.dumps(encode_record(list(places))).encode()


def parse_places(data: bytes) -> list[RankPlace]:
    """Return the places in what `encode_places` returned. Raises ValueError if it is something else."""
    places: list[RankPlace] = parse_record(parse_strict_json(data), list[RankPlace])
    return places


def place_variables(place: RankPlace) -> dict[str, str]:
    """Return the variables of a rank that need no other rank: torch's names, and Open MPI's, which JAX reads."""
    numbers = {
        "RANK": place.rank,
        "WORLD_SIZE": place.size,
        "LOCAL_RANK": place.local_rank,
        "LOCAL_WORLD_SIZE": place.local_size,
        "JAX_NUM_PROCESSES": place.size,
        "JAX_PROCESS_ID": place.rank,
        "OMPI_COMM_WORLD_RANK": place.rank,
        "OMPI_COMM_WORLD_SIZE": place.size,
        "OMPI_COMM_WORLD_LOCAL_RANK": place.local_rank,
        "OMPI_COMM_WORLD_LOCAL_SIZE": place.local_size,
    }
    return {name: str(number) for name, number in numbers.items()}


def world_variables(world: Sequence[RankPlace], rank: int) -> dict[str, str]:
    """Return the variables by which a rank's frameworks reach the others.

    Args:
        world: all ranks.
        rank: whose variables.
    """
    first, own = world[0], world[rank]
    leaders = [place.node or place.address for place in world if place.local_rank == 0]
    node = str(leaders.index(own.node or own.address))
    coordinator = f"{first.address}:{first.ports[1]}"
    workers = [f"{place.address}:{place.ports[2]}" for place in world]
    return {
        "MASTER_ADDR": first.address,
        "MASTER_PORT": str(first.ports[0]),
        "GROUP_RANK": node,
        "NODE_RANK": node,
        "GROUP_WORLD_SIZE": str(len(leaders)),
        # Lightning takes the variables above, also within a Slurm job, if this one is there.
        "TORCHELASTIC_RUN_ID": f"hvdtrain-{first.ports[0]}",
        "JAX_COORDINATOR_ADDRESS": coordinator,
        # jax.distributed.initialize() without arguments knows no number and no rank but those of Slurm and of an Open
        # MPI that sets this variable, which is not read for anything else; the coordinator is the one above.
        "OMPI_MCA_orte_hnp_uri": f"0.0;tcp://{coordinator}",
        "TF_CONFIG": json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": rank}}),
    }


def gpu_variables(local_rank: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that leave a rank one GPU: of those visible, the one of its number on the host.

    Raises:
        RunError: there are fewer visible GPUs than ranks.
    """
    visible = [one for one in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    if visible and local_rank >= len(visible):
        raise RunError(
            f"--gpu-per-rank: this host's rank {local_rank} has no GPU: CUDA_VISIBLE_DEVICES={','.join(visible)}"
        )
    return {
        "CUDA_VISIBLE_DEVICES": visible[local_rank] if visible else str(local_rank),
        "JAX_LOCAL_DEVICE_IDS": "0",
    }
