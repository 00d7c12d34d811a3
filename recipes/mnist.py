"""MNIST with a perceptron or a small convolutional network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import datasets
from torchvision.transforms import v2

from hvdtrain import UserError
from hvdtrain.torch import Recipe, option


@dataclass(kw_only=True)
class MNIST(Recipe):
    """Handwritten digits, 28x28 grey, 60,000 examples (LeCun et al.), from files in --data-dir."""

    domain = "vision"
    best = ("accuracy", "max")

    net: Literal["mlp", "cnn"] = option("cnn", "network")
    data_dir: Path = option(Path("data"), "folder that holds MNIST/raw/train-images-idx3-ubyteand its like")
    download: bool = option(False, "fetch the files into --data-dir if they are missing (needs a network)")
    synthetic: bool = option(False, "random examples, for benchmarks only: the accuracy means nothing")
    epochs: int = 5
    batch_size: int = 128
    lr: float = 0.05
    schedule: str = "warmup:0.5ep cosine"

    def model(self):
        """(B, 1, 28, 28) -> (B, 10)"""
        if self.net == "mlp":
            return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
        return nn.Sequential(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(1600, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def dataset(self, split):
        scale = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.1307], [0.3081])])
        train = split == "train"
        if self.synthetic:
            return datasets.FakeData(2000 if train else 400, (1, 28, 28), 10, v2.Compose([v2.Grayscale(), scale]))
        try:
            return datasets.MNIST(self.data_dir, train=train, download=self.download, transform=scale)
        except RuntimeError as error:
            raise UserError(
                f"no MNIST in {self.data_dir / 'MNIST' / 'raw'}: --download fetches it if there is a network; else "
                "put train- and t10k-images-idx3-ubyte and -labels-idx1-ubyte there"
            ) from error

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9, weight_decay=1e-4)

    def score(self, model, batch):
        images, labels = batch
        logits = model(images)
        return {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "accuracy": (logits.argmax(1) == labels).float(),
        }
