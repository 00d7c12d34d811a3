"""Options that cannot be: numbers that are not finite, and names of the recipe contract."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

import hvdtrain
from hvdtrain.cli.main import main
from hvdtrain.recipe.base import check_methods
from hvdtrain.recipe.options import convert_value, option_fields
from hvdtrain.recipe.options import option as recipe_option
from hvdtrain.system.errors import UserError
from hvdtrain.torch import Recipe


@dataclass(kw_only=True)
class Bounded(Recipe):
    most: float = recipe_option(math.inf, "no bound by default")
    margin: float | None = None


FIELDS = {field.name: field for field in option_fields(Bounded)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, float("1e400")])
def test_a_number_that_is_not_finite_is_refused(value: float) -> None:
    for name in ("lr", "margin"):
        with pytest.raises(UserError, match=rf"^--{name} is {value}; expected a finite number$"):
            convert_value(FIELDS[name], value)


def test_infinity_is_allowed_if_it_is_the_default() -> None:
    assert convert_value(FIELDS["most"], math.inf) == math.inf
    assert convert_value(FIELDS["most"], -math.inf) == -math.inf
    with pytest.raises(UserError, match=r"^--most is nan; expected a finite number$"):
        convert_value(FIELDS["most"], math.nan)


def test_an_integer_beyond_floats_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--lr: 10{400} is too large for a float$"):
        convert_value(FIELDS["lr"], 10**400)
    assert convert_value(FIELDS["lr"], 3) == 3.0


@pytest.mark.parametrize(
    ("flag", "value", "shown"),
    [
        ("--lr", "nan", "nan"),
        ("--lr", "inf", "inf"),
        ("--lr", "1e400", "inf"),
        ("--clip-norm", "inf", "inf"),
        ("--ema", "nan", "nan"),
        ("--bucket-mib", "-inf", "-inf"),
    ],
)
def test_the_command_line_refuses_nonfinite_numbers(
    flag: str, value: str, shown: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "digits", f"{flag}={value}", "--run-dir", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert capfd.readouterr().err == f"hvdtrain: error: {flag} is {shown}; expected a finite number\n"
    assert not (tmp_path / "run").exists()


def test_fit_refuses_nonfinite_numbers_in_a_recipe_and_in_options(tmp_path: Path) -> None:
    from hvdtrain.recipe.registry import load_recipe

    digits = load_recipe("digits")
    with pytest.raises(UserError, match=r"^--lr is nan; expected a finite number$"):
        hvdtrain.fit(digits(lr=math.nan), run_dir=tmp_path / "run")
    with pytest.raises(UserError, match=r"^--lr is inf; expected a finite number$"):
        hvdtrain.fit(digits(), run_dir=tmp_path / "run", lr=math.inf)
    with pytest.raises(UserError, match=r"^--clip-norm is inf; expected a finite number$"):
        hvdtrain.fit(digits(), run_dir=tmp_path / "run", clip_norm=math.inf)


@pytest.mark.parametrize("name", ["collate", "buffers", "model", "best", "now", "evals", "sampler", "lr_factor"])
def test_a_field_with_a_name_of_the_recipe_contract_is_refused(name: str) -> None:
    cls = dataclasses.make_dataclass("Mine", [(name, int, 3)], bases=(Recipe,), kw_only=True)
    with pytest.raises(UserError, match=rf"Mine\.{name} is a name of the recipe contract: rename the option"):
        option_fields(cls)


class Unbounded(Bounded):  # no fields of its own, so no need for @dataclass
    def score(self, model, batch):
        return super().score(model, batch)


def test_a_subclass_without_fields_needs_no_decorator() -> None:
    with pytest.raises(UserError, match=r"^Unbounded has no method dataset\(self, split\)"):
        check_methods(Unbounded)
    assert [field.name for field in option_fields(Unbounded)] == list(FIELDS)
