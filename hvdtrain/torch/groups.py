"""A recipe's optimizer: what is refused of it, and its parameter groups by the names of their parameters."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from hvdtrain.compression.spec import AUTO, parse_compression
from hvdtrain.exchange.parameter_checks import check_dtype, check_layers
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.system.errors import UserError
from hvdtrain.torch.hyperparameters import ParamGroup, StateDict
from hvdtrain.torch.recipe import Recipe


def check_optimizers(recipe: Recipe, optimizers: Mapping[str, torch.optim.Optimizer], model: nn.Module) -> list[str]:
    """Return warnings of what a recipe's optimizers leave out.

    Args:
        recipe: whose they are.
        optimizers: by the names of their losses.
        model: whose parameters they have.

    Raises:
        UserError: if one does not step without a closure, its parameters are not the model's or another's, or it has
            none to train.
    """
    method, names = f"{type(recipe).__name__}.optimizer", {p: name for name, p in model.named_parameters()}
    owners: dict[nn.Parameter, str] = {}
    warnings = []
    for loss, optimizer in optimizers.items():
        which = f"{loss!r}: " if len(optimizers) > 1 else ""
        warnings += check_optimizer(recipe, optimizer, names, which)
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if owners.setdefault(p, loss) != loss:
                raise UserError(
                    f"{method}: parameter {names[p]} is in the optimizers of {owners[p]!r} and {loss!r}: give it to one"
                )
    left_out = [name for p, name in names.items() if p.requires_grad and p not in owners]
    if left_out:
        more = f" and {len(left_out) - 3} others" if len(left_out) > 3 else ""
        group = "no group of the optimizer" if len(optimizers) == 1 else "no optimizer"
        warnings.insert(0, f"warning   in {group}, so not trained: {', '.join(left_out[:3])}{more}")
    return warnings


def check_several(options: StepOptions, optimizers: Mapping[str, torch.optim.Optimizer], model: nn.Module) -> None:
    """Raise UserError for options that cannot be used with an optimizer for each of several losses."""
    names = ", ".join(optimizers)
    spec = parse_compression(options.compression.spec)
    if spec.method == AUTO:
        raise UserError(
            f"--compression auto measures the steps of one optimizer, and there is one for each of {names}: name a "
            "method, e.g. powersgd:4 (hvdtrain bench compression compares them)"
        )
    if options.model_flag:
        raise UserError(f"{options.model_flag} takes one optimizer, and there is one for each of {names}: leave it out")
    if options.exchange.kind == "horovod":
        raise UserError(f"--exchange horovod takes one optimizer, and there is one for each of {names}: leave it out")
    held = {p for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]}
    check_layers(spec, [name for name, p in model.named_parameters() if p in held])


def check_optimizer(
    recipe: Recipe, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], which: str
) -> list[str]:
    """Return warnings of one optimizer. Raises UserError for one that cannot be used.

    Args:
        recipe: whose it is.
        optimizer: as it was returned.
        names: of the model's parameters.
        which: prefix of messages about it; "" if there is no other optimizer.
    """
    method = f"{type(recipe).__name__}.optimizer: {which}"
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(f"{method}{type(optimizer).__name__} needs a closure: it cannot be used")
    if any("lr" not in group for group in optimizer.param_groups):
        raise UserError(f"{method}{type(optimizer).__name__} has no learning rate 'lr': it cannot be used")
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for p in held:
        if p not in names:
            raise UserError(
                f"{method}{find_recipe_attribute(recipe, p)}, of shape {tuple(p.shape)}, is not a parameter of the "
                "model, so it would be neither saved nor sent to other ranks: put it into the model in model(), and "
                "take it from there"
            )
        check_dtype(names[p], p)
    if not held:
        raise UserError(f"{method}the optimizer has no parameters: there is nothing to train")
    if not any(p.requires_grad for p in held):
        raise UserError(
            f"{method}none of the optimizer's {len(held)} parameters requires a gradient: there is nothing to train; "
            "use requires_grad_(True) for those that are to be trained"
        )
    if empty := [str(number) for number, group in enumerate(optimizer.param_groups) if not group["params"]]:
        return [f"warning   {which}without parameters: the optimizer's group {', '.join(empty)}"]
    return []


@contextlib.contextmanager
def explain_closure_error(recipe_name: str, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Make the error of an optimizer whose step needs a closure a UserError."""
    try:
        yield
    except (AssertionError, TypeError) as error:
        if "closure" not in str(error):
            raise
        raise UserError(
            f"{recipe_name}.optimizer: {type(optimizer).__name__} needs a closure: it cannot be used"
        ) from error


