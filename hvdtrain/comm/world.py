"""Start and stop Horovod, and describe this process's place among the ranks."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hvdtrain.comm import srun
from hvdtrain.comm.horovod_places import place_ranks
from hvdtrain.comm.rendezvous import RendezvousServer
from hvdtrain.native import installed
from hvdtrain.system import cpus
from hvdtrain.system.errors import UserError
from hvdtrain.system.limits import RendezvousLimits
from hvdtrain.system.network import interface_address

# Environment variables in which launchers put the rank of a process.
RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
PMIX_SERVER = re.compile(r"tcp4://([\d.]+):(\d{1,9})")
HOROVOD_FUSION_BYTES = 128 << 20  # Horovod's default of HOROVOD_FUSION_THRESHOLD; `init` sets 0 unless it is set
# M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD of malloc.h, in bytes.
MALLOC_SETTINGS = ((-3, 2**31 - 1), (-1, 2**31 - 1), (-2, 2**28))
LOCAL_SIZE_VARIABLES = ("HOROVOD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")

communicators: list[Any] = [None]  # the mpi4py communicator of this world, if it is a part of an MPI job
connections: set[Any] = set()  # of the world, next to Horovod's: each has `close`, which its end calls
rendezvous_servers: dict[str, RendezvousServer | None] = {}  # keeps rank 0's server alive under srun


@dataclass(frozen=True)
class GridShape:
    """How ranks are divided into replicas of the model.

    Attributes:
        replica_ranks: ranks that hold the model once.
        same_batch: whether the ranks of a replica have the same part of the batch.
        built_together: whether a rank needs the others of its replica to build its part of the model.
        flags: the options that ask for it, for messages: "--stages 2".
    """

    replica_ranks: int = 1
    same_batch: bool = True
    built_together: bool = False
    flags: str = ""

    def divide_world(self, world: World) -> World:
        """Return a process's place in such a grid of the ranks of a world."""
        batch_ranks = self.replica_ranks if self.same_batch else 1
        return replace(world, replica_ranks=self.replica_ranks, batch_ranks=batch_ranks)


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size` ranks, `local_rank` of `local_size` on `host`.

    In a grid (hvdtrain.comm.grid), blocks of consecutive ranks are replicas, each of which holds the model once.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    replica_ranks: int = 1  # ranks of a replica
    batch_ranks: int = 1  # consecutive ranks that have the same part of the batch: a replica's, or one
    may_change: bool = False  # in an elastic run, in which ranks may be lost, and join

    @property
    def is_grid(self) -> bool:
        """Whether replicas have several ranks."""
        return self.replica_ranks > 1

    @property
    def replica(self) -> int:
        """The number of this rank's replica."""
        return self.rank // self.replica_ranks

    @property
    def place(self) -> int:
        """This rank's place in its replica."""
        return self.rank % self.replica_ranks

    @property
    def data_rank(self) -> int:
        """This rank's place among those that have different parts of the batch."""
        return self.rank // self.batch_ranks

    @property
    def data_size(self) -> int:
        """How many parts the batch has."""
        return self.size // self.batch_ranks

    @property
    def counts_examples(self) -> bool:
        """Whether this rank's scores count: of ranks with the same part of the batch, the last one's do."""
        return self.rank % self.batch_ranks == self.batch_ranks - 1


def rank_from_environment() -> int | None:
    """Return the rank that a launcher gave this process; None if it was started alone. Imports nothing heavy."""
    for name in RANK_VARIABLES:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return int(os.environ["SLURM_PROCID"]) if srun.count_tasks() > 1 else None


def local_size_from_environment() -> int:
    """Return how many ranks share this host, without Horovod; 1 if no launcher has set a variable for it."""
    for name in LOCAL_SIZE_VARIABLES:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return int(srun.task_environment(os.environ)["HOROVOD_LOCAL_SIZE"]) if srun.count_tasks() > 1 else 1


def init(comm: Any = None) -> World:
    """Initialize Horovod and return this process's place; without MPI also bind it to its share of the cores.

    A process that no launcher started is a world of one and needs no MPI. Tasks that srun started without a PMI library
    find each other by Slurm's variables.

    Args:
        comm: an mpi4py communicator, to train on a part of a larger MPI job; None for all ranks that were launched.

    Raises:
        UserError: Horovod is not built for the installed torch, HOROVOD_GLOO_IFACE does not exist, or Slurm started
            tasks that do not see each other.
        RunError: tasks of srun do not find each other.
    """
    installed.require_horovod()
    # Without fusion a bucket is reduced in place, and its values are always added in the same order, which would
    # depend on the other contents of a fusion buffer.
    os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
    keep_freed_memory()
    alone: dict[str, str] = {}
    if comm is None and srun.count_tasks() > 1 and not any(name in os.environ for name in RANK_VARIABLES):
        environment, rendezvous_servers["here"] = srun.join_rendezvous(os.environ)
        os.environ.update(environment)
    elif comm is None and rank_from_environment() is None:
        alone = {name: "gloo" for name in ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS") if name not in os.environ}
        os.environ.update(alone)
    check_gloo_interface()
    if comm is None and "HOROVOD_RANK" not in os.environ:
        reject_stale_pmix(os.environ)
    import horovod.torch as hvd

    restore_hangup_handler()
    if comm is not None or not hvd.is_initialized():
        hvd.init(comm)
        communicators[0] = comm
    for name in alone:
        os.environ.pop(name, None)  # processes that this one launches choose for themselves
    if rendezvous_servers.get("here") is not None:
        srun.remove_secret(os.environ)
    world = World(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), socket.gethostname())
    if not hvd.mpi_enabled():  # MPI has its own options for binding, and its ranks occupy a core while they wait
        cpus.bind_to_cores(world.local_rank, world.local_size)
    if comm is None and world.size == 1 and srun.count_tasks() > 1 and "HOROVOD_RANK" not in os.environ:
        raise UserError(f"srun started {srun.count_tasks()} tasks that do not see each other: use `srun --mpi=none`")
    return world


def keep_mpi() -> None:
    """Let MPI outlive Horovod's world, so that Horovod can enter another: mpi4py starts it, if it is to be used.

    Call it before `init`: an MPI that Horovod has started ends with its first world.
    """
    if "HOROVOD_RANK" not in os.environ and any(name in os.environ for name in RANK_VARIABLES):
        from mpi4py import MPI as MPI


def reject_stale_pmix(environ: Mapping[str, str]) -> None:
    """Raise UserError if the environment names a PMIx server, of mpirun or Slurm, that has ended.

    A shell, tmux or container that was started within an MPI job keeps the variables after the job, and MPI's own error
    ("I couldn't find that topic", code 14) does not mention them.
    """
    for name, value in sorted(environ.items()):
        if name.startswith("PMIX_SERVER_URI") and (match := PMIX_SERVER.search(value)):
            try:
                socket.create_connection((match[1], int(match[2])), timeout=RendezvousLimits.pmix_connect).close()
            except (ConnectionRefusedError, OverflowError):
                raise UserError(
                    f"{name} names the server of an MPI job that has ended ({match[0]}): start this with mpirun or "
                    "hvdtrain launch, or unset the variables whose names begin with PMIX_ and OMPI_"
                ) from None
            except OSError:
                return  # left to MPI
            return


def restore_hangup_handler() -> None:
    """Restore Python's handler of SIGHUP, which importing horovod.torch replaces without Python noticing."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGHUP) or signal.SIG_DFL)


def check_gloo_interface() -> None:
    """Raise UserError if this host has no interface with the name in HOROVOD_GLOO_IFACE."""
    name = os.environ.get("HOROVOD_GLOO_IFACE")
    there = [interface for _, interface in socket.if_nameindex()]
    if name and name not in there:
        raise UserError(
            f"{socket.gethostname()} has no network interface {name!r}, only {', '.join(there)}; Horovod needs one of "
            "the same name on every host (--nic), mpirun takes several (--launcher mpirun --nic eth0,eth1)"
        )


def enter_world(environment: Mapping[str, str]) -> World:
    """Start Horovod again, in another world than the one that was left.

    Args:
        environment: the HOROVOD_ variables of this process's place there.

    Raises:
        PeersLost: another rank of it does not come.
    """
    import horovod.torch as hvd

    from hvdtrain.comm.collectives import PeersLost

    os.environ.update(environment)
    try:
        hvd.init()
    except ValueError as error:
        raise PeersLost(str(error)) from error
    return World(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), socket.gethostname())


def restart_horovod(fusion_bytes: int) -> None:
    """Start Horovod again on all its ranks, with another size of its fusion buffer."""
    previous = rendezvous_servers.get("restart")
    environment = {"HOROVOD_FUSION_THRESHOLD": str(fusion_bytes), **serve_next_meeting()}
    shut_down_horovod()
    if previous is not None:
        previous.stop_serving()
    enter_world(environment)


def serve_next_meeting() -> dict[str, str]:
    """Serve, on rank 0, where all ranks are to meet again, and return the variables that name it; {} without Gloo.

    At the launcher's server a rank can still find the address that another one had before.
    """
    import horovod.torch as hvd

    from hvdtrain.comm.collectives import broadcast_json

    if hvd.size() == 1 or hvd.mpi_enabled():
        return {}
    where = None
    if hvd.rank() == 0:
        server = RendezvousServer(interface_address(os.environ.get("HOROVOD_GLOO_IFACE", "lo")), {})
        rendezvous_servers["restart"], where = server, server.server_address
    address, port = broadcast_json(where, "restart.server")
    return {"HOROVOD_GLOO_RENDEZVOUS_ADDR": address, "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port)}


def leave_for_own_world(world: World) -> World:
    """Let each rank continue in a world in which it is alone; return its place there. All ranks call it.

    The next `init` meets all of them again.
    """
    import horovod.torch as hvd

    if hvd.mpi_enabled():
        from mpi4py import MPI

        shut_down_horovod()
        alone = init(MPI.COMM_SELF)
    else:
        previous, meeting = rendezvous_servers.get("restart"), serve_next_meeting()
        own = place_ranks([world.host])[0].to_environment()
        before = {name: os.environ.pop(name) for name in list(os.environ) if name in own or "RENDEZVOUS" in name}
        shut_down_horovod()
        if previous is not None:
            previous.stop_serving()
        alone = enter_world(own)
        os.environ.update(before | meeting)  # also for messages, and for processes that this one launches
    return replace(alone, local_rank=world.local_rank, local_size=world.local_size)


def keep_freed_memory() -> None:
    """Make glibc keep up to 2 GiB of freed memory, unless MALLOC_ or GLIBC_TUNABLES variables are set.

    Otherwise it returns large tensors to the system and requests them again in each step: thousands of page faults,
    which take several times as long as the work on the tensors (tests/benchmarks/exchange.py, +glibc).
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library may have none
    if mallopt is not None:
        for parameter, value in MALLOC_SETTINGS:
            mallopt(parameter, value)


def close_connections() -> None:
    """Close what was connected next to Horovod for its world."""
    for connection in list(connections):
        connection.close()


def shut_down_horovod() -> None:
    """Shut Horovod down in this process; collectives of the other ranks then fail, unless they do the same."""
    import horovod.torch as hvd
    from horovod.torch import mpi_ops

    from hvdtrain.comm.collectives import forget_names

    close_connections()
    hvd.shutdown()
    forget_names()
    mpi_ops._handle_map.clear()  # tensors of collectives that will not complete
