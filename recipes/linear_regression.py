"""Linear regression: the smallest recipe there can be."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import TensorDataset

from hvdtrain.torch import Recipe, option


@dataclass(kw_only=True)
class LinearRegression(Recipe):
    """A line through noisy points, with a known answer (made from a fixed seed)."""

    domain = "tabular"

    features: int = option(8, "inputs of the linear map")
    noise: float = option(0.1, "standard deviation of the noise on the targets")
    epochs: int = 20
    batch_size: int = 32
    lr: float = 0.05

    def model(self):
        """(B, features) -> (B, 1)"""
        return nn.Linear(self.features, 1)

    def dataset(self, split):
        made = torch.Generator().manual_seed(0 if split == "train" else 1)
        inputs = torch.randn(1003 if split == "train" else 251, self.features, generator=made)
        slope = torch.linspace(-1, 1, self.features)
        noise = self.noise * torch.randn(len(inputs), generator=made)
        return TensorDataset(inputs, inputs @ slope + 0.5 + noise)

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr)

    def score(self, model, batch):
        inputs, targets = batch
        return {"loss": (model(inputs).squeeze(1) - targets).square()}
