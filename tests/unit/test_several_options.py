"""Options of several values and of nested dataclasses: from the command line to config.json and back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from hvdtrain.cli.options import TrainCommand, parse_arguments
from hvdtrain.comm.agreement import ConsistentPart
from hvdtrain.recipe.options import option_fields
from hvdtrain.system.errors import UserError
from hvdtrain.torch import Recipe, option
from hvdtrain.training.agreement import collect_option_values, make_options_part
from hvdtrain.training.config import ConfigReader, build_config
from hvdtrain.training.options import RunOptions, check_recipe_values, split_options


@dataclass
class Warmup:
    steps: int = 3


@dataclass
class Adam:
    beta: float = option(0.9, "decay of the mean", above=0)
    amsgrad: bool = False
    warmup: Warmup = field(default_factory=Warmup)


@dataclass(kw_only=True)
class Mine(Recipe):
    widths: tuple[int, ...] = option((32, 64), "channels", at_least=1)
    betas: tuple[float, float] = (0.9, 0.99)
    names: list[str] = option([], "texts")
    files: list[Path] = option([Path("a")], "files")
    kinds: tuple[Literal["a", "b"], ...] = ("a",)
    flags: tuple[bool, ...] = ()
    maybe: tuple[int, ...] | None = None
    adam: Adam = option(Adam(beta=0.5), "the optimizer")


def parse(*args: str) -> Mine:
    recipe, _ = split_options(Mine, parse_arguments(Mine, "mine.py", list(args)).given_options)
    return recipe


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--widths 1,2", {"widths": (1, 2)}),
        ("--widths 1 --widths 2,3", {"widths": (1, 2, 3)}),
        ("--betas .1,1", {"betas": (0.1, 1.0)}),
        ('--names=a,"b,c"', {"names": ["a", "b,c"]}),
        ("--names=", {"names": []}),
        ("--files x,y", {"files": [Path("x"), Path("y")]}),
        ("--kinds b,a", {"kinds": ("b", "a")}),
        ("--flags true,off", {"flags": (True, False)}),
        ("--maybe 1", {"maybe": (1,)}),
        ("--adam.beta .7", {"adam": Adam(beta=0.7)}),
        ("--adam.amsgrad", {"adam": Adam(beta=0.5, amsgrad=True)}),
        ("--adam.warmup.steps 9", {"adam": Adam(beta=0.5, warmup=Warmup(9))}),
    ],
)
def test_several_values_and_nested_options_are_parsed(args: str, expected: dict[str, Any]) -> None:
    assert vars(parse(*args.split())) == vars(Mine()) | expected


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--widths", "1,0"], "--widths is 0; it must be at least 1"),
        (["--widths", "1,x"], "--widths: 'x' is not a valid integer"),
        (["--betas", "0.5"], "--betas: '0.5' has 1 value; expected 2"),
        (["--kinds", "a,c"], "--kinds: 'c' is not one of 'a', 'b'"),
        (["--flags", "2"], "--flags: '2' is not a valid boolean; expected true or false"),
        (["--adam.beta", "0"], "--adam.beta is 0.0; it must be above 0"),
        (["--adam.bet", "0"], "no option --adam.bet; did you mean '--adam.beta'?"),
        (
            ["--names", "Hello, world"],
            "--names: 'Hello, world' has a comma and a space; expected values separated by commas alone, or one value "
            "in double quotes",
        ),
    ],
)
def test_wrong_values_are_refused_by_name(args: list[str], error: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(*args)
    assert str(refused.value) == error


def test_recipes_do_not_share_their_lists_and_dataclasses() -> None:
    one, other = Mine(), Mine()
    one.names.append("x")
    one.adam.beta = 0.1
    assert other.names == [] and other.adam.beta == 0.5


def test_values_of_a_recipe_made_in_python_are_checked_too() -> None:
    check_recipe_values(Mine())
    with pytest.raises(UserError, match=r"^--widths is -1; it must be at least 1$"):
        check_recipe_values(Mine(widths=(3, -1)))
    with pytest.raises(UserError, match=r"^--adam\.beta is nan; expected a finite number$"):
        check_recipe_values(Mine(adam=Adam(beta=float("nan"))))


def test_config_json_gives_the_same_recipe_back() -> None:
    given = ["--widths", "1,2", "--files", "x", "--adam.beta", "0.7", "--maybe", "4", "--logger", "tensorboard"]
    recipe, run = split_options(Mine, parse_arguments(Mine, "mine.py", given).given_options)
    content = json.loads(json.dumps(build_config("mine", recipe, run)))
    assert content["recipe"]["adam"] == {"beta": 0.7, "amsgrad": False, "warmup": {"steps": 3}}
    read = ConfigReader(Path("config.json"), Mine).read_options(content)
    assert split_options(Mine, read) == (recipe, run)


def test_ranks_compare_several_values_and_nested_options() -> None:
    def part(recipe: Mine) -> ConsistentPart:
        return make_options_part(collect_option_values(recipe, RunOptions()))

    one, other = part(Mine(widths=(1, 2))), part(Mine(adam=Adam(warmup=Warmup(4))))
    assert {name for name, value in one.values.items() if other.values[name] != value} == {
        "--widths",
        "--adam.beta",
        "--adam.warmup.steps",
    }


def test_help_shows_defaults_as_the_command_line_takes_them(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainCommand("mine", Mine).make_context("mine", []) as context:
        text = " ".join(context.get_help().split())
    for line in ("--widths INTEGER,... channels [32,64]", "--betas FLOAT,FLOAT [0.9,0.99]", "--adam.beta FLOAT decay"):
        assert line in text
    assert "--adam.amsgrad / --no-adam.amsgrad [off]" in text and "--kinds [a|b],... [a]" in text


@dataclass(kw_only=True)
class Odd(Recipe):
    adam: Adam | None = None


@dataclass(kw_only=True)
class Table(Recipe):
    sizes: dict[str, int] = field(default_factory=dict)


@pytest.mark.parametrize("cls", [Odd, Table])
def test_other_types_are_refused_by_name(cls: type[Recipe]) -> None:
    with pytest.raises(UserError, match=rf"^{cls.__name__}\.\w+ has type .*; options are int, float, str, bool, Path,"):
        option_fields(cls)


@dataclass(kw_only=True)
class Clash(Recipe):
    a_b: int = 1
    no_a: int = 2
    a: bool = False


def test_two_options_of_one_flag_are_refused() -> None:
    with pytest.raises(UserError, match=r"two options of Clash are called --no-a; rename the field of one"):
        TrainCommand("clash", Clash)