def find_recipe_attribute(recipe: Recipe, p: nn.Parameter) -> str:
    """Return what a parameter that is not the model's is called in the recipe."""
    for name, value in vars(recipe).items():
        if value is p:
            return f"self.{name}"
        if isinstance(value, nn.Module):
            for inner, own in value.named_parameters():
                if own is p:
                    return f"self.{name}.{inner}"
    return "a parameter"


def get_parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """Return the names of each group's parameters, in the group's order."""
    names = {p: name for name, p in model.named_parameters()}
    groups = vars(optimizer).get("param_groups", optimizer.param_groups)
    return [
        [names.get(p, f"group{number}.{place}") for place, p in enumerate(group["params"])]
        for number, group in enumerate(groups)
    ]


def match_groups(saved: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> list[int]:
    """Return, for each group of parameters, which of the saved groups has the same, in any order.

    Raises:
        UserError: that names the first parameter that is missing, new, or in another group.
    """
    check_same_groups(saved, now)
    sets = [set(names) for names in saved]
    return [sets.index(set(names)) for names in now]


def reorder_state(state: StateDict, saved: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> StateDict:
    """Return an optimizer's saved state for an optimizer that has the same groups and parameters in another order.

    Args:
        state: a state dict; one that is not as torch's optimizers have it is returned as it is.
        saved: the names of each group's parameters when it was saved.
        now: the same, of the optimizer that is to load it.
    """
    groups = state.get("param_groups", [])
    if [len(group.get("params", ())) for group in groups] != [len(names) for names in saved]:
        return state
    numbers = {
        name: number
        for group, names in zip(groups, saved, strict=True)
        for number, name in zip(group["params"], names, strict=True)
    }
    order = zip(match_groups(saved, now), now, strict=True)
    return {**state, "param_groups": [{**groups[i], "params": [numbers[name] for name in names]} for i, names in order]}


def align_state(
    state: StateDict, now: Sequence[Sequence[str]], hyperparameters: Sequence[ParamGroup]
) -> tuple[StateDict, Sequence[ParamGroup]]:
    """Return an optimizer's state dict in the order of its groups now, and the hyperparameters that they began with.

    Args:
        state: of a checkpoint.
        now: the names of each group's parameters.
        hyperparameters: of each group now, for a checkpoint that has none.
    """
    own, earlier = state["optimizer"], state.get("settings", hyperparameters)
    if "parameters" not in state:  # an earlier hvdtrain matched by order
        return own, earlier
    places = match_groups(state["parameters"], now)
    return reorder_state(own, state["parameters"], now), [earlier[place] for place in places if place < len(earlier)]


def check_same_groups(saved: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> None:
    """Raise UserError that names the first parameter by which two lists of groups differ, the order aside."""
    before = {name: number for number, names in enumerate(saved) for name in names}
    after = {name: number for number, names in enumerate(now) for name in names}
    for name in before:
        if name not in after:
            raise UserError(f"the checkpoint's optimizer has parameter {name}, and this one has not")
    for name in after:
        if name not in before:
            raise UserError(f"the optimizer has parameter {name}, which the checkpoint's has not")
    for number, names in enumerate(now):
        theirs = {before[name] for name in names}
        together = sorted(name for group in theirs for name in saved[group])
        if together != sorted(names):
            odd = next(name for name in [*names, *together] if name not in names or before[name] != before[names[0]])
            raise UserError(
                f"parameter {odd} is in another group of the optimizer than in the checkpoint (now {number})"
            )
