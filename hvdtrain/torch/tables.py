"""`Recipe.tables`: embedding tables that are dealt to the ranks, found, checked and prepared before the first step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

from torch import nn

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.recipe.base import is_overridden
from hvdtrain.system.errors import UserError
from hvdtrain.system.recipe_errors import in_recipe, name_call
from hvdtrain.torch.dealt_tables import DealtTables
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.recompute import check_blocks
from hvdtrain.torch.scorer import Scorer
from hvdtrain.torch.table_group import Table, connect_transport
from hvdtrain.torch.table_lookup import DealtForward


@contextlib.contextmanager
def deal_recipe_tables(
    recipe: Recipe, model: nn.Module, world: World, options: StepOptions, scorer: Scorer
) -> Iterator[DealtTables | None]:
    """Let a recipe's tables be looked up over all ranks until the end, if it has any and there may be several ranks.

    Raises UserError, on all ranks, for what `tables` returns if that cannot be dealt, and for options that do not go
    with it.
    """
    if (world.size == 1 and not world.may_change) or options.exchange.tables == "whole" or not names_tables(recipe):
        yield None
        return
    tables = collectives.on_all_ranks("tables", lambda: find_tables(recipe, model, world, options))
    dealt = DealtTables(type(recipe).__name__, tables, scorer.session, connect_transport(world, scorer.device))
    for number, module in enumerate(dealt.modules):
        vars(module)["forward"] = DealtForward(dealt, number, module)
    try:
        yield dealt
    finally:
        dealt.transport.close()
        scorer.session.join_lookup = None
        for module in dealt.modules:
            vars(module).pop("forward", None)


def names_tables(recipe: Recipe) -> bool:
    """Return whether a recipe has a method `tables`; those of other frameworks that torch carries have none."""
    return isinstance(recipe, Recipe) and is_overridden(recipe, "tables")


def find_tables(recipe: Recipe, model: nn.Module, world: World, options: StepOptions) -> dict[str, Table]:
    """Return the recipe's tables by their names in the model. Raises UserError."""
    call = name_call(recipe, "tables()")
    with in_recipe(recipe, "tables()"):
        returned = recipe.tables(model)
    names = check_blocks(call, returned, model, "list(model.tables)")
    tables = cast(dict[str, Table], dict(zip(names, returned, strict=True)))  # as is checked now
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    for name, module in tables.items():
        if problem := find_problem(module, uses):
            raise UserError(f"{call} has {name!r}, {problem}: leave it out, or give --tables whole")
    check_table_options(call, world, options)
    return tables


def find_problem(module: nn.Module, uses: Sequence[int]) -> str:
    """Return why a module cannot be dealt as a table, as a clause; "" if it can be.

    uses: the id of each parameter of the model, as often as it is in it.
    """
    kinds = (nn.Embedding, nn.EmbeddingBag)
    if not isinstance(module, kinds):
        return f"a {type(module).__name__}, where nn.Embedding or nn.EmbeddingBag is expected"
    if type(module).forward not in [kind.forward for kind in kinds] or "forward" in vars(module):
        return "which has a forward of its own"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "whose weight is computed from others"
    if uses.count(id(module.weight)) > 1:
        return "whose weight is that of another module, too"
    if module.max_norm is not None:
        return "whose max_norm changes rows when they are looked up"
    if module.scale_grad_by_freq:
        return "whose scale_grad_by_freq counts the ids of each rank alone"
    return ""


def check_table_options(call: str, world: World, options: StepOptions) -> None:
    """Raise UserError for options that cannot be exact with dealt tables. call: of the method."""
    if world.is_grid:
        flags = options.find_grid_shape(world.local_size).flags
        raise UserError(f"{flags} with {call}: several ranks have the same examples; give --tables whole")
    exchange, optimization = options.exchange, options.optimization
    reasons = {
        "--deterministic": exchange.deterministic and "gradients of rows are added rank by rank",
        f"--exchange {exchange.kind}": exchange.kind != "bucketed" and "it sends the gradients of all parameters",
        f"--shard {exchange.shard}": exchange.shard != "none" and "it divides all parameters alike",
        f"--server {options.service.server}": options.service.server is not None and "workers do not meet in a step",
        "--compile": optimization.compile and "lookups cannot be compiled",
        f"--prune {optimization.prune}": optimization.prune is not None and "it compares all weights",
        f"--local-steps {options.rounds.local_steps}": options.rounds.local_steps is not None
        and "each row is on one rank",
    }
    for option, reason in reasons.items():
        if reason:
            raise UserError(f"{option} with {call}: {reason}; leave it out, or give --tables whole")


def describe_tables(dealt: DealtTables | None) -> list[str]:
    """Return lines of the plan."""
    return [] if dealt is None or dealt.transport.size == 1 else [dealt.describe()]
