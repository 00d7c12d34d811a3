"""What a recipe is, for every framework: the class to subclass, and how its options are declared."""

from hvdtrain.recipe.base import Recipe, option

__all__ = ["Recipe", "option"]
