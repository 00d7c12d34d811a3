"""cifar10's augmentation in front of a model that has neither batch norm nor dropout."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hvdtrain.recipe.registry import load_recipe


@dataclass(kw_only=True)
class AugmentedRecipe(load_recipe(str(Path(__file__).parents[2] / "recipes" / "cifar10.py"))):
    """A linear model of augmented images."""

    lr: float = 0.001

    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
