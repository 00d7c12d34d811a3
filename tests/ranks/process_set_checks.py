"""Run on 3 ranks by test_process_sets.py: ranks 0 and 2 train one model together, rank 1 another one alone."""

from __future__ import annotations

import sys
import warnings

import horovod.torch as hvd
import torch
from torch import nn

import hvdtrain
from hvdtrain.collectives import ops
from hvdtrain.torch import DistributedOptimizer, broadcast_state

warnings.simplefilter("error")
pair, single = hvd.ProcessSet([0, 2]), hvd.ProcessSet([1])
hvd.init(process_sets=[pair, single])
WORLD = hvdtrain.init()
MINE = single if WORLD.rank == 1 else pair
MEMBERS = [1] if WORLD.rank == 1 else [0, 2]


def shares(step: int, rank: int) -> torch.Tensor:
    return torch.randn(30, 30, generator=torch.Generator().manual_seed(100 * step + rank))


def applied(compression: str) -> torch.Tensor:
    """What 20 steps of SGD have subtracted from a weight, whose gradients are the ranks' shares."""
    torch.manual_seed(WORLD.rank)
    layer = nn.Linear(30, 30, bias=False)
    broadcast_state(layer, root=MEMBERS[-1], process_set=MINE)
    torch.manual_seed(MEMBERS[-1])
    assert torch.equal(layer.weight, nn.Linear(30, 30, bias=False).weight)
    before = layer.weight.detach().clone()
    sgd = torch.optim.SGD(layer.parameters(), lr=1.0)
    optimizer = DistributedOptimizer(sgd, layer.named_parameters(), compression=compression, process_set=MINE)
    for step in range(20):
        optimizer.zero_grad()
        (layer.weight * shares(step, WORLD.rank)).sum().backward()
        optimizer.step()
    return before - layer.weight.detach()


exact = sum(shares(step, rank).double() for step in range(20) for rank in MEMBERS) / len(MEMBERS)
for compression, tolerance in (("none", 1e-5), ("fp16,min=1", 2e-2), ("int8,min=1", 0.1), ("topk:1,min=1", 1e-5)):
    torch.testing.assert_close(applied(f"{compression},warmup=0").double(), exact, rtol=0, atol=tolerance)
for compression in ("powersgd:30,min=1", "randomk:1,min=1"):  # of full rank, all values: nothing is left behind
    torch.testing.assert_close(applied(f"{compression},warmup=0").double(), exact, rtol=0, atol=1e-3)
ops.barrier("end")  # Horovod ends all ranks when one has left
print("ok", flush=True)
sys.exit(0)
