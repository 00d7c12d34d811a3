"""The ways of torch: hvdtrain's recipe, DistributedDataParallel, and Horovod's all-reduce alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hvdtrain.torch import Recipe
from tests.benchmarks.framework_ways.models import LR, MOMENTUM, SHAPES, ManyExamples, make_examples
from tests.benchmarks.framework_ways.pace import Pace
from tests.benchmarks.step_rank import in_ddp

BUCKET_VALUES = 2 << 20  # 8 MiB, as hvdtrain sends them from CPUs


def make_network(name: str) -> nn.Module:
    """(B, 3, side, side) -> (B, 10)"""
    shape = SHAPES[name]
    layers: list[nn.Module] = []
    for before, width in shape.convolutions:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers.append(nn.Flatten())
    for before, width in shape.dense_layers:
        layers += [nn.Linear(before, width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(kw_only=True)
class TorchRecipe(Recipe):
    """The network in torch."""

    evals = ()
    net: str = "mlp"

    def model(self):
        return make_network(self.net)

    def dataset(self, split):
        return ManyExamples(SHAPES[self.net], images_first=True)

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr, momentum=MOMENTUM)

    def score(self, model, batch):
        images, labels = batch
        return {"loss": F.cross_entropy(model(images), labels.long(), reduction="none")}


def train_with_ddp(name: str, examples: int, pace: Pace) -> None:
    """Train in torch's DistributedDataParallel over Gloo."""
    torch.set_num_threads(1)
    model = in_ddp(make_network(name), fp16=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    images, labels = (torch.from_numpy(x[:examples]) for x in make_examples(SHAPES[name]))
    images, labels = images.permute(0, 3, 1, 2).contiguous(), labels.long()
    while True:
        pace.begin_step()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()


def all_reduce_alone(name: str, examples: int, pace: Pace) -> None:
    """Sum as many bytes as the gradients have, in buckets, by Horovod."""
    import horovod.torch as hvd

    import hvdtrain

    hvdtrain.init()
    flats = torch.ones(SHAPES[name].num_parameters).split(BUCKET_VALUES)
    while True:
        pace.begin_step()
        for handle in [hvd.allreduce_async_(flat, name=f"flat{i}") for i, flat in enumerate(flats)]:
            hvd.synchronize(handle)
