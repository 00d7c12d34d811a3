"""A task shaped as CIFAR-10 that needs no download: handwritten digits drawn into small coloured pictures."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from torchvision.models import resnet18

from hvdtrain.recipe.registry import load_recipe
from hvdtrain.torch import Recipe, option

Digits = load_recipe("digits")
SIDE = 32  # pixels
EVALUATED = 5  # pictures of each digit that is held out


@dataclass(kw_only=True)
class CifarShaped(Recipe):
    """ResNet-18 on 32x32 pictures, each of a handwritten digit (UCI) of some colour, place and size on a motley ground.

    Digits and their split are those of the recipe digits; the pictures are the same each time. Of the size of
    CIFAR-10, 11 million parameters, but with ImageNet's stem, which shrinks pictures at once: made for benchmarks of
    gradient exchange, where a step has to be cheap while its exchange is not.
    """

    best = ("accuracy", "max")

    renderings: int = option(5, "training pictures of each of 1,437 digits")
    epochs: int = 5
    batch_size: int = 64
    lr: float = 0.02
    schedule: str = "warmup:1ep cosine"

    def model(self):
        """(B, 3, 32, 32) -> (B, 10)"""
        return resnet18(num_classes=10)

    def dataset(self, split):
        digits, labels = Digits().dataset(split).tensors
        each = EVALUATED if split == "eval" else self.renderings
        made = torch.Generator().manual_seed(1 if split == "train" else 2)
        return TensorDataset(pictures(digits.repeat(each, 1, 1, 1), made), labels.repeat(each))

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)

    score = Digits.score


def pictures(digits, made):
    """Draw digits (N, 1, 8, 8), from 0 for ground to 1 for ink, into pictures (N, 3, 32, 32) between -1 and 1."""
    count = len(digits)

    def uniform(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(count, *shape, generator=made)

    # A digit takes 0.6 to 0.95 of the picture's side, lies inside, and is turned by up to 0.2 radians.
    size, turn = uniform(low=0.6, high=0.95), uniform(low=-0.2, high=0.2)
    place = uniform(2, low=-1, high=1) * (1 - size)[:, None]
    cos, sin = turn.cos() / size, turn.sin() / size
    turned = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    to_digit = torch.cat([turned, -turned @ place[:, :, None]], 2)
    grid = F.affine_grid(to_digit, [count, 1, SIDE, SIDE], align_corners=False)
    ink = F.grid_sample(digits, grid, align_corners=False)

    # The ground varies smoothly about a dark colour; the ink is brighter than that colour by 0.5 to 1 in each channel.
    dark = uniform(3, 1, 1, low=-0.8, high=0.0)
    ground = dark + F.interpolate(uniform(3, 5, 5, low=-0.4, high=0.4), SIDE, mode="bicubic")
    colour = dark + uniform(3, 1, 1, low=0.5, high=1.0)
    noise = 0.1 * torch.randn(count, 3, SIDE, SIDE, generator=made)
    return (ink * colour + (1 - ink) * ground + noise).clamp(-1, 1)
