"""A sandbox for a trial of a recipe, of which nothing remains.

The trial runs on copies of the recipe and its model, with all random generators put back afterwards, and so does the
drawing of the model's graph. What copies do not hold is put back as well: attributes of the recipe's own classes and
variables of their modules (what they are bound to, and the contents of lists, dicts and sets). Changes inside other
objects that these refer to, files and other processes are out of reach.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
import sysconfig
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hvdtrain.system.errors import UserError
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.tensors import build_deepcopy_memo, named_tensors, overwrite_tensor, read_version

MISSING = object()
INSTALL_ROOTS = {Path(sysconfig.get_paths()[kind]) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
PACKAGE_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Sandbox:
    """Where a trial takes place: copies, or, if they cannot be made, the recipe and model themselves."""

    recipe: Recipe
    model: nn.Module
    copy_error: str | None  # why there are no copies


@contextlib.contextmanager
def open_sandbox(recipe: Recipe, model: nn.Module, shared: Sequence[Any], in_place: bool = False) -> Iterator[Sandbox]:
    """Yield copies of a recipe and its model for a trial, and put back whatever else it changes.

    Args:
        recipe: it is copied.
        model: it is copied.
        shared: objects that the copies refer to as they are, such as datasets.
        in_place: let the trial have the model itself, and put back its parts except parameters and buffers that had no
            memory yet.

    Raises:
        UserError: the trial has changed parameters of the model although it ran on a copy.
    """
    copies, problem = (None, None) if in_place else _copy_recipe_and_model(recipe, model, shared)
    with contextlib.ExitStack() as exits:
        exits.enter_context(preserve_random_state())
        exits.enter_context(preserve_param_groups(shared))
        exits.enter_context(preserve_attributes(_user_namespaces(recipe, model)))
        if copies is not None:
            exits.enter_context(_guard_original_model(model))
            yield Sandbox(*copies, None)
        else:
            exits.enter_context(preserve_tensors(model))
            # The contents of modules last: first what they are bound to.
            exits.enter_context(preserve_attributes([recipe, *(m for m in model.modules() if not is_lazy_module(m))]))
            yield Sandbox(recipe, model, problem)


def _copy_recipe_and_model(
    recipe: Recipe, model: nn.Module, shared: Sequence[Any]
) -> tuple[tuple[Recipe, nn.Module] | None, str | None]:
    memo = build_deepcopy_memo(model)
    for thing in shared:
        memo[id(thing)] = thing
        # What a dataset holds may be large, and the recipe may hold it too.
        for value in getattr(thing, "__dict__", {}).values():
            memo[id(value)] = value
            memo |= {id(part): part for part in value} if isinstance(value, (tuple, list)) and len(value) < 100 else {}
    for own in (recipe, *model.modules()):  # which a dataset may refer to
        memo.pop(id(own), None)
    try:
        return copy.deepcopy((recipe, model), memo), None
    except Exception as error:  # of any object that a recipe holds
        return None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


@contextlib.contextmanager
def preserve_random_state() -> Iterator[None]:
    """Put back the states of torch's (on all devices), numpy's and Python's global generators at the end."""
    host, arrays, python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.set_rng_state(host)
        np.random.set_state(arrays)
        random.setstate(python)
        if devices:
            torch.cuda.set_rng_state_all(devices)


@contextlib.contextmanager
def preserve_attributes(owners: Sequence[Any]) -> Iterator[None]:
    """Put back the attributes of objects, classes or modules at the end, and lists, dicts and sets that they are."""
    before = [
        (owner, {name: (value, _copy_container(value)) for name, value in vars(owner).items() if _is_restorable(name)})
        for owner in owners
    ]
    try:
        yield
    finally:
        for owner, values in before:
            for name in [name for name in vars(owner) if _is_restorable(name) and name not in values]:
                _delete_attribute(owner, name)
            for name, (value, contents) in values.items():
                if vars(owner).get(name, MISSING) is not value:
                    _set_attribute(owner, name, value)
                _restore_container(value, contents)


def _is_restorable(name: str) -> bool:
    return not (name.startswith("__") and name.endswith("__"))


def _set_attribute(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, type):
        setattr(owner, name, value)
    else:  # not through a module's __setattr__, which sorts parameters out
        vars(owner)[name] = value


def _delete_attribute(owner: Any, name: str) -> None:
    if isinstance(owner, type):
        delattr(owner, name)
    else:
        del vars(owner)[name]


def _copy_container(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (list, dict, set, deque)) else None


def _restore_container(value: Any, contents: Any) -> None:
    if isinstance(value, dict):
        same = value.keys() == contents.keys() and all(value[key] is contents[key] for key in contents)
    elif isinstance(value, (list, deque)):
        same = len(value) == len(contents) and all(a is b for a, b in zip(value, contents, strict=True))
    else:
        same = not isinstance(value, set) or value == contents
    if not same:
        value.clear()
        (value.extend if isinstance(value, (list, deque)) else value.update)(contents)


def _user_namespaces(recipe: Recipe, model: nn.Module) -> list[Any]:
    """Return the classes that the user has written for the recipe and its model, and the modules that they are in."""
    classes = {cls for thing in (recipe, *model.modules()) for cls in type(thing).__mro__ if _is_user_class(cls)}
    modules = {sys.modules[cls.__module__] for cls in classes if cls.__module__ in sys.modules}
    for module in modules:
        classes |= {v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__}
    return [*modules, *classes]


def _is_user_class(cls: type) -> bool:
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None:
        return cls.__module__ not in sys.builtin_module_names
    return not INSTALL_ROOTS.union({PACKAGE_ROOT}).intersection(Path(file).parents)


def is_lazy_module(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params()


@contextlib.contextmanager
def preserve_param_groups(shared: Sequence[Any]) -> Iterator[None]:
    """Put back the settings of optimizers at the end."""
    groups = [group for thing in shared for group in getattr(thing, "__dict__", {}).get("param_groups", ())]
    before = [dict(group) for group in groups]
    try:
        yield
    finally:
        for group, settings in zip(groups, before, strict=True):
            group.update(settings)


@contextlib.contextmanager
def preserve_tensors(model: nn.Module) -> Iterator[None]:
    """Put back the values of a model's parameters and buffers, and its gradients, at the end."""
    before = [(t, t.detach().clone(), t.grad) for _, t in named_tensors(model) if not nn.parameter.is_lazy(t)]
    try:
        yield
    finally:
        for tensor, values, gradient in before:
            overwrite_tensor(model, tensor, values)
            tensor.grad = gradient


@contextlib.contextmanager
def _guard_original_model(model: nn.Module) -> Iterator[None]:
    """Put back a model's buffers, which a hook may have reached past the copy.

    Raises UserError if a parameter was.
    """
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    parameters = [(name, p, read_version(p)) for name, p in model.named_parameters()]
    try:
        yield
    finally:
        for b, values in buffers:
            overwrite_tensor(model, b, values)
    for name, p, old in parameters:
        if read_version(p) != old:
            raise UserError(
                f"score changes the parameter {name!r} past the model that it is given (by a hook or a global variable "
                "that refers to it): use the model that score is given"
            )
