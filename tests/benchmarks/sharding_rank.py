"""One rank of the benchmark of sharded optimizers: each way in turns, in one process.

    python -m tests.benchmarks.sharding_rank WAYS [--turns 3] [--steps 8] [--images 16]

ResNet-18 with group norm, AdamW, 64x64 images. Started by horovodrun; rank 0 prints RESULT and, as JSON, for each way
the seconds of the steps of each turn, and the bytes of optimizer state that it holds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models import resnet18

import hvdtrain
from hvdtrain.comm import collectives
from hvdtrain.exchange.partition import Partition
from hvdtrain.torch import DistributedOptimizer
from hvdtrain.torch.shard_update import await_updates, conclude_updates, step_pieces
from hvdtrain.torch.shards import OptimizerShards, list_named

SIDE, WARM_UP = 64, 3


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return resnet18(num_classes=10, norm_layer=lambda channels: nn.GroupNorm(8, channels))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


class Way:
    """A model and what makes a step of it; `state` is what this rank holds."""

    def __init__(self, name: str) -> None:
        self.net: Any = make_model()
        self.optimizer: Any = None
        self.close: Callable[[], object] = lambda: None
        if name in ("plain", "shard"):
            optimizer: Any = DistributedOptimizer(make_optimizer(self.net), self.net.named_parameters())
            self.optimizer, self.step = optimizer, optimizer.step
            self.close = optimizer.exchange.close
            if name == "shard":
                names = [name for name, _ in list_named(optimizer)]
                partition = Partition(collectives.size(), "elements")
                shards = OptimizerShards(optimizer, partition, optimizer.exchange, "", names)
                self.step = lambda: step_sharded(optimizer, shards)
        elif name.startswith("ddp"):
            self.net = nn.parallel.DistributedDataParallel(self.net, gradient_as_bucket_view=True)
            self.optimizer = make_optimizer(self.net)
            if name == "ddp-zero":
                from torch.distributed.optim import ZeroRedundancyOptimizer

                kind = torch.optim.AdamW
                self.optimizer = ZeroRedundancyOptimizer(self.net.parameters(), kind, lr=1e-3)
            self.step = self.optimizer.step
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in (self.net.layer1, self.net.layer2, self.net.layer3, self.net.layer4, self.net):
                fully_shard(layer, mesh=mesh)
            self.optimizer = make_optimizer(self.net)
            self.step = self.optimizer.step

    def count_state_bytes(self) -> int:
        inner = getattr(self.optimizer, "optim", self.optimizer)
        found = [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
        return sum(getattr(value, "_local_tensor", value).nbytes for value in found)


def step_sharded(optimizer: Any, shards: OptimizerShards) -> None:
    """What a step of hvdtrain does with a sharded optimizer, with the check whether all is finite."""
    optimizer.synchronize()
    shards.take_gradients()
    shards.total_norm()
    with step_pieces(shards):
        optimizer.step()
    conclude_updates([shards], await_updates([shards]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--images", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = hvdtrain.init()
    if interface := os.environ.get("HOROVOD_GLOO_IFACE"):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    store = dist.TCPStore(os.environ["BENCH_MASTER"], int(os.environ["BENCH_PORT"]), world.size, world.rank == 0)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    torch.manual_seed(world.rank)
    images, labels = torch.randn(options.images, 3, SIDE, SIDE), torch.randint(0, 10, (options.images,))
    ways = options.ways.split(",")
    seconds: dict[str, list[list[float]]] = {way: [] for way in ways}
    state_bytes: dict[str, int] = {}
    for turn in range(options.turns):
        for name in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            way, found = Way(name), []
            for _ in range(WARM_UP + options.steps):
                collectives.barrier("step")
                begin = time.perf_counter()
                way.optimizer.zero_grad()
                nn.functional.cross_entropy(way.net(images), labels).backward()
                way.step()
                found.append(time.perf_counter() - begin)
            seconds[name].append(found[WARM_UP:])
            state_bytes[name] = way.count_state_bytes()
            way.close()
            del way
            gc.collect()
    if world.rank == 0:
        print("RESULT", json.dumps({"seconds": seconds, "state_bytes": state_bytes}), flush=True)
    collectives.barrier("end")
    os._exit(0)


if __name__ == "__main__":
    main()
