"""A small network trained with elastic Horovod, as Horovod's documentation for PyTorch shows it.

horovodrun -np 2 --min-np 1 --host-discovery-script ./discover_hosts.sh python horovod_elastic.py
"""

import argparse
import time

import horovod.torch as hvd
import torch
import torch.nn.functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--fail-on", type=int, metavar="RANK", help="raise on this rank, halfway")
parser.add_argument("--wait", action="store_true", help="train until stopped")
args = parser.parse_args()

hvd.init()
torch.manual_seed(42)

generator = torch.Generator().manual_seed(0)
inputs = torch.randn(256, 8, generator=generator)
targets = inputs @ torch.arange(8.0).unsqueeze(1)
dataset = torch.utils.data.TensorDataset(inputs, targets)
sampler = hvd.elastic.ElasticSampler(dataset)
loader = torch.utils.data.DataLoader(dataset, batch_size=args.batch_size, sampler=sampler)

model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())


@hvd.elastic.run
def train(state):
    while state.epoch < args.epochs or args.wait:
        for data, target in loader:
            if state.epoch == args.epochs // 2 and hvd.rank() == args.fail_on:
                raise ValueError(f"planted fault on rank {hvd.rank()}")
            optimizer.zero_grad()
            loss = F.mse_loss(model(data), target)
            loss.backward()
            optimizer.step()
            sampler.record_batch(state.batch, args.batch_size)
            state.batch += 1
            state.losses.append(hvd.allreduce(loss.detach(), name="loss").item())
            if hvd.rank() == 0 and state.batch == 1:
                print(f"epoch {state.epoch} loss {state.losses[-1]:.3f}", flush=True)
            state.commit()
            if args.wait:
                time.sleep(0.05)
        state.epoch += 1
        state.batch = 0
        sampler.set_epoch(state.epoch)
        state.commit()


state = hvd.elastic.TorchState(model=model, optimizer=optimizer, sampler=sampler, epoch=0, batch=0, losses=[])
train(state)

assert state.losses[-1] < state.losses[0] / 2, state.losses
weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
everyone = hvd.allgather(weights.unsqueeze(0), name="weights")
assert everyone.shape[0] == hvd.size() and (everyone == weights).all(), "workers have different weights"
if hvd.rank() == 0:
    print(f"done: {hvd.size()} ranks, loss {state.losses[0]:.3f} to {state.losses[-1]:.3f}")
