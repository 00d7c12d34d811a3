"""Several models at once, each on a process set of its own: ranks 0 and 2 train one together, rank 1 another alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvdtrain.comm import collectives
from hvdtrain.torch import DistributedOptimizer, broadcast_state
from tests.support.worlds import KeptWorld

SETS = [[0, 2], [1]]
# Those of full rank, or with all values, leave nothing behind.
TOLERANCES = {"none": 1e-5, "fp16": 2e-2, "int8": 0.1, "topk:1": 1e-5, "powersgd:30": 1e-3, "randomk:1": 1e-3}


@pytest.fixture(scope="module")
def world() -> Iterator[KeptWorld]:
    with KeptWorld(3, {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"}) as started:
        yield started


@functools.cache
def sets() -> list[hvd.ProcessSet]:
    """The process sets of this world, added by all ranks at their first call."""
    return [hvd.add_process_set(ranks) for ranks in SETS]


@pytest.mark.parametrize("method", TOLERANCES)
def test_two_sets_of_ranks_train_apart(method: str, world: KeptWorld) -> None:
    world.run(train_apart, method)


def train_apart(method: str) -> None:
    own, members = next(found for found in zip(sets(), SETS, strict=True) if hvd.rank() in found[1])
    exact = sum(shares(step, rank).double() for step in range(20) for rank in members) / len(members)
    compression = method if method == "none" else f"{method},min=1,warmup=0"
    found = applied(compression, own, members).double()
    torch.testing.assert_close(found, exact, rtol=0, atol=TOLERANCES[method])


def shares(step: int, rank: int) -> torch.Tensor:
    return torch.randn(30, 30, generator=torch.Generator().manual_seed(100 * step + rank))


def applied(compression: str, own: hvd.ProcessSet, members: list[int]) -> torch.Tensor:
    """What 20 steps of SGD have subtracted from a weight, whose gradients are the ranks' shares."""
    torch.manual_seed(hvd.rank())
    layer = nn.Linear(30, 30, bias=False)
    broadcast_state(layer, root=members[-1], process_set=own)
    torch.manual_seed(members[-1])
    assert torch.equal(layer.weight, nn.Linear(30, 30, bias=False).weight)
    before = layer.weight.detach().clone()
    sgd = torch.optim.SGD(layer.parameters(), lr=1.0)
    optimizer = DistributedOptimizer(sgd, layer.named_parameters(), compression=compression, process_set=own)
    for step in range(20):
        optimizer.zero_grad()
        (layer.weight * shares(step, hvd.rank())).sum().backward()
        optimizer.step()
    collectives.barrier("end")
    return before - layer.weight.detach()


def test_operations_without_names_are_paired_by_their_order_in_each_set(world: KeptWorld) -> None:
    world.run(reduce_without_names)


def reduce_without_names() -> None:
    own, members = next(found for found in zip(sets(), SETS, strict=True) if hvd.rank() in found[1])
    one = torch.ones(3)
    for _ in range(len(members)):  # more often in one set than in the other
        assert hvd.allreduce(one, op=hvd.Sum, process_set=own).tolist() == [len(members)] * 3
    assert hvd.allreduce(one, op=hvd.Sum).tolist() == [3.0] * 3
    assert hvd.allgather(one[:1]).tolist() == [1.0] * 3
