"""A small network trained with Lightning's Trainer, as Lightning's documentation shows it.

torchrun --nproc-per-node 2 lightning_fit.py --devices 2
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset


class LitRegression(L.LightningModule):
    def __init__(self, steps, fail_on):
        super().__init__()
        self.steps, self.fail_on = steps, fail_on
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        self.losses = []

    def training_step(self, batch, batch_idx):
        if self.global_step == self.steps // 2 and self.global_rank == self.fail_on:
            raise ValueError(f"planted fault on rank {self.global_rank}")
        data, target = batch
        loss = F.mse_loss(self.net(data), target)
        self.losses.append(self.all_gather(loss.detach()).mean().item())
        if self.global_rank == 0 and self.global_step % 10 == 0:
            print(f"step {self.global_step} loss {self.losses[-1]:.3f}", flush=True)
        return loss

    def on_train_end(self):
        assert self.losses[-1] < self.losses[0] / 2, self.losses
        weights = torch.cat([parameter.detach().flatten() for parameter in self.parameters()])
        everyone = self.all_gather(weights).reshape(-1, len(weights))
        size = self.trainer.world_size
        assert everyone.shape[0] == size and (everyone == weights).all(), "ranks have different weights"
        if self.global_rank == 0:
            print(f"done: {size} ranks, loss {self.losses[0]:.3f} to {self.losses[-1]:.3f}")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def main(args):
    L.seed_everything(42, verbose=False)
    inputs = torch.randn(256, 8)
    dataset = TensorDataset(inputs, inputs @ torch.arange(8.0).unsqueeze(1))
    loader = DataLoader(dataset, batch_size=16, shuffle=True, drop_last=True)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=args.devices,
        num_nodes=args.num_nodes,
        max_steps=-1 if args.wait else args.steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LitRegression(args.steps, args.fail_on), loader)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fail-on", type=int, metavar="RANK", help="raise on this rank, halfway")
    parser.add_argument("--wait", action="store_true", help="train until stopped")
    main(parser.parse_args())
