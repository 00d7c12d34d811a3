"""What torch wraps around optimizers is found by names in its source: a release that renames them fails here."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hvdtrain.torch.torch_wrappers import find_inner_step, skip_compiler_import
from tests.support.limits import stretch


def test_the_compiler_wrappers_of_optimizers_are_found() -> None:
    assert {"zero_grad", "add_param_group"} <= set(skip_compiler_import())


def test_optimizers_are_made_without_the_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from hvdtrain.torch.torch_wrappers import find_inner_step, skip_compiler_import\n"
        "skip_compiler_import()\n"
        "optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)\n"
        "optimizer.zero_grad()\n"
        "step, without_grad = find_inner_step(optimizer)\n"
        "with torch.no_grad(): step(optimizer)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=stretch(60), check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_the_inner_step_is_without_wrappers(kind: type[torch.optim.Optimizer]) -> None:
    """Both are found: the wrapper of hooks, and the one that turns gradients off."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = kind([p], lr=0.1)  # type: ignore[call-arg]
    assert hasattr(type(optimizer).step, "__wrapped__")
    step, without_grad = find_inner_step(optimizer)
    assert not hasattr(step, "__wrapped__") and step.__qualname__.endswith(".step")
    assert without_grad


def test_a_differentiable_optimizer_keeps_gradients_on() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    assert find_inner_step(torch.optim.SGD([p], lr=0.1, differentiable=True))[1] is False


def test_a_step_of_the_objects_own_is_called() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.step = lambda *closure: "own"  # type: ignore[method-assign, assignment]
    step, without_grad = find_inner_step(optimizer)
    assert step(optimizer) == "own" and without_grad is False
