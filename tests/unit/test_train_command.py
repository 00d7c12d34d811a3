"""`hvdtrain train` and its neighbours: where options may stand, help, and errors that name what to change."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from hvdtrain.cli.main import main
from hvdtrain.cli.options import split_recipe
from hvdtrain.recipe.options import flatten_options, make_from_values, option_fields
from hvdtrain.system.errors import RecipeError, RunError, UserError, suggest_nearest
from hvdtrain.training.options import RunOptions

DIGITS = str(Path(__file__).parents[2] / "recipes" / "digits.py")
MINE = """
    from dataclasses import dataclass
    from hvdtrain.torch import Recipe, option

    @dataclass(kw_only=True)
    class Mine(Recipe):
        width: int = option(3, "channels")

        def model(self): ...
        def dataset(self, split): ...
        def score(self, model, batch): ...
"""


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The error of a command that ends with 2, without what `launch` says before it."""
    with pytest.raises(SystemExit) as left:
        main(list(args))
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("hvdtrain: error: ")


def output_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(list(args))
    assert not left.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "args",
    ["digits --seed 3 --quiet", "--seed 3 --quiet digits", "--seed=3 digits --quiet", "--quiet digits --seed 3"],
)
def test_run_options_may_come_before_or_after_the_recipe(args: str) -> None:
    recipe, rest = split_recipe(args.split())
    assert recipe == "digits" and sorted(" ".join(rest).replace("=", " ").split()) == ["--quiet", "--seed", "3"]


def test_a_recipes_own_option_before_the_recipe_is_an_error_that_shows_the_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert error_of(capsys, "train", "--width", "3", DIGITS) == (
        "--width before RECIPE is not a run option; a recipe's own options come after it: hvdtrain train RECIPE "
        "--width ..."
    )


def test_h_is_help_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    commands = ["", "train", f"train {DIGITS}", "launch", "list", "bench", "bench step", "ledger", "ledger verify"]
    for command in [*commands, "doctor", "agent", "horovod", "horovod build"]:
        text = output_of(capsys, *command.split(), "-h")
        assert text.startswith("Usage: ") and text == output_of(capsys, *command.split(), "--help"), command


def test_help_lists_every_option_in_its_section(capsys: pytest.CaptureFixture[str]) -> None:
    text = output_of(capsys, "train", DIGITS, "--help")
    sections = "Recipe options|Data|Optimization|Gradient exchange|Device|Run folder and checkpoints|Reports|Faults and"
    places = [text.index(f"\n{section}") for section in sections.split("|")]
    assert places == sorted(places)
    assert all(f"  {field.flag} " in text for field in option_fields(RunOptions))
    # One place for each: epochs, batch_size, lr and schedule have defaults of the recipe and sections of every run.
    assert places[0] < text.index("--width") < places[1] < text.index("--epochs") < places[2] < text.index("--lr")
    general = output_of(capsys, "train", "--help")
    assert all(f"  {field.flag} " in general for field in option_fields(RunOptions))


def test_descriptions_of_commands_are_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    for group in ("bench", "horovod", "ledger"):
        assert "..." not in output_of(capsys, group, "--help").partition("Commands:")[2]


@pytest.mark.parametrize("flag", ["--augment", "--bar"])
def test_nothing_is_suggested_if_nothing_is_near(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, "train", DIGITS, flag, "x") == (
        f"no option {flag}; hvdtrain train {DIGITS} --help lists them"
    )


def test_the_nearest_name_is_suggested_whatever_its_case_and_dashes() -> None:
    assert suggest_nearest("--Widht", ["--width", "--height"]) == "; did you mean '--width'?"
    assert suggest_nearest("x", ["left", "right"]) == "; there are: left, right"


@pytest.mark.parametrize("command", ["train", "launch -np 2"])
def test_a_recipe_without_a_method_is_refused_before_any_rank_starts(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(textwrap.dedent(MINE))
    monkeypatch.chdir(tmp_path)
    error = error_of(capsys, *command.split(), "mine.py")
    assert error == "Mine has no method optimizer(self, params), which a recipe needs: define it"


def test_fit_names_what_is_wrong_with_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hvdtrain
    from hvdtrain.recipe.registry import load_recipe

    (tmp_path / "mine.py").write_text(textwrap.dedent(MINE) + "    def optimizer(self, params): ...\n")
    monkeypatch.chdir(tmp_path)
    mine = load_recipe("mine.py")()
    with pytest.raises(UserError, match=r"'width' is a field of the recipe: give it to Mine\(width=...\), not to fit"):
        hvdtrain.fit(mine, width=3)
    with pytest.raises(UserError) as caught:
        hvdtrain.fit(mine, widht=3)
    text = str(caught.value)
    assert text.startswith("fit has no option 'widht'; did you mean 'width'?; run options: amp, batch_per_rank, ")
    assert " epochs, " in text and text.endswith("fields of the recipe, for Mine(...): channels_last, width")


def test_list_shows_a_subclass_of_a_recipe_of_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.py").write_text(textwrap.dedent(MINE))
    (tmp_path / "recipes" / "variants.py").write_text(
        "import mine\nfrom mine import Mine\nclass Wide(Mine):\n  'Wide one.'\nclass Deep(mine.Mine):\n  'Deep one.'\n"
    )
    monkeypatch.chdir(tmp_path)
    listed = output_of(capsys, "list").splitlines()
    assert [line.split() for line in listed if "variants" in line] == [
        ["variants:Deep", "torch", "Deep", "one."],
        ["variants:Wide", "torch", "Wide", "one."],
    ]


def test_list_groups_recipes_by_their_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.py").write_text(textwrap.dedent(MINE))
    subclass = "from mine import Mine\nclass Talk(Mine):\n  'Speech.'\n  domain: str = 'audio'\nclass More(Talk): 'x'\n"
    (tmp_path / "recipes" / "talk.py").write_text(subclass)
    monkeypatch.chdir(tmp_path)
    lines = output_of(capsys, "list").splitlines()
    assert lines[:3] == ["audio:", "  talk               torch  Speech.", "  talk:More          torch  x"]
    assert lines[-2:] == ["other:", "  mine               torch  "]
    places = [lines.index(f"{name}:") for name in ("audio", "tabular", "vision", "other")]
    assert places == sorted(places)


def test_options_are_flat_outside_and_grouped_inside() -> None:
    values = {"compression": "topk:0.1", "exchange": "bucketed", "checkpoint_every": 5, "log_every": 2, "seed": 7}
    options = make_from_values(RunOptions, values)
    assert options.compression.spec == "topk:0.1" and options.exchange.kind == "bucketed"
    assert options.checkpoints.every == 5 and options.reports.log_every == 2 and options.data.seed == 7
    flat = flatten_options(options)
    assert values.items() <= flat.items() and make_from_values(RunOptions, flat) == options


def test_an_error_knows_its_exit_code() -> None:
    assert (UserError.exit_code, RunError.exit_code, RecipeError.exit_code) == (2, 1, 1)
