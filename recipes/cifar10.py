"""CIFAR-10 with a small convolutional network or a ResNet-18."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import datasets
from torchvision.models import resnet18
from torchvision.transforms import v2

from hvdtrain import UserError
from hvdtrain.torch import Recipe, option

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(kw_only=True)
class CIFAR10(Recipe):
    """Small photographs, 32x32 in colour, 50,000 examples (Krizhevsky), from files in --data-dir.

    Its networks have batch norm, which --deterministic refuses.
    """

    domain = "vision"
    best = ("accuracy", "max")

    net: Literal["cnn", "resnet18"] = option("cnn", "network")
    data_dir: Path = option(Path("data"), "folder that holds cifar-10-batches-py")
    download: bool = option(False, "fetch the files into --data-dir if they are missing (needs a network)")
    augment: bool = option(True, "random crops and flips in training")
    synthetic: bool = option(False, "random examples, for benchmarks only: the accuracy means nothing")
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    schedule: str = "warmup:2ep cosine"

    def model(self):
        """(B, 3, 32, 32) -> (B, 10)"""
        if self.net == "resnet18":
            net = resnet18(num_classes=10)
            # For small images (He et al., 2015, section 4.2): a 3x3 stem and no pooling after it.
            net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            net.maxpool = nn.Identity()
            return net
        layers: list[nn.Module] = []
        channels = 3
        for width in (32, 64, 128):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 10))

    def dataset(self, split):
        train = split == "train"
        steps = [v2.ToImage()]
        if train and self.augment:
            steps += [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
        transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
        if self.synthetic:
            return datasets.FakeData(2000 if train else 400, (3, 32, 32), 10, transform)
        try:
            return datasets.CIFAR10(self.data_dir, train=train, download=self.download, transform=transform)
        except RuntimeError as error:
            raise UserError(
                f"no whole CIFAR-10 in {self.data_dir / 'cifar-10-batches-py'}: --download fetches it if there is a "
                f"network; else unpack cifar-10-python.tar.gz in {self.data_dir}"
            ) from error

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def score(self, model, batch):
        images, labels = batch
        logits = model(images)
        return {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "accuracy": (logits.argmax(1) == labels).float(),
        }
