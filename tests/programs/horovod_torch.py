"""A small network trained with Horovod, as Horovod's documentation for PyTorch shows it.

horovodrun -np 2 python horovod_torch.py
"""

import argparse
import itertools

import horovod.torch as hvd
import torch
import torch.nn.functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--fail-on", type=int, metavar="RANK", help="raise on this rank, halfway")
parser.add_argument("--wait", action="store_true", help="train until stopped")
args = parser.parse_args()

hvd.init()
torch.manual_seed(42 + hvd.rank())

generator = torch.Generator().manual_seed(0)
inputs = torch.randn(256, 8, generator=generator)
targets = inputs @ torch.arange(8.0).unsqueeze(1)
dataset = torch.utils.data.TensorDataset(inputs, targets)
sampler = torch.utils.data.distributed.DistributedSampler(dataset, num_replicas=hvd.size(), rank=hvd.rank())
loader = torch.utils.data.DataLoader(dataset, batch_size=16, sampler=sampler, drop_last=True)

model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)


def batches():
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


losses = []
for step, (data, target) in enumerate(batches()):
    if step == args.steps and not args.wait:
        break
    if step == args.steps // 2 and hvd.rank() == args.fail_on:
        raise ValueError(f"planted fault on rank {hvd.rank()}")
    optimizer.zero_grad()
    loss = F.mse_loss(model(data), target)
    loss.backward()
    optimizer.step()
    losses.append(hvd.allreduce(loss.detach(), name="loss").item())
    if hvd.rank() == 0 and step % 10 == 0:
        print(f"step {step} loss {losses[-1]:.3f}", flush=True)

assert losses[-1] < losses[0] / 2, losses
weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
everyone = hvd.allgather(weights.unsqueeze(0), name="weights")
assert everyone.shape[0] == hvd.size() and (everyone == weights).all(), "ranks have different weights"
assert hvd.allreduce(torch.tensor(hvd.rank()), name="sum", op=hvd.Sum) == sum(range(hvd.size()))
if hvd.rank() == 0:
    print(f"done: {hvd.size()} ranks, loss {losses[0]:.3f} to {losses[-1]:.3f}")
