"""What ranks agree on before they build anything: the recipe, its source and the options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdtrain import __version__
from hvdtrain.collectives.agreement import Part, agree
from hvdtrain.recipe import Recipe, fields
from hvdtrain.recipe_source import source_of
from hvdtrain.trainer.options import RunOptions

COLLECTIVE = "agreement.options"
# Where a rank runs and what it shows may differ; rank 0 decides where the run's folder is.
PER_RANK = ("device", "threads", "quiet", "run_dir")


def recipe_parts(cls: type[Recipe], name: str) -> list[Part]:
    """The recipe by its name and class, and the files of its source."""
    source = source_of(cls)
    recipe = {"hvdtrain": __version__, "RECIPE": name, "the recipe's class": cls.__name__}
    return [
        Part("recipe", recipe, "{key} is {here} on {who}, {there} on {base}"),
        Part(
            "source files",
            source.digests if source is not None else {},
            "{who}: the recipe's file {key} differs from {base}'s: all ranks need the same",
        ),
    ]


def options_part(values: Mapping[str, Any]) -> Part:
    """Options by their flags; those that may differ from rank to rank are left out.

    values: by the options' names. With --deterministic the number of threads is part of the maths.
    """
    left_out = [name for name in PER_RANK if name != "threads" or not values.get("deterministic")]
    flags = {f"--{name.replace('_', '-')}": str(value) for name, value in values.items() if name not in left_out}
    return Part("options", flags, "{key} is {here} on {who}, {there} on {base}", absent="not given")


def resolved_options(recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """The value of each option of the recipe and of the run."""
    values = {field.name: getattr(recipe, field.name) for field in fields(type(recipe))}
    return {"resume": options.resume, **values, **vars(options)}


def agree_on_options(recipe: Recipe, name: str, options: RunOptions) -> None:
    """Return if all ranks have the same recipe, source and options. Raises UserError on all ranks."""
    agree(COLLECTIVE, [*recipe_parts(type(recipe), name), options_part(resolved_options(recipe, options))])


def agree_on_given(cls: type[Recipe], name: str, given: Mapping[str, Any]) -> None:
    """Return if all ranks resume with the same options given; the others are then those of the run's config.json.

    A rank that does not resume meets it with `agree_on_options`.
    """
    agree(COLLECTIVE, [*recipe_parts(cls, name), options_part({"resume": True, **dict(sorted(given.items()))})])
