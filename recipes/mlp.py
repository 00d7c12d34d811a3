"""Binary classification with a multi-layer perceptron."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from hvdtrain.torch import Recipe, option


@dataclass(kw_only=True)
class MLP(Recipe):
    """Benign or malignant: binary classification of 569 tumours (UCI, shipped with scikit-learn)."""

    domain = "tabular"
    best = ("accuracy", "max")

    width: int = option(32, "units of each hidden layer")
    dropout: float = option(0.1, "part of the hidden units dropped in training")
    epochs: int = 30
    batch_size: int = 32
    lr: float = 0.003
    schedule: str = "cosine"

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout is {self.dropout}; expected a part from 0 to below 1")

    def model(self):
        """(B, 30) -> (B, 1), a logit"""
        return nn.Sequential(
            nn.Linear(30, self.width),
            nn.ReLU(),
            nn.Dropout(self.dropout),
            nn.Linear(self.width, self.width),
            nn.ReLU(),
            nn.Dropout(self.dropout),
            nn.Linear(self.width, 1),
        )

    def dataset(self, split):
        # Not at the top: `hvdtrain launch` reads the recipe too, and needs no data.
        from sklearn.datasets import load_breast_cancer

        data = load_breast_cancer()
        inputs = torch.tensor(data.data, dtype=torch.float32)
        labels = torch.tensor(data.target, dtype=torch.float32)
        held_out = torch.arange(len(labels)) % 5 == 0
        # Scaled by the training examples only.
        mean, std = inputs[~held_out].mean(0), inputs[~held_out].std(0)
        chosen = held_out if split == "eval" else ~held_out
        return TensorDataset(((inputs - mean) / std)[chosen], labels[chosen])

    def optimizer(self, params):
        return torch.optim.AdamW(params, lr=self.lr)

    def score(self, model, batch):
        inputs, labels = batch
        logits = model(inputs).squeeze(1)
        return {
            "loss": F.binary_cross_entropy_with_logits(logits, labels, reduction="none"),
            "accuracy": ((logits > 0) == (labels > 0.5)).float(),
        }
