"""`hvdtrain list`: the recipes that are found by name."""

from __future__ import annotations

import click

from hvdtrain.recipe.registry import find_all_recipes

NO_DOMAIN = "other"


@click.command("list")
def list_command() -> None:
    """List the recipes found, by field: name, framework, what it is.

    Looks in ./recipes, then among those that hvdtrain ships. A recipe elsewhere runs by its path. The field is what the
    recipe's class names: domain = "vision".
    """
    recipes = find_all_recipes()
    width = max((len(recipe.name) for recipe in recipes), default=0)
    domains = sorted({recipe.domain for recipe in recipes}, key=lambda domain: (domain == "", domain))
    for domain in domains:
        click.echo(f"{domain or NO_DOMAIN}:")
        for recipe in recipes:
            if recipe.domain == domain:
                click.echo(f"  {recipe.name:{width}}  {recipe.framework:5}  {recipe.summary}")
