"""What a recipe remembers, `state` and `load_state`: through resumes and new generations; and `lr_factor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hvdtrain
from hvdtrain.cli.train import check_arguments
from hvdtrain.recipe.registry import load_recipe
from hvdtrain.system.errors import RecipeError, RunError, UserError
from tests.ranks.elastic import ElasticJob, verify
from tests.ranks.harness import rows
from tests.support.worlds import KeptWorld, refusal, train, train_here

RECIPES = Path(__file__).parent / "memory_recipes.py"
MEMORY, RATE = f"{RECIPES}:Memory", f"{RECIPES}:OwnRate"


def test_rank_0s_state_is_what_all_ranks_continue_with(world2: KeptWorld, tmp_path: Path) -> None:
    options = ["--log-every", "1"]
    train(world2, MEMORY, tmp_path / "run", *options, "--steps", "3")
    # Rank 0 has 3 and rank 1 has 2 examples of each step.
    assert [row["count"] for row in rows(tmp_path / "run")] == pytest.approx([60.0 + n for n in (1, 2, 3)])
    saved = torch.load(tmp_path / "run" / "checkpoints" / "step-3" / "state", weights_only=True)["recipe"]
    assert saved.keys() == {"count", "table", "odd"} and saved["count"] == 103.0
    assert saved["table"].untyped_storage().nbytes() == 8  # not what it is a view of
    train(world2, MEMORY, tmp_path / "run", "--resume", "--steps", "5")
    assert [row["count"] for row in rows(tmp_path / "run")][3:] == [104.0, 105.0]
    recipe, _ = hvdtrain.load(tmp_path / "run", "last")
    assert recipe.count == 105 and recipe.table.tolist() == [5.0, 5.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("list", "Memory.state() returned list; expected a dict of JSON values and tensors"),
        ("array", "Memory.state()['odd']['list'][1] is a numpy.ndarray; expected JSON values and tensors"),
        ("key", "Memory.state() has the key 1, int; expected strings as keys"),
        ("numpy number", "Memory.state()['odd'] is a numpy.float32; expected JSON values and tensors"),
    ],
)
def test_what_cannot_be_remembered_is_refused_by_name_before_the_first_step(
    kind: str, text: str, world2: KeptWorld, tmp_path: Path
) -> None:
    assert refusal(world2, MEMORY, tmp_path / "run", "--kind", kind) == text
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_and_a_recipe_that_do_not_remember_the_same(world1: KeptWorld, tmp_path: Path) -> None:
    """Of a recipe whose methods were added, or removed, between start and resume."""
    recipe = tmp_path / "mine.py"
    source = RECIPES.read_text().replace("from ending_early_recipes", "from tests.ranks.ending_early_recipes")
    recipe.write_text(source)
    train(world1, f"{recipe}:Memory", tmp_path / "run", "--steps", "2")
    recipe.write_text(source.replace("def state", "def _state").replace("def load_state", "def _load_state"))
    text = refusal(world1, f"{recipe}:Memory", tmp_path / "run", "--resume", "--steps", "3")
    assert text == "the checkpoint has a state of the recipe, and Memory has no load_state(self, state)"
    train(world1, f"{recipe}:Memory", tmp_path / "other", "--steps", "2")
    recipe.write_text(source)
    train(world1, f"{recipe}:Memory", tmp_path / "other", "--resume", "--steps", "3")
    line = "state     the checkpoint has none of Memory.state(): it begins as in a new run"
    assert line in world1.printed[0]
    recipe.write_text(source.replace('kind: str = option("",', 'kind: str = option("raises",'))
    (error,) = world1.errors(train_here, f"{recipe}:Memory", tmp_path / "run", ("--resume", "--kind", "raises"))
    assert isinstance(error, RecipeError) and str(error) == "Memory.load_state() raised KeyError: 'old'"


def test_a_recipe_that_can_only_write_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^OneSided has a method state and no load_state: a recipe that remembers needs"
    ):
        check_arguments([f"{RECIPES}:OneSided"])


@pytest.mark.slow
def test_state_and_now_are_right_in_each_generation(tmp_path: Path) -> None:
    """Every step counts once, also one in which a rank was killed, and those after newcomers."""
    recipe = str(Path(__file__).parent / "remembering_recipe.py") + ":Remembering"
    with ElasticJob(tmp_path, "localhost:2", "--pause", "0.3", "--epochs", "8", recipe=recipe) as job:
        job.step(3)
        job.kill(1)
        job.world(1)
        job.more(1)
        job.world(2)
        job.more(2)
        job.end()
    found = rows(job.run_dir)
    assert [row["count"] for row in found] == [row["step"] for row in found]
    assert [row["seen"] for row in found] == [row["step"] for row in found]
    assert [row["now_step"] for row in found] == [row["step"] - 1 for row in found]
    assert {row["now_size"] for row in found} == {1, 2} and found[-1]["now_size"] == 2
    verify(job.run_dir)


def test_lr_factor_sets_the_rate_of_each_step(world1: KeptWorld, world2: KeptWorld, tmp_path: Path) -> None:
    options = ["--steps", "4", "--log-every", "1"]
    for world, name in ((world1, "run1"), (world2, "run2")):
        train(world, RATE, tmp_path / name, *options)
        assert "lr        0.1 times OwnRate.lr_factor(now)" in world.printed[0]
    found = [[(row["lr"], row["loss"]) for row in rows(tmp_path / name)] for name in ("run1", "run2")]
    assert [lr for lr, _ in found[0]] == pytest.approx([0.1, 0.05, 0.1 / 3, 0.025])
    assert found[0] == found[1]
    weights = [1.0, 0.9, 0.85, 0.85 - 0.1 / 3]
    assert [loss for _, loss in found[0]] == pytest.approx(weights)


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("nan", RunError, "OwnRate.lr_factor() returned nan for step 1; expected a finite number from 0 on"),
        ("negative", RunError, "OwnRate.lr_factor() returned -1 for step 1; expected a finite number from 0 on"),
        ("none", RunError, "OwnRate.lr_factor() returned None for step 1; expected a finite number from 0 on"),
        ("raises", RecipeError, "OwnRate.lr_factor() raised ZeroDivisionError: no"),
        ("ranks differ", RunError, "OwnRate.lr_factor() returned {}.0 on rank {} for step 2, and another number on"),
    ],
)
def test_what_lr_factor_may_not_return_is_named(
    kind: str, error: type[Exception], text: str, world2: KeptWorld, tmp_path: Path
) -> None:
    errors = world2.errors(train_here, RATE, tmp_path / "run", ("--kind", kind))
    for rank, one in enumerate(errors):
        assert type(one) is error and str(one).startswith(text.format(1 + rank, rank))


def test_lr_factor_with_a_schedule_is_refused(tmp_path: Path) -> None:
    own_rate: Any = load_recipe(RATE)
    with pytest.raises(
        UserError, match=r"^--schedule 'constant', but OwnRate\.lr_factor sets the learning rate"
    ) as caught:
        check_arguments([RATE, "--schedule", "constant"])
    assert caught.value.exit_code == 2
    for recipe, options in ((own_rate(), {"schedule": "cosine"}), (own_rate(schedule="cosine"), {})):
        with pytest.raises(UserError, match=r"^--schedule 'cosine', but OwnRate\.lr_factor"):
            hvdtrain.fit(recipe, run_dir=tmp_path / "run", **options)
