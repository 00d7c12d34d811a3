"""SimCLR: representations without labels, with the views of all ranks as negatives (Chen et al., 2020)."""

from dataclasses import dataclass
from importlib.metadata import distribution

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hvdtrain.torch import Recipe, SyncBatchNorm, all_gather, option, own_rows


@dataclass(kw_only=True)
class SimCLR(Recipe):
    """Representations of digits without their labels: views of one attract, those of different ones repel each other.

    The loss is NT-Xent of https://arxiv.org/abs/2002.05709 over the batch of all ranks (all_gather), and batch norm is
    over all ranks (SyncBatchNorm, as in its section 2.2): the training is the same on any number of ranks. The digits
    are those of recipes/digits.py. Only the evaluation uses their labels: it trains a linear classifier on the features
    of 100 digits, and reports its accuracy on the 360 that are held out as "probe".

        hvdtrain launch -np 2 simclr

    gives a probe of 91.7 % after 60 epochs (measured on 2 ranks, seed 0; one minute on two CPU cores). The same
    classifier reaches 81.9 % on the pixels themselves. With labels, recipes/digits.py reaches 98 %.
    """

    best = ("probe", "max")
    domain = "vision"

    width: int = option(128, "channels of the last convolution, which are the features")
    temperature: float = option(0.2, "temperature of the softmax over similarities", above=0)
    probe_labels: int = option(100, "labelled digits that the linear classifier of the evaluation sees", at_least=10)
    epochs: int = 60
    batch_size: int = 128
    lr: float = 0.1
    schedule: str = "warmup:1ep cosine"

    def model(self):
        """(B, 1, 8, 8) -> (B, width) features -> (B, 32) what the loss compares, a projection of them"""
        encoder = nn.Sequential(
            nn.Conv2d(1, self.width // 2, 3, padding=1, bias=False),
            nn.BatchNorm2d(self.width // 2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(self.width // 2, self.width, 3, padding=1, bias=False),
            nn.BatchNorm2d(self.width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        head = nn.Sequential(nn.Linear(4 * self.width, 64), nn.ReLU(), nn.Linear(64, 32))
        return SyncBatchNorm.convert(nn.ModuleDict({"encoder": encoder, "head": head}))

    def dataset(self, split):
        file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
        digits = torch.tensor(np.loadtxt(str(file), delimiter=",", dtype=np.float32))
        images, labels = digits[:, :-1].reshape(-1, 1, 8, 8) / 16, digits[:, -1].long()
        held_out = torch.arange(len(labels)) % 5 == 0
        if split == "train":
            return Views(images[~held_out], labels[~held_out], held_out[~held_out])
        return Views(images, labels, held_out)

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9, weight_decay=1e-4)

    def score(self, model, batch):
        first, second, *_ = batch
        projected = model["head"](model["encoder"](torch.cat([first, second])))
        views = F.normalize(projected, dim=1).unflatten(0, (2, -1)).transpose(0, 1)  # (B, 2, d)
        everyone = all_gather(views)  # (N, 2, d), N examples on all ranks
        own = torch.arange(len(everyone), device=views.device)[own_rows(everyone)]
        itself = (
            2 * own[:, None] + torch.arange(2, device=views.device)
        ).flatten()  # of 2N views; its pair: itself ^ 1
        similarities = views.flatten(0, 1) @ everyone.flatten(0, 1).T / self.temperature  # (2B, 2N)
        logits = similarities.scatter(1, itself[:, None], -torch.inf)
        losses = F.cross_entropy(logits, itself ^ 1, reduction="none")
        return {
            "loss": losses.unflatten(0, (-1, 2)).mean(1),
            "found": (logits.argmax(1) == itself ^ 1).float().unflatten(0, (-1, 2)).mean(1),
        }

    def outputs(self, model, batch):
        *_, images, labels, held_out = batch
        return {"features": model["encoder"](images), "labels": labels, "held_out": held_out}

    def summarise(self, outputs):
        features, labels, held_out = (torch.as_tensor(outputs[name]) for name in ("features", "labels", "held_out"))
        features = F.normalize(features.float(), dim=1)
        seen = torch.nonzero(~held_out)[: self.probe_labels, 0]
        probe = nn.Linear(features.shape[1], 10)
        nn.init.zeros_(probe.weight), nn.init.zeros_(probe.bias)
        lbfgs = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def compute_loss():
            lbfgs.zero_grad()
            loss = F.cross_entropy(probe(features[seen]), labels[seen]) + 1e-4 * probe.weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            lbfgs.step(compute_loss)
        right = probe(features[held_out]).argmax(1) == labels[held_out]
        return {"probe": right.float().mean().item()}


class Views:
    """Two random views of a digit, the digit itself, its label, and whether it is held out from the classifier."""

    def __init__(self, images, labels, held_out):
        self.images, self.labels, self.held_out = images, labels, held_out

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i]
        first, second = distort(image.expand(2, -1, -1, -1))
        return first, second, image, self.labels[i], self.held_out[i]


def distort(images):
    """Move, stretch, shear and rotate (B, 1, H, W) images at random, change their contrast, and add noise."""
    count = len(images)
    affine = torch.eye(2, 3) + torch.randn(count, 2, 3) * torch.tensor([0.2, 0.2, 0.25])
    grid = F.affine_grid(affine, images.shape, align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return moved * (0.6 + 0.8 * torch.rand(count, 1, 1, 1)) + 0.1 * torch.randn_like(images)
