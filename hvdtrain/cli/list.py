"""`hvdtrain list`: the recipes that are found by name."""

from __future__ import annotations

import click

from hvdtrain.recipe.registry import find_all_recipes


@click.command("list")
def list_command() -> None:
    """List the recipes found: name, framework, what it is.

    Looks in ./recipes, then among those that hvdtrain ships. A recipe elsewhere runs by its path.
    """
    recipes = find_all_recipes()
    width = max((len(recipe.name) for recipe in recipes), default=0)
    for recipe in recipes:
        click.echo(f"{recipe.name:{width}}  {recipe.framework:5}  {recipe.summary}")
