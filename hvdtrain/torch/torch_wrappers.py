"""What torch wraps around its optimizers' methods, looked through by the wrappers' names in torch's source.

A torch release may rename them; then nothing is unwrapped and nothing else breaks. `tests/unit/test_torch_wrappers.py`
fails if that has happened.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

COMPILER_WRAPPER_MODULE = "torch._compile"  # where `_disable_dynamo` is defined
GRADIENT_WRAPPER_NAME = "_use_grad"  # the function that `_use_grad_for_differentiable` returns


def skip_compiler_import() -> list[str]:
    """Let optimizers be made without importing torch's compiler, a third of what it takes a rank to start.

    Some of their methods are wrapped so that the compiler passes over them; the wrapper looks for the function to call
    instead in an attribute, and imports the compiler to make one only if there is none.

    Returns:
        the names of these methods.
    """
    found = []
    for name, method in vars(torch.optim.Optimizer).items():
        if isinstance(method, FunctionType) and method.__globals__["__name__"] == COMPILER_WRAPPER_MODULE:
            inner = inspect.unwrap(method)
            inner.__dynamo_disable = inner
            found.append(name)
    return found


def find_inner_step(optimizer: torch.optim.Optimizer) -> tuple[Callable[..., Any], bool]:
    """Return the optimizer's step without what torch wraps around it, and whether that turns gradients off.

    The step of a DistributedOptimizer is wrapped itself: the optimizer's hooks would run twice. And the other wrapper
    imports torch's compiler, which takes as long as half of what a rank needs to start.
    """
    own = vars(optimizer).get("step")
    if own is not None and not hasattr(own, "_wrapped_by_lr_sched"):
        return (lambda _, *closure: own(*closure)), False
    step: Any = type(optimizer).step
    without_grad = False
    while hasattr(step, "__wrapped__") and step.__globals__["__name__"] == torch.optim.Optimizer.__module__:
        without_grad |= step.__code__.co_name == GRADIENT_WRAPPER_NAME and not optimizer.defaults["differentiable"]
        step = step.__wrapped__
    return step, without_grad
