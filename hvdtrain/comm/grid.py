"""Ranks as a grid: blocks of consecutive ranks are replicas of the model, ranks at the same place are a column.

    rank        0       1   |   2       3          a replica holds the model once: its ranks exchange activations, or
    replica     0       0   |   1       1          parts of layers, over torch.distributed's default process group
    place       0       1   |   0       1
                |       +-------|-------+          Horovod's world is a column: gradients take the way that they
                +---------------+                  always take, whatever it is

All ranks are one `TorchGroup`, which carries what has no group: votes, sums of scores, what ranks agree on. Horovod's
process sets would do for columns as well, but one more set costs each cycle of Horovod a round, and none survives a
lost rank.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import horovod.torch as hvd
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from hvdtrain.comm import collectives
from hvdtrain.comm.horovod_places import place_ranks
from hvdtrain.comm.mailbox import choose_address
from hvdtrain.comm.rendezvous import RendezvousServer
from hvdtrain.comm.signed_store import SignedStore, open_store
from hvdtrain.comm.torch_group import NEVER, TorchGroup, reporting_lost_peers
from hvdtrain.comm.torch_ranks import connect_ranks
from hvdtrain.comm.world import (
    GridShape,
    World,
    close_connections,
    communicators,
    enter_world,
    rendezvous_servers,
    shut_down_horovod,
)
from hvdtrain.system.errors import RunError, UserError


@contextlib.contextmanager
def enter_grid(world: World, shape: GridShape, device: str | None) -> Iterator[World]:
    """Let all ranks be a grid within a block, and yield this process's place in it.

    Args:
        world: that Horovod has entered, and enters again after the block, unless this rank alone fails there.
        shape: of the grid, in which a replica has several ranks.
        device: of --device; None: a GPU if there is one.

    Raises:
        UserError: the ranks cannot be divided like that, or MPI would end with Horovod's world.
    """
    if world.size % shape.replica_ranks:
        raise UserError(f"{shape.flags}: {world.size} ranks are no whole replicas of {shape.replica_ranks} ranks each")
    world = shape.divide_world(world)
    store = open_store()
    hosts = collectives.gather_json(world.host, "grid.hosts")
    servers = restart_in_columns(world, hosts)
    connect_grid(world, store, device)
    try:
        yield world
    except Exception as error:
        if isinstance(error, (UserError, RunError)) or getattr(error, "origin", None) is not None:  # of all ranks
            leave_grid(replace(world, replica_ranks=1), hosts, servers)
        raise
    else:
        leave_grid(replace(world, replica_ranks=1), hosts, servers)
    finally:
        disconnect_grid()
        store.close()


def connect_grid(world: World, store: SignedStore, device: str | None) -> None:
    """Connect all ranks, and the ranks of each replica as torch's default process group.

    Args:
        world: this process's place in the grid; Horovod has entered the column.
        store: of this world.
        device: as for `enter_grid`.

    Raises:
        PeersLost: another rank does not come.
    """
    collectives.set_everyone(connect_ranks(store, "everyone", range(world.size), world, torch.device("cpu")))
    show_traceback = sys.excepthook
    with reporting_lost_peers(True):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device != "cpu" and torch.cuda.is_available() else "gloo",
            store=PrefixStore(f"replica.{world.replica}", store),
            rank=world.place,
            world_size=world.replica_ranks,
            timeout=NEVER,
        )
    sys.excepthook = show_traceback  # torch's own would name the place in the replica as the rank


def disconnect_grid() -> None:
    """Close all connections of `connect_grid`, if there are any; ranks that wait in one learn of it."""
    close_connections()
    collectives.set_everyone(None)
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # what an error's traceback refers to keeps a connection open


def check_same_shape(shape: GridShape) -> None:
    """Raise UserError, on all ranks, unless all ranks, whose hosts may differ, have the same shape of the grid."""
    sizes = set(collectives.gather_json(shape.replica_ranks, "grid.shape"))
    if len(sizes) > 1:
        raise UserError(f"{shape.flags}: hosts have {min(sizes)} to {max(sizes)} ranks each: give --shard-ranks")


def find_replica_group() -> collectives.Group:
    """Return the ranks of this one's replica, for tensors in host memory; in a grid only."""
    return TorchGroup.of_default_group(torch.device("cpu"))


def find_gradient_group(world: World) -> collectives.Group:
    """Return the ranks that hold the same parameters."""
    return collectives.COLUMN if world.is_grid else None


def find_batch_group(world: World) -> collectives.Group:
    """Return those of them, or more, that together have the whole batch, each example once."""
    return collectives.COLUMN if world.batch_ranks > 1 else None


def leave_grid(world: World, hosts: Sequence[str], servers: Sequence[RendezvousServer]) -> None:
    """Let Horovod enter the whole world again, on all ranks."""
    previous = rendezvous_servers.get("restart")
    for server in restart_in_columns(world, hosts):
        rendezvous_servers["restart"] = server  # for process sets that are made later
        for old in (*servers, *filter(None, [previous])):
            old.stop_serving()


def restart_in_columns(world: World, hosts: Sequence[str]) -> list[RendezvousServer]:
    """Start Horovod again in this rank's column: the ranks at the same place of their replicas.

    With Gloo each column meets at a server of rank 0's.

    Args:
        world: this rank's place; if it is no grid, all ranks are one column.
        hosts: of all ranks.

    Returns:
        the servers that this rank serves.
    """
    servers = list[RendezvousServer]()
    if hvd.mpi_enabled():
        from mpi4py import MPI

        shut_down_horovod()
        if MPI.Is_finalized():
            raise RunError("MPI has ended with Horovod's world")  # `keep_mpi` was not called
        whole = communicators[0]
        hvd.init((whole or MPI.COMM_WORLD).Split(world.place, world.rank) if world.is_grid else whole)
        return servers
    if world.rank == 0:
        servers = [RendezvousServer(choose_address(hvd), {}) for _ in range(world.replica_ranks)]
    where = collectives.broadcast_json([server.server_address[:2] for server in servers], "grid.servers")
    address, port = where[world.place]
    column = range(world.place, world.size, world.replica_ranks)
    own = place_ranks([hosts[rank] for rank in column])[column.index(world.rank)].to_environment()
    before = {name: os.environ.get(name) for name in own}
    shut_down_horovod()
    enter_world({**own, "HOROVOD_GLOO_RENDEZVOUS_ADDR": address, "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port)})
    for name, value in before.items():  # this process's rank, for messages and those that it launches
        if value is not None:
            os.environ[name] = value
    return servers
