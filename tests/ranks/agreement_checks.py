"""Run on ranks by test_agreement.py: 200 steps of training after which all ranks hold the same bits."""

from __future__ import annotations

import hashlib
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import hvdtrain
from hvdtrain.collectives import ops
from hvdtrain.collectives.world import World
from hvdtrain.torch import DistributedOptimizer

warnings.simplefilter("error")
STEPS = 200
BUCKET_BYTES = 1000  # several buckets, so that their order matters


class Branches(nn.Module):
    """Branches in many types, which odd ranks go through the other way round; some are used by few, or by none.

    So buckets are full in another order on every second rank.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rank, self.size = rank, size
        types = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        self.branches = nn.ModuleList(nn.Linear(8, 12, dtype=dtype) for dtype in types)
        self.branches.append(nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 12)))
        self.sometimes = nn.Linear(8, 12, dtype=torch.bfloat16)
        self.never = nn.Linear(8, 12)
        self.scale = nn.Parameter(torch.ones(()))
        self.out = nn.Linear(12, 3)

    def forward(self, inputs: Tensor, step: int) -> Tensor:
        used = list(self.branches)
        # Each rank leaves out a branch of its own now and then, and all together none.
        if step % 3 == 0:
            used.pop(self.rank % len(used))
        if step % (self.size + 1) == self.rank:  # by one rank, and every so many steps by none
            used.append(self.sometimes)
        if self.rank % 2:
            used.reverse()
        total = torch.zeros(())
        for branch in used:
            total = total + branch(inputs.to(next(branch.parameters()).dtype)).float()
        out: Tensor = self.out(total * self.scale)
        return out


def loss_of(model: Branches, step: int) -> Tensor:
    inputs = torch.randn(6, 8, generator=torch.Generator().manual_seed(1000 * model.rank + step))
    loss: Tensor = (model(inputs, step) - inputs[:, :3]).square().sum(1).mean()
    return loss


def digest(model: nn.Module) -> str:
    """Of all parameters' bits."""
    seen = hashlib.sha256()
    for p in model.parameters():
        seen.update(p.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def check(text: str, world: World) -> None:
    """Train with one method; odd ranks also wait for their buckets in the opposite order, in every second step."""
    model = Branches(world.rank, world.size)
    plain = torch.optim.SGD(model.parameters(), lr=0.002)
    # All matrices, however small, and the scalar.
    argument = text.partition(",")[0].partition(":")[2]
    compression = text if text == "none" else f"{text},min=1,layer.scale={argument}"
    optimizer: Any = DistributedOptimizer(
        plain, model.named_parameters(), compression=compression, bucket_bytes=BUCKET_BYTES
    )
    first = loss_of(model, 0).item()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if world.rank % 2:
            optimizer.exchange.buckets.reverse()
        optimizer.step()
        if step % 50 == 0 or step == STEPS - 1:
            everyone = ops.gather_json(digest(model), "agreement.digest")
            assert len(set(everyone)) == 1, f"{text}: other bits on other ranks after step {step}"
    assert model.never.weight.grad is None
    assert all(p.isfinite().all() for p in model.parameters()), text
    assert loss_of(model, 0).item() < first, text
    compressed = optimizer.exchange.compressed
    coded = {name for bucket in compressed for name in bucket.names}
    expected = {name for name, p in model.named_parameters() if p.dim() > 1} | {"scale"}
    assert coded == (set() if text == "none" else expected), (text, coded ^ expected)
    assert text == "none" or len(compressed) > 1
    assert len(optimizer.exchange.buckets) >= 4


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = hvdtrain.init()
    for spec in sys.argv[1:]:
        check(spec, here)
        print(f"ok {spec}", flush=True)
    sys.exit(0)
