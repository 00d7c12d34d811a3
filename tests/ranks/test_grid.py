"""Ranks as a grid: replicas by torch.distributed, columns by Horovod, all ranks by a torch group."""

import horovod.torch as hvd
import numpy as np
import pytest
import torch
import torch.distributed as dist

from hvdtrain.comm import collectives
from hvdtrain.comm.grid import enter_grid
from hvdtrain.comm.world import GridShape, World
from hvdtrain.system.errors import UserError
from tests.support.worlds import on_ranks


def make_world() -> World:
    """This rank's place."""
    return World(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), "localhost")


def check_grid(shape: GridShape) -> None:
    """Exchange something in a replica, a column, and between all ranks."""
    before = make_world()
    with enter_grid(before, shape, device="cpu") as world:
        n, rank = shape.replica_ranks, world.rank
        assert (world.replica, world.place) == divmod(rank, n)
        assert (dist.get_rank(), dist.get_world_size()) == (world.place, n)
        in_replica, in_column = torch.tensor([float(rank)]), torch.tensor([float(rank)])
        dist.all_reduce(in_replica)
        assert in_replica.item() == sum(range(world.replica * n, world.replica * n + n))
        collectives.wait(collectives.all_reduce_async_(in_column, "column", group=collectives.COLUMN))
        assert in_column.item() == sum(range(world.place, world.size, n))
        assert (hvd.rank(), hvd.size()) == (world.replica, world.size // n)
        assert (collectives.rank(), collectives.size()) == (rank, world.size)
        assert collectives.gather_json({"rank": rank}, "all") == [{"rank": r} for r in range(world.size)]
        assert collectives.on_root("root", lambda: rank + 7, root=1) == 8
        assert collectives.broadcast_bytes(bytes([rank]) * 3, "bytes", 2) == bytes([2]) * 3
        assert collectives.gather_rows(np.full((rank, 2), rank), "rows").shape == (sum(range(world.size)), 2)
        flags = torch.tensor([rank == 1], dtype=torch.bool)
        collectives.broadcast_(flags, "flags", 1)
        assert flags.item()
        with pytest.raises(UserError, match=r"rank 3 on .*: broken"):
            collectives.on_all_ranks("fails", lambda: fail_on(3))
    assert (hvd.rank(), hvd.size()) == (before.rank, before.size) == (collectives.rank(), collectives.size())
    total = collectives.wait(collectives.all_reduce_async_(torch.ones(1), "again"))
    assert total.item() == before.size
    assert not dist.is_initialized()


def fail_on(rank: int) -> None:
    """Raise on one rank."""
    if collectives.rank() == rank:
        raise UserError("broken")


@on_ranks(4)
def test_a_grid_has_replicas_and_columns_and_is_left_for_the_world_before():
    check_grid(GridShape(2, flags="--stages 2"))
    check_grid(GridShape(4, flags="--tensor 4"))
    with enter_grid(make_world(), GridShape(2, same_batch=False), device="cpu") as world:
        assert (world.data_rank, world.data_size, world.counts_examples) == (world.rank, 4, True)
    with enter_grid(make_world(), GridShape(2), device="cpu") as world:
        assert (world.data_rank, world.data_size, world.counts_examples) == (world.replica, 2, world.place == 1)


@on_ranks(4)
def test_an_error_of_all_ranks_leaves_the_grid_too():
    with pytest.raises(UserError, match="all alike"), enter_grid(make_world(), GridShape(2), device="cpu"):
        raise UserError("all alike")
    assert hvd.size() == 4


@on_ranks(3)
def test_ranks_that_are_no_whole_replicas_are_refused():
    with (
        pytest.raises(UserError, match="--stages 2: 3 ranks are no whole replicas of 2"),
        enter_grid(make_world(), GridShape(2, flags="--stages 2"), device="cpu"),
    ):
        raise AssertionError("entered")
