"""A mistake in a recipe is one line that names the method, with the recipe's own frames only."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from hvdtrain.recipe.options import make_from_values
from hvdtrain.system.errors import KnownError, RecipeError, RunError, UserError
from hvdtrain.system.recipe_errors import in_recipe
from hvdtrain.torch import Recipe
from hvdtrain.torch.data import OTHER_DATA
from hvdtrain.torch.scores import find_layout
from hvdtrain.torch.setup import check_dataset, explain_nondeterminism, make_model, make_optimizers
from hvdtrain.training.start import check_metric_names


class Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.zeros(7, 7)


@dataclass(kw_only=True)
class Mine(Recipe):
    kind: str = "good"

    def __post_init__(self) -> None:
        if self.kind == "refused":
            raise ValueError("kind is refused")
        if self.kind == "bug":
            raise AttributeError("no such thing")

    def model(self) -> Any:
        made = {"good": nn.Linear(1, 1), "none": None, "text": "model", "parallel": nn.DataParallel(nn.Linear(1, 1))}
        return made[self.kind]

    def dataset(self, split: str) -> Any:
        return [1, 2, 3]

    def optimizer(self, params: Any) -> Any:
        return {"good": torch.optim.SGD(params, lr=0.1), "none": None, "list": [params]}[self.kind]

    def score(self, model: Any, batch: Any) -> Any:
        return {"loss": model(batch)}


def failing_call(call: str, function: Any) -> RecipeError:
    with pytest.raises(RecipeError) as raised, in_recipe(Mine(), call):
        function()
    return raised.value


def test_the_line_names_class_method_and_error() -> None:
    def fail() -> None:
        raise KeyError("age")

    error = failing_call("dataset('train')", fail)
    assert str(error) == "Mine.dataset('train') raised KeyError: 'age'"
    assert error.trace.startswith("Traceback (most recent call last):\n")
    assert error.trace.endswith("in fail\n    raise KeyError(\"age\")\nKeyError: 'age'\n")


def test_frames_of_hvdtrain_and_torch_are_cut() -> None:
    error = failing_call("score()", lambda: Mine().score(nn.Sequential(Inner()), torch.zeros(3, 3)))
    assert str(error).startswith("Mine.score() raised RuntimeError: ")
    files = [line.split('"')[1] for line in error.trace.splitlines() if line.startswith("  File ")]
    assert files and set(files) == {__file__}
    assert "in score" in error.trace and "in forward" in error.trace


def test_an_error_with_a_cause_shows_both() -> None:
    def fail() -> None:
        try:
            {}["a"]
        except KeyError as error:
            raise OSError("file missing") from error

    trace = failing_call("model()", fail).trace
    assert "KeyError: 'a'\n\nThe above exception was the direct cause" in trace
    assert trace.endswith("OSError: file missing\n")


def test_an_error_in_torch_alone_has_no_traceback() -> None:
    def fail() -> None:
        raise AssertionError("not reached")

    with pytest.raises(RecipeError) as raised, in_recipe(Mine, "optimizer()"):
        torch.optim.SGD([], lr=0.1)
    assert "SGD" not in str(raised.value)
    assert str(raised.value) == "Mine.optimizer() raised ValueError: optimizer got an empty parameter list"
    # The block itself stands in this file; its frame is the only one left.
    assert raised.value.trace.count("  File ") == 1
    assert failing_call("model()", fail).trace.count("  File ") == 2


def test_a_message_of_several_lines_becomes_one() -> None:
    def fail() -> None:
        raise RuntimeError("\nfirst\nsecond")

    assert str(failing_call("score()", fail)) == "Mine.score() raised RuntimeError: first"

    def fail_silently() -> None:
        raise RuntimeError

    assert str(failing_call("score()", fail_silently)) == "Mine.score() raised RuntimeError"


@pytest.mark.parametrize("code", [3, 0, None, "no licence"])
def test_an_exit_is_a_failure(code: Any) -> None:
    text = f"Mine.score() called sys.exit({'' if code is None else repr(code)}): a recipe must not end the process"
    assert str(failing_call("score()", lambda: sys.exit(code))) == text


@pytest.mark.parametrize("error", [UserError("a"), RunError("b"), RecipeError("c"), KeyboardInterrupt()])
def test_known_errors_are_raised_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, in_recipe(Mine(), "score()"):
        raise error
    assert raised.value is error


def test_a_lost_peer_passes() -> None:
    from hvdtrain.comm.collectives import PeersLost

    with pytest.raises(PeersLost), in_recipe(Mine(), "score()"):
        raise PeersLost("gone")


def test_recipe_error_can_be_pickled() -> None:
    error: KnownError = pickle.loads(pickle.dumps(RecipeError("text", "trace")))  # noqa: S301
    assert isinstance(error, RecipeError) and (str(error), error.trace) == ("text", "trace")


def test_a_refusal_of_determinism_is_named_through_it() -> None:
    @explain_nondeterminism
    def step() -> None:
        with in_recipe(Mine(), "score()"):
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")

    with pytest.raises(RunError, match=r"^cumsum_cuda_kernel has no deterministic form in torch on this device: use"):
        step()


def test_errors_in_post_init_are_named_and_user_errors_pass() -> None:
    with pytest.raises(UserError, match=r"^kind is refused$"):
        make_from_values(Mine, {"kind": "refused"})
    with pytest.raises(RecipeError) as raised:
        make_from_values(Mine, {"kind": "bug"})
    assert str(raised.value) == "Mine.__post_init__() raised AttributeError: no such thing"
    assert raised.value.trace.count("  File ") == 1 and "in __post_init__" in raised.value.trace


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter([1])


class BadLength:
    def __getitem__(self, i: int) -> int:
        return i

    def __len__(self) -> int:
        raise RuntimeError("not known")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda: make_model(Mine(kind="none")),
            "Mine.model() returned NoneType; expected a torch.nn.Module: does it lack a return?",
        ),
        (lambda: make_model(Mine(kind="text")), "Mine.model() returned str; expected a torch.nn.Module"),
        (
            lambda: make_model(Mine(kind="parallel")),
            "Mine.model() returned a DataParallel; expected the module in it: hvdtrain trains it on all ranks",
        ),
        (
            lambda: make_optimizers(Mine(kind="none"), nn.Linear(1, 1)),
            "Mine.optimizer() returned NoneType; expected a torch.optim.Optimizer: does it lack a return?",
        ),
        (
            lambda: make_optimizers(Mine(kind="list"), nn.Linear(1, 1)),
            "Mine.optimizer() returned list; expected a torch.optim.Optimizer, or a dict of them by the names of their "
            "losses, e.g. {'loss_d': ..., 'loss_g': ...}",
        ),
        (
            lambda: check_dataset(Mine(), "train", Stream()),
            "Mine.dataset('train') returned Stream, an IterableDataset; expected a map-style dataset, with len() and "
            f"[i], or {OTHER_DATA}",
        ),
        (
            lambda: check_dataset(Mine(), "eval", 5),
            "Mine.dataset('eval') returned int; expected a map-style dataset, with len() and [i]",
        ),
        (
            lambda: check_dataset(Mine(), "eval", BadLength()),
            "Mine.dataset('eval').__len__() raised RuntimeError: not known",
        ),
    ],
)
def test_a_wrong_return_value_is_one_line(function: Any, message: str) -> None:
    with pytest.raises(KnownError) as raised:
        function()
    assert str(raised.value) == message


def test_best_without_a_direction_is_one_line() -> None:
    recipe = Mine()
    recipe.best = "accuracy"  # type: ignore[assignment]
    with pytest.raises(UserError) as raised:
        check_metric_names(recipe, ("eval",), {"loss": 1.0, "accuracy": 0.5})
    assert str(raised.value) == "Mine.best is 'accuracy'; expected a metric and 'min' or 'max', as ('loss', 'min')"


def test_scores_without_a_loss_are_named() -> None:
    with pytest.raises(UserError) as raised:
        find_layout(Mine(), {"accuracy": torch.ones(2)}, 2)
    assert str(raised.value) == "Mine.score must return a dict with 'loss', got a dict of 'accuracy'"


def test_a_wrapped_optimizer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer._requires_update = set()  # type: ignore[attr-defined]
    monkeypatch.setattr(Mine, "optimizer", lambda self, params: optimizer)
    with pytest.raises(UserError) as raised:
        make_optimizers(Mine(), nn.Linear(1, 1))
    assert str(raised.value) == (
        "Mine.optimizer() returned a DistributedOptimizer; expected the optimizer in it: hvdtrain wraps it"
    )


def test_shipped_recipes_are_shown(tmp_path: Path) -> None:
    from hvdtrain.recipe.source import SHIPPED_RECIPES
    from hvdtrain.system.recipe_errors import PACKAGE, is_hidden

    assert not is_hidden(str(SHIPPED_RECIPES / "digits.py"))
    assert not is_hidden(str(PACKAGE / "recipes" / "digits.py"))
    assert not is_hidden(str(tmp_path / "torch" / "mine.py"))
    assert is_hidden(str(PACKAGE / "torch" / "step.py")) and is_hidden(torch.__file__) and is_hidden("<string>")
