"""`hvdtrain list`: the recipes that are found by name."""

from __future__ import annotations

import click

from hvdtrain.recipe.base import FRAMEWORK_NAMES
from hvdtrain.recipe.registry import find_all_recipes, find_named_recipes
from hvdtrain.system.errors import UserError, suggest_nearest

NO_DOMAIN = "other"


@click.command("list")
@click.option("--framework", metavar="NAME", help="Only the recipes of one, such as jax.")
@click.argument("specs", nargs=-1, metavar="[RECIPE]...")
def list_command(specs: tuple[str, ...], framework: str | None) -> None:
    """List the recipes found, or those of RECIPE, by field: name, framework, what it is.

    Looks in ./recipes, then among those that hvdtrain ships. A recipe elsewhere runs by its path. The field is what the
    recipe's class names: domain = "vision".

    RECIPE is a name, a path (my/recipe.py) or my/recipe.py:ClassName. No file is run. Exit code 2: it has no recipe.
    """
    recipes = [recipe for spec in specs for recipe in find_named_recipes(spec)] if specs else find_all_recipes()
    if framework is not None:
        valid = {*FRAMEWORK_NAMES, *(recipe.framework for recipe in recipes if recipe.framework)}
        if framework not in valid:
            raise UserError(f"--framework {framework!r} is not a framework{suggest_nearest(framework, valid)}")
        recipes = [recipe for recipe in recipes if recipe.framework == framework]
    width = max((len(recipe.name) for recipe in recipes), default=0)
    domains = sorted({recipe.domain for recipe in recipes}, key=lambda domain: (domain == "", domain))
    for domain in domains:
        click.echo(f"{domain or NO_DOMAIN}:")
        for recipe in recipes:
            if recipe.domain == domain:
                click.echo(f"  {recipe.name:{width}}  {recipe.framework:5}  {recipe.summary}")
