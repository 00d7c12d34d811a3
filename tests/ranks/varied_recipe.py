"""Digits with all that could make ranks differ: augmentation, dropout, parameters that not every shard uses."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from hvdtrain.recipe.registry import load_recipe


class Shifted(Dataset):
    """Images rolled by up to a pixel."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        image, label = self.data[i]
        return image.roll(tuple(torch.randint(-1, 2, (2,)).tolist()), (1, 2)), label


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(width * 64, 10))
        self.table = nn.Embedding(8, 10, sparse=True)
        self.some = nn.Parameter(torch.zeros(10))
        self.never = nn.Parameter(torch.ones(10))

    def forward(self, images):
        logits = self.head(self.body(images)) + self.table((images.sum((1, 2, 3)) * 10).long() % 8)
        # Whether this holds of a pass depends on the examples in it, and of a shard of few it seldom does.
        return logits + self.some if images[0].sum() > images[-1].sum() + 4 else logits


@dataclass(kw_only=True)
class Varied(load_recipe(str(Path(__file__).parents[2] / "recipes" / "digits.py"))):
    """Shifted digits."""

    width: int = 8
    batch_size: int = 100
    lr: float = 0.05

    def model(self):
        return Net(self.width).to(memory_format=torch.channels_last)

    def dataset(self, split):
        data = super().dataset(split)
        return Shifted(data) if split == "train" else data

    def optimizer(self, params):
        params = list(params)
        table = [p for p in params if p.shape == (8, 10)]  # the momentum of what is sparse would be sparse
        dense = [p for p in params if p.shape != (8, 10)]
        return torch.optim.SGD([{"params": dense, "momentum": 0.9}, {"params": table}], lr=self.lr)
