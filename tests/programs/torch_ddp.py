"""A small network trained with DistributedDataParallel, as PyTorch's tutorials show it.

torchrun --nproc-per-node 2 torch_ddp.py
"""

import argparse
import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


def batches(loader, sampler):
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


def main(args):
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(42 + rank)

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 8, generator=generator)
    dataset = TensorDataset(inputs, inputs @ torch.arange(8.0).unsqueeze(1))
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=16, sampler=sampler, drop_last=True)

    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for step, (data, target) in enumerate(batches(loader, sampler)):
        if step == args.steps and not args.wait:
            break
        if step == args.steps // 2 and rank == args.fail_on:
            raise ValueError(f"planted fault on rank {rank}")
        optimizer.zero_grad()
        loss = F.mse_loss(model(data), target)
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / size)
        if rank == 0 and step % 10 == 0:
            print(f"step {step} loss {losses[-1]:.3f}", flush=True)

    assert losses[-1] < losses[0] / 2, losses
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    everyone = [torch.empty_like(weights) for _ in range(size)]
    dist.all_gather(everyone, weights)
    assert all(torch.equal(other, weights) for other in everyone), "ranks have different weights"
    if rank == 0:
        print(f"done: {size} ranks, loss {losses[0]:.3f} to {losses[-1]:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fail-on", type=int, metavar="RANK", help="raise on this rank, halfway")
    parser.add_argument("--wait", action="store_true", help="train until stopped")
    main(parser.parse_args())
