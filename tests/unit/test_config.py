"""Options from a file: the forms that are read, and what is refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.recipe.base import Recipe
from hvdtrain.system.errors import UserError
from hvdtrain.training.config import ConfigReader, override_options


@dataclass
class Adam:
    beta: float = 0.9


@dataclass(kw_only=True)
class Mine(Recipe):
    width: int = 3
    adam: Adam = field(default_factory=Adam)


def read(content: Any) -> Any:
    return ConfigReader(Path("f.toml"), Mine).read_options(content)


@pytest.mark.parametrize(
    "content",
    [
        {"width": 5, "adam": {"beta": 0.5}, "amp": "bf16"},
        {"width": 5, "adam.beta": 0.5, "amp": "bf16"},
        {"recipe": {"width": 5, "adam": {"beta": 0.5}}, "run": {"amp": "bf16"}},
        {"recipe": "mine", "options": {"width": 5, "adam.beta": 0.5, "amp": "bf16"}},
        {"name": "x", "class": "X", "recipe": {"width": 5, "adam": {"beta": 0.5}}, "run": {"amp": "bf16"}},
    ],
)
def test_flat_files_and_files_with_tables_are_read(content: Any) -> None:
    assert read(content) == {"width": 5, "adam.beta": 0.5, "amp": "bf16"}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([], "f.toml holds list; expected options by their names"),
        ({"widht": 5}, "f.toml has the option 'widht', which Mine does not have; did you mean 'width'?"),
        ({"adam": {"bet": 5}}, "f.toml has the option 'adam.bet', which Mine does not have; did you mean 'adam.beta'?"),
        ({"width": "5"}, "f.toml: --width: '5' is str; expected int"),
        ({"recipe": {"amp": "off"}}, "f.toml: amp belongs in run, not in recipe"),
        ({"run": {"width": 5}}, "f.toml: width belongs in recipe, not in run"),
        ({"recipe": {}, "width": 5}, "f.toml has 'width' next to the options of recipe and run; it belongs in recipe"),
        ({"recipe": {}, "runn": {}}, "f.toml has 'runn' next to the options of recipe and run; did you mean 'run'?"),
        ({"recipe": {}, "run": 3}, "f.toml: run is 3; expected options by their names"),
        ({"epochs": 1, "steps": 2}, "f.toml: epochs and steps exclude each other: give one"),
    ],
)
def test_wrong_files_are_refused_by_name(content: Any, error: str) -> None:
    with pytest.raises(UserError) as refused:
        read(content)
    assert str(refused.value) == error


def test_what_is_given_now_replaces_what_excludes_it() -> None:
    earlier = {"steps": 5, "batch_per_rank": 3, "scale_lr": "linear", "lr": 1.0}
    assert override_options(earlier, {"epochs": 2}) == {
        "batch_per_rank": 3,
        "scale_lr": "linear",
        "lr": 1.0,
        "epochs": 2,
    }
    assert override_options(earlier, {"batch_size": 2, "lr": 2.0}) == {"steps": 5, "lr": 2.0, "batch_size": 2}
