"""A small network trained in a loop with Accelerate, as Accelerate's documentation shows it.

accelerate launch --cpu --num_processes 2 --mpirun_hostfile hosts.txt accelerate_loop.py
"""

import argparse
import itertools

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset


def main(args):
    accelerator = Accelerator(cpu=True)
    set_seed(42)
    inputs = torch.randn(256, 8)
    dataset = TensorDataset(inputs, inputs @ torch.arange(8.0).unsqueeze(1))
    loader = DataLoader(dataset, batch_size=16, shuffle=True, drop_last=True)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    losses = []
    for step, (data, target) in enumerate(itertools.chain.from_iterable(itertools.repeat(loader))):
        if step == args.steps and not args.wait:
            break
        if step == args.steps // 2 and accelerator.process_index == args.fail_on:
            raise ValueError(f"planted fault on rank {accelerator.process_index}")
        optimizer.zero_grad()
        loss = F.mse_loss(model(data), target)
        accelerator.backward(loss)
        optimizer.step()
        losses.append(accelerator.gather(loss.detach()).mean().item())
        if step % 10 == 0:
            accelerator.print(f"step {step} loss {losses[-1]:.3f}", flush=True)

    assert losses[-1] < losses[0] / 2, losses
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    everyone = accelerator.gather(weights.unsqueeze(0))
    size = accelerator.num_processes
    assert everyone.shape[0] == size and (everyone == weights).all(), "ranks have different weights"
    accelerator.print(f"done: {size} ranks, loss {losses[0]:.3f} to {losses[-1]:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fail-on", type=int, metavar="RANK", help="raise on this rank, halfway")
    parser.add_argument("--wait", action="store_true", help="train until stopped")
    main(parser.parse_args())
