"""What all ranks of a run must have the same of: recipe, source, options, and what the framework adds."""

from __future__ import annotations

from hvdtrain.comm.agreement import ConsistentPart, check_agreement
from hvdtrain.comm.world import World
from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.options import OptionValues, flag_of, flatten_options
from hvdtrain.recipe.source import source_of_class
from hvdtrain.system.version import __version__
from hvdtrain.training.options import RunOptions
from hvdtrain.training.run import Run

OPTIONS_COLLECTIVE = "agreement.options"
# What a rank runs on and what it prints may differ; the run folder is rank 0's.
PER_RANK_OPTIONS = ("device", "threads", "quiet", "run_dir")


def make_recipe_parts(cls: type[Recipe], name: str) -> list[ConsistentPart]:
    """Return the recipe by its name and class, and the files of its source."""
    source = source_of_class(cls)
    recipe = {"hvdtrain": __version__, "RECIPE": name, "the recipe's class": cls.__name__}
    return [
        ConsistentPart("recipe", recipe, "{key} is {here} on {who}, {there} on {base}"),
        ConsistentPart(
            "source files",
            source.file_digests if source is not None else {},
            "{who}: the recipe's file {key} differs from {base}'s: all ranks need the same",
        ),
    ]


def make_options_part(values: OptionValues) -> ConsistentPart:
    """Return options by their flags, without those that may differ from rank to rank.

    values: by the options' names. With --deterministic, the number of threads is part of the maths and may not differ.
    """
    left_out = [name for name in PER_RANK_OPTIONS if name != "threads" or not values.get("deterministic")]
    flags = {flag_of(name): str(value) for name, value in values.items() if name not in left_out}
    return ConsistentPart("options", flags, "{key} is {here} on {who}, {there} on {base}", absent_text="not given")


def collect_option_values(recipe: Recipe, options: RunOptions) -> OptionValues:
    """Return the value of each option of the recipe and of the run."""
    run = flatten_options(options)
    return {"resume": run["resume"], **flatten_options(recipe), **run}


def agree_on_options(recipe: Recipe, name: str, options: RunOptions) -> None:
    """Compare recipe, source and options on all ranks. Raises UserError on all ranks if some differ."""
    check_agreement(
        OPTIONS_COLLECTIVE,
        [*make_recipe_parts(type(recipe), name), make_options_part(collect_option_values(recipe, options))],
    )


def agree_on_given_options(cls: type[Recipe], name: str, given: OptionValues) -> None:
    """Compare recipe, source and the options given on all ranks; the others come from the run's config.json.

    A rank that does not resume calls `agree_on_options`, which differs. Raises UserError on all ranks then.
    """
    check_agreement(
        OPTIONS_COLLECTIVE,
        [*make_recipe_parts(cls, name), make_options_part({"resume": True, **dict(sorted(given.items()))})],
    )


def compare_with_run(run: Run, world: World) -> None:
    """Compare this process with those that began the run. Raises UserError, naming a difference."""

    def make_parts() -> list[ConsistentPart]:
        options_part = make_options_part(collect_option_values(run.recipe, run.options))
        return [*make_recipe_parts(type(run.recipe), run.name), options_part, *run.step.agreement_parts]

    run.membership.check_agreement(make_parts, world)
