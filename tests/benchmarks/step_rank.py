"""One rank of a step-time benchmark: ResNet-18, 16 images of 64x64 per rank; prints the seconds of each step as JSON.

    python -m tests.benchmarks.step_rank WAY [--steps N] [--memory-format ...]

WAY: none (no communication), horovod (stock DistributedOptimizer), ddp, ddp-fp16, or bucketed (hvdtrain's).
Started by horovodrun, also for DDP, which takes its rank from Horovod's variables.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import torch
from torch import nn
from torchvision.models import resnet18

BATCH, SIDE = 16, 64


def wrapped(way: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """The model and the optimizer as a way of exchange wants them."""
    if way == "none":
        return model, optimizer
    if way.startswith("ddp"):
        import torch.distributed as dist
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
        if interface := os.environ.get("HOROVOD_GLOO_IFACE"):
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        store = dist.TCPStore(os.environ["BENCH_MASTER"], int(os.environ["BENCH_PORT"]), size, rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        if way == "ddp-fp16":
            parallel.register_comm_hook(None, fp16_compress_hook)
        return parallel, optimizer
    if way == "horovod":
        import horovod.torch as hvd

        hvd.init()
        return model, hvd.DistributedOptimizer(optimizer, model.named_parameters())
    import hvdtrain
    from hvdtrain.torch import DistributedOptimizer

    hvdtrain.init()
    return model, DistributedOptimizer(optimizer, model.named_parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: nn.Module = resnet18(num_classes=10)
    images, labels = torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(10, (BATCH,))
    if options.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)
    model, optimizer = wrapped(options.way, model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    seconds = []
    for _ in range(options.steps):
        begin = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    if os.environ.get("HOROVOD_RANK", "0") == "0":
        print("SECONDS", json.dumps(seconds), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
