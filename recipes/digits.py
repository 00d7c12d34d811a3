"""Handwritten digits: trains in seconds on a CPU, with data that scikit-learn ships."""

from dataclasses import dataclass
from importlib.metadata import distribution

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from hvdtrain.torch import Recipe, option


@dataclass(kw_only=True)
class Digits(Recipe):
    """Handwritten digits, 8x8 grey, 1,797 examples (UCI optical digits, shipped with scikit-learn)."""

    domain = "vision"
    best = ("accuracy", "max")

    width: int = option(32, "channels of the first convolution")
    epochs: int = 20
    batch_size: int = 128
    lr: float = 0.1
    schedule: str = "warmup:1ep cosine"

    def model(self):
        """(B, 1, 8, 8) -> (B, 10)"""
        return nn.Sequential(
            nn.Conv2d(1, self.width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(self.width, 2 * self.width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * self.width * 4, 10),
        )

    def dataset(self, split):
        # The file that sklearn.datasets.load_digits reads; to import scikit-learn takes longer than to train an epoch.
        file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
        digits = torch.tensor(np.loadtxt(str(file), delimiter=",", dtype=np.float32))
        images, labels = digits[:, :-1].reshape(-1, 1, 8, 8) / 16, digits[:, -1].long()
        # Every fifth example is for evaluation: 360 of 1,797.
        held_out = torch.arange(len(labels)) % 5 == 0
        chosen = held_out if split == "eval" else ~held_out
        return TensorDataset(images[chosen], labels[chosen])

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9, weight_decay=1e-4)

    def score(self, model, batch):
        images, labels = batch
        logits = model(images)
        return {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "accuracy": (logits.argmax(1) == labels).float(),
        }

    def blocks(self, model):
        return [layer for layer in model if isinstance(layer, (nn.Conv2d, nn.Linear))]
