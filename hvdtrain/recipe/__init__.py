"""What a recipe is, for every framework: the class to subclass, and how its options are declared."""

from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.options import option

__all__ = ["Recipe", "option"]
