"""Run on ranks: the bytes that every method sends in a step, as counted, and on request as the kernel saw them.

    python -m tests.ranks.wire_rank MODEL SPEC ... [--steps 4] [--interface eth0]

MODEL: small (2 million values) or resnet18 (11 million). SPEC: int8, or int8@host for the sum of each host encoded
once, or int8@host8 with buckets of 8 MiB. Rank 0 prints WIRE and, as JSON, a list over ranks of
{SPEC: [what `Traffic` holds]}.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hvdtrain
from hvdtrain.comm import collectives
from hvdtrain.comm.host_groups import HostGroups, connect_hosts
from hvdtrain.compression.hierarchical_reducer import RoundOrder
from hvdtrain.torch import DistributedOptimizer

WARM_UP = 3  # steps: the first makes the buckets, and names that are new are negotiated at length


@dataclass
class Traffic:
    """What one rank sent, and its interface carried, in some steps."""

    counted: int  # bytes that hvdtrain says it sent, and received as many
    sent: int  # bytes that the interface sent; 0 where none was named
    received: int
    seconds: float  # of all steps
    exchange_seconds: float  # from the first gradient on, until all sums are there


def small() -> nn.Module:
    """2,050,500 values; sides that are no powers of two."""
    return nn.Sequential(nn.Linear(1000, 1500), nn.Linear(1500, 365))


def layers() -> nn.Module:
    """2,096,704 values in 16 layers, one like the other."""
    return nn.Sequential(*[nn.Linear(362, 362, bias=False) for _ in range(16)])


def resnet18() -> nn.Module:
    """11,181,642 values."""
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=10)
    return model


def traffic(make: Callable[[], nn.Module], compression: str, steps: int, interface: str | None = None) -> Traffic:
    """Exchange made-up gradients of a new model for so many steps; all ranks call it."""
    torch.manual_seed(0)
    model = make()
    method, at_host, mib = compression.partition("@host")
    optimizer: Any = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-4),
        model.named_parameters(),
        compression=f"{method},warmup=0",
        bucket_bytes=int(float(mib) * 2**20) if mib else None,
        round_order=RoundOrder(connect_own_host()) if at_host else None,
    )
    parameters = list(model.parameters())
    made = torch.Generator().manual_seed(collectives.rank())
    gradients = [torch.randn(p.shape, generator=made) for p in parameters]

    exchanging = 0.0

    def step() -> int:
        nonlocal exchanging
        optimizer.zero_grad()
        own = [g.clone() for g in gradients]
        begin = time.perf_counter()
        torch.autograd.backward(parameters, own)
        optimizer.synchronize()
        exchanging += time.perf_counter() - begin
        optimizer.step()
        return int(optimizer.wire_bytes)

    for _ in range(WARM_UP):
        step()
    # Nobody begins before all have read, nor reads before all have received.
    collectives.barrier("wire.quiet")
    before = carried(interface)
    collectives.barrier("wire.begin")
    exchanging = 0.0
    begin = time.perf_counter()
    counted = sum(step() for _ in range(steps))
    collectives.barrier("wire.end")
    seconds = time.perf_counter() - begin
    after = carried(interface)
    return Traffic(counted, after[0] - before[0], after[1] - before[1], seconds, exchanging)


@functools.cache
def connect_own_host() -> HostGroups:
    """This rank's host, and its column, of ranks on real hosts."""
    found = connect_hosts(hvdtrain.init(), "wire", torch.device("cpu"))
    assert isinstance(found, HostGroups), found
    return found


def carried(interface: str | None) -> tuple[int, int]:
    """Bytes that an interface of this host has sent and received so far, by the kernel's own count."""
    if interface is None:
        return 0, 0
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, colon, numbers = line.partition(":")
        if colon and name.strip() == interface:
            columns = numbers.split()
            return int(columns[8]), int(columns[0])
    raise SystemExit(f"there is no interface {interface}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["small", "resnet18"])
    parser.add_argument("specs", nargs="+", metavar="SPEC")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--interface")
    options = parser.parse_args()
    world = hvdtrain.init()
    torch.set_num_threads(1)
    make = {"small": small, "resnet18": resnet18}[options.model]
    here = {spec: asdict(traffic(make, spec, options.steps, options.interface)) for spec in options.specs}
    seen = collectives.gather_json(here, "wire.seen")
    if world.rank == 0:
        print("WIRE", json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
