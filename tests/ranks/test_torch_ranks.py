"""Groups of torch.distributed between some ranks, next to Horovod's world."""

import os

import horovod.torch as hvd
import torch

from hvdtrain.comm.signed_store import open_store
from hvdtrain.comm.torch_ranks import connect_ranks
from hvdtrain.comm.world import World
from hvdtrain.system.signed_http import SignedClient
from tests.support.worlds import on_ranks

CPU = torch.device("cpu")


def make_world() -> World:
    """This rank's place."""
    return World(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), "localhost")


@on_ranks(3)
def test_groups_of_some_ranks_connect_beside_horovod():
    world, store = make_world(), open_store()
    everyone = connect_ranks(store, "all", range(world.size), world, CPU)
    pair = connect_ranks(store, "pair", [2, 0], world, CPU)
    assert (pair is None) == (world.rank == 1)
    assert everyone.gather_texts("é" * world.rank) == ["", "é", "éé"]
    ones = everyone.second.start_all_reduce(torch.ones(2), average=False).wait()
    assert ones.tolist() == [world.size] * 2
    assert everyone.start_broadcast(torch.tensor([world.rank]), 1).wait().tolist() == [1]
    if pair is not None:
        assert pair.gather_texts(str(world.rank)) == ["2", "0"]
        parts = pair.gather_uneven(torch.full((pair.rank(), 2), 5.0))
        assert [part.shape for part in parts] == [(0, 2), (1, 2)]
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum, name="still").item() == world.size
    store.close()


@on_ranks(2)
def test_the_store_answers_nobody_without_the_secret():
    store = open_store()
    if hvd.rank() == 0:
        store.set("key", b"value")
        assert store.get("key") == b"value"
        stranger = SignedClient(b"x" * 64)
        try:
            stranger.request(*store._target, "GET", "/torch/key")
        except OSError as error:
            assert "signature" in str(error)
        else:
            raise AssertionError("a stranger was answered")
        assert store._target[0] == "127.0.0.1"
    hvd.allreduce(torch.ones(1), name="served")
    assert os.environ["GLOO_SOCKET_IFNAME"]
    store.close()
