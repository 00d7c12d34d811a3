"""One rank of the benchmark of models on several ranks: one way.

    python -m tests.benchmarks.hybrid_rank WAY [--steps 6] [--images 4]

Started by horovodrun, two ranks on each of two hosts; rank 0 prints RESULT and, as JSON, the seconds of the steps, and
the bytes of parameters and optimizer state that it holds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hvdtrain
from hvdtrain.comm import collectives
from hvdtrain.comm.grid import enter_grid
from hvdtrain.comm.world import GridShape, World
from hvdtrain.exchange.local_tensors import local_tensor
from hvdtrain.torch import DistributedOptimizer
from hvdtrain.torch.local_parts import LocalParts
from hvdtrain.torch.piece_owner import use_pieces
from tests.benchmarks.sharding_rank import SIDE, WARM_UP, make_model, make_optimizer


def shard(net: Any, mesh: Any) -> None:
    """Shard a model by layer groups, whose gradients are summed."""
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4, net):
        fully_shard(layer, mesh=mesh)
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)


def make_hybrid_step(net: nn.Module, compression: str) -> tuple[Any, Callable[[], None]]:
    """Return an optimizer, and what hvdtrain does after the backward pass, with the check whether all is finite."""
    shard(net, init_device_mesh("cpu", (2,)))
    optimizer: Any = make_optimizer(net)
    parts = LocalParts(optimizer, {p: name for name, p in net.named_parameters()}, "")
    named = net.named_parameters()
    wrapped = DistributedOptimizer(optimizer, named, process_set=collectives.COLUMN, compression=compression)  # type: ignore[arg-type]

    def step() -> None:
        optimizer.synchronize()
        parts.take_gradients()
        parts.total_norm()
        with use_pieces(parts):
            wrapped.step()  # type: ignore[no-untyped-call]

    return optimizer, step


def join_torch(world: World) -> None:
    """Let all ranks be torch's default process group."""
    if interface := os.environ.get("HOROVOD_GLOO_IFACE"):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    store = dist.TCPStore(os.environ["BENCH_MASTER"], int(os.environ["BENCH_PORT"]), world.size, world.rank == 0)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--images", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = hvdtrain.init()
    way, _, compression = options.way.partition("-")
    net, seconds = make_model(), list[float]()
    torch.manual_seed(world.rank)
    images, labels = torch.randn(options.images, 3, SIDE, SIDE), torch.randint(0, 10, (options.images,))
    with contextlib.ExitStack() as exits:
        if way == "hybrid":
            exits.enter_context(enter_grid(world, GridShape(2, same_batch=False, flags="--shard model"), "cpu"))
            optimizer, step = make_hybrid_step(net, compression or "none")
        else:
            join_torch(world)
            shape, names = ((2, 2), ("hosts", "ranks")) if way == "hsdp" else ((4,), ("ranks",))
            shard(net, init_device_mesh("cpu", shape, mesh_dim_names=names))
            optimizer = make_optimizer(net)
            step = optimizer.step
        for _ in range(WARM_UP + options.steps):
            collectives.barrier("step")
            begin = time.perf_counter()
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            step()
            seconds.append(time.perf_counter() - begin)
        tensors = [value for state in optimizer.state.values() for value in state.values()]
        held = sum(local_tensor(value).nbytes for value in [*net.parameters(), *tensors] if torch.is_tensor(value))
        if world.rank == 0:
            print("RESULT", json.dumps({"seconds": seconds[WARM_UP:], "held_bytes": held}), flush=True)
        collectives.barrier("end")
        os._exit(0)


if __name__ == "__main__":
    main()
