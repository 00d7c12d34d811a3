"""A small network learns digits from a large one: a frozen teacher, targets that become harder."""

from dataclasses import dataclass
from importlib.metadata import distribution

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from hvdtrain.torch import Recipe, option


class Pair(nn.Module):
    """A student, and the teacher, which is not trained: it is in the model so that checkpoints hold it."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()  # in which mode hvdtrain leaves it

    def forward(self, images):
        return self.student(images)


@dataclass(kw_only=True)
class Distill(Recipe):
    """A small classifier learns 8x8 digits from few images and a large classifier that has seen them all.

    Distillation (Hinton et al., 1503.02531) with progressive targets: at first the frozen teacher's softened answers,
    at the end the labels. Means of seeds 0, 1 and 2: accuracy 0.841 (0.850, 0.836, 0.836), the same student alone 0.829
    (0.839, 0.814, 0.833), the teacher 0.983; a run takes some seconds:

        hvdtrain launch -np 2 distill --seed 0
        hvdtrain launch -np 2 distill --seed 0 --alone
    """

    domain = "vision"
    best = ("accuracy", "max")

    examples: int = option(150, "images that the student learns from; the teacher has seen all 1,437", at_least=1)
    width: int = option(32, "units of the student's hidden layer", at_least=1)
    share: float = option(0.9, "weight of the teacher's targets at first; it falls to 0", at_least=0)
    temperature: float = option(3.0, "of the teacher's targets and of the student's answer to them", above=0)
    alone: bool = option(False, "without the teacher, to compare")
    epochs: int = 100
    batch_size: int = 64
    lr: float = 0.01
    schedule: str = "cosine"

    def model(self):
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, self.width), nn.ReLU(), nn.Linear(self.width, 10))
        return Pair(student, fit_teacher(*read_digits("train")))

    def dataset(self, split):
        images, labels = read_digits(split)
        count = self.examples if split == "train" else len(labels)
        return TensorDataset(images[:count], labels[:count])

    def optimizer(self, params):
        return torch.optim.Adam([p for p in params if p.requires_grad], lr=self.lr)

    def score(self, model, batch):
        images, labels = batch
        logits = model(images)
        loss = F.cross_entropy(logits, labels, reduction="none")
        if self.now.training and not self.alone:
            share = self.share * (1 - self.now.step / self.now.steps)
            with torch.no_grad():
                targets = F.softmax(model.teacher(images) / self.temperature, 1)
            soft = F.cross_entropy(logits / self.temperature, targets, reduction="none")
            loss = (1 - share) * loss + share * self.temperature**2 * soft
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float()}


def read_digits(split):
    """Return the images (n, 1, 8, 8) and labels (n,) of a split, as the recipe `digits` has them."""
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    digits = torch.tensor(np.loadtxt(str(file), delimiter=",", dtype=np.float32))
    images, labels = digits[:, :-1].reshape(-1, 1, 8, 8) / 16, digits[:, -1].long()
    chosen = (torch.arange(len(labels)) % 5 == 0) == (split != "train")
    return images[chosen], labels[chosen]


def fit_teacher(images, labels, features=2048, sharpness=12.0):
    """Return a classifier of digits: random features, and the ridge regression on them (Rahimi and Recht, 2007)."""
    made = torch.Generator().manual_seed(0)
    hidden, out = nn.Linear(64, features), nn.Linear(features, 10)
    with torch.no_grad():
        hidden.weight.copy_(torch.randn(features, 64, generator=made) / 2)
        hidden.bias.copy_(torch.randn(features, generator=made))
        x = torch.relu(hidden(images.flatten(1))).double()
        y = F.one_hot(labels, 10).double()
        gram = x.T @ x + 10.0 * torch.eye(features, dtype=torch.float64)
        # Its answers are near 0 and 1: made logits, they are probabilities that are about as sure as they are right.
        out.weight.copy_(sharpness * torch.linalg.solve(gram, x.T @ (y - 0.1)).T)
        out.bias.fill_(0.1 * sharpness)
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), out)
