"""One rank of a step-time benchmark: ResNet-18, 16 images of 64x64 per rank.

    python -m tests.benchmarks.step_rank WAY [--steps N] [--images 16] [--channels-last] [--cores own|any]

WAY: none (no communication), horovod (stock DistributedOptimizer), ddp, ddp-fp16, ddp-hook:SPEC (hvdtrain's hook in
DDP), bucketed (hvdtrain's), or bucketed:SPEC with a compression. Started by horovodrun, also for DDP, which takes its
rank from Horovod's variables. Rank 0 prints RESULT and, as JSON, the seconds of each step and the bytes that it sent in
the last one, where known.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torchvision.models import resnet18

from hvdtrain.system import cpus
from hvdtrain.torch import ddp_hook

SIDE = 64


def wrapped(way: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any, Any]:
    """The model and the optimizer as a way of exchange wants them, and what knows the bytes sent, if anything does."""
    if way == "none":
        return model, optimizer, None
    compression = f"{way.partition(':')[2] or 'none'},warmup=0"
    if way.startswith("ddp-hook"):
        parallel, hook = in_ddp(model, fp16=False), ddp_hook(compression)
        hook.register(parallel)
        return parallel, optimizer, hook
    if way.startswith("ddp"):
        return in_ddp(model, fp16=way == "ddp-fp16"), optimizer, None
    if way == "horovod":
        import horovod.torch as hvd

        hvd.init()
        return model, hvd.DistributedOptimizer(optimizer, model.named_parameters()), None
    import hvdtrain
    from hvdtrain.torch import DistributedOptimizer

    hvdtrain.init()
    optimizer = DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)
    return model, optimizer, optimizer


def in_ddp(model: nn.Module, fp16: bool) -> nn.parallel.DistributedDataParallel:
    """The model in torch's DistributedDataParallel over Gloo, by the interface that horovodrun was told of."""
    rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
    if interface := os.environ.get("HOROVOD_GLOO_IFACE"):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    store = dist.TCPStore(os.environ["BENCH_MASTER"], int(os.environ["BENCH_PORT"]), size, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if fp16:
        parallel.register_comm_hook(None, fp16_compress_hook)
    return parallel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--cores", choices=["own", "any"], help="keep to this rank's share of the cores, or not")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: nn.Module = resnet18(num_classes=10)
    images, labels = torch.randn(options.images, 3, SIDE, SIDE), torch.randint(10, (options.images,))
    if options.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model, optimizer, sender = wrapped(options.way, model, sgd)
    if options.cores == "own":
        cpus.bind_to_cores(*(int(os.environ[f"HOROVOD_LOCAL_{what}"]) for what in ("RANK", "SIZE")))
    elif options.cores == "any":
        os.sched_setaffinity(0, cpus.USABLE_CPUS)
    seconds = []
    for _ in range(options.steps):
        begin = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    if os.environ.get("HOROVOD_RANK", "0") == "0":
        result = {"seconds": seconds, "wire_bytes": getattr(sender, "wire_bytes", None)}
        print("RESULT", json.dumps(result), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
