"""One rank of a way: `python -m tests.benchmarks.framework_ways.rank WAY`, started by `tests.benchmarks.frameworks`.

WAY: MODEL-HOW[+OPTION]@EXAMPLES, such as mlp-ddp@64 or mlp-jax+powersgd@64. OPTION, of recipes: `parts`, which takes
the step apart, or a compression.
"""

from __future__ import annotations

import os
import sys

from tests.benchmarks.framework_ways.pace import Pace


def main() -> None:
    name, _, examples = sys.argv[1].partition("@")
    model, _, how = name.partition("-")
    how, _, option = how.partition("+")
    pace, count = Pace(), int(examples)
    if how in ("jax", "torch") or how.startswith("keras-"):
        train_as_recipe(how, option, model, count, pace)
    elif how.startswith("fit-"):
        os.environ["KERAS_BACKEND"] = how.removeprefix("fit-")
        from tests.benchmarks.framework_ways.keras_fit import train_by_fit

        train_by_fit(model, count, pace, f"{option},warmup=0" if option else "none")
    else:
        os.environ["NPROC"] = "1"  # threads of XLA, which hvdtrain sets by itself
        train_otherwise(how, model, count, pace)


def train_as_recipe(how: str, option: str, model: str, examples: int, pace: Pace) -> None:
    """Train a recipe in hvdtrain, until the benchmark ends."""
    from tests.benchmarks.framework_ways.recipe_way import train_recipe

    if how == "torch":
        from tests.benchmarks.framework_ways.torch_ways import TorchRecipe as Recipe
    elif how.startswith("keras-"):
        os.environ["KERAS_BACKEND"] = how.removeprefix("keras-")
        from tests.benchmarks.framework_ways.keras_recipe import KerasRecipe as Recipe
    else:
        from tests.benchmarks.framework_ways.jax_recipe import JaxRecipe as Recipe
    if option == "parts":
        from tests.benchmarks.framework_ways.parts import take_apart

        take_apart(pace)
        option = ""
    train_recipe(Recipe(net=model), examples, pace, compression=f"{option},warmup=0" if option else "none")


def train_otherwise(how: str, model: str, examples: int, pace: Pace) -> None:
    """Train in another way, until the benchmark ends."""
    if how == "ddp":
        from tests.benchmarks.framework_ways.torch_ways import train_with_ddp as train
    elif how == "all-reduce":
        from tests.benchmarks.framework_ways.torch_ways import all_reduce_alone as train
    elif how == "distributed":
        from tests.benchmarks.framework_ways.jax_ways import train_with_jax_distributed as train
    else:
        from tests.benchmarks.framework_ways.jax_ways import train_alone as train
    train(model, examples, pace)


if __name__ == "__main__":
    main()
