"""The run options by which several ranks hold one copy of the model together."""

from __future__ import annotations

from dataclasses import dataclass

from hvdtrain.recipe.options import option


@dataclass(kw_only=True)
class ModelOptions:
    """How a model is divided among ranks. `ExchangeOptions.shard` is "model" for fully sharded parameters."""

    tensor: int = option(
        1,
        "ranks that hold one copy of the model together and compute the same examples, each with its part of the "
        "layers that the recipe's `split_plan` names; 1: not divided",
        at_least=1,
    )
    shard_ranks: int = option(
        0,
        "with --shard model: ranks that hold one copy of the model together; 0: those of a host",
        at_least=0,
    )
